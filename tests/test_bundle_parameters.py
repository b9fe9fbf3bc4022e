"""BundleParameters: Before and Expected as modules, and one run."""

from __future__ import annotations

import numpy as np
import tvm
import tvm_ffi
from tvm import relax
from tvm.script import ir as I
from tvm.script import relax as R

from tvm_sparse.passes.bundle_parameters import BundleParameters


@I.ir_module
class Before:
    @R.function
    def main(
        x: R.Tensor((2,), "float32"),
        s: R.Tensor((2,), "float32"),
        a: R.Tensor((2,), "float32"),
        b: R.Tensor((2,), "float32"),
    ) -> R.Tensor((2,), "float32"):
        R.func_attr({"num_input": 2, "tvm_sparse.num_state": 1})
        with R.dataflow():
            y = R.multiply(R.add(x, s), R.subtract(a, b))
            R.output(y)
        return y


@I.ir_module
class Expected:
    @R.function
    def main(
        x: R.Tensor((2,), "float32"),
        state: R.Tuple(R.Tensor((2,), "float32")),
        params: R.Tuple(R.Tensor((2,), "float32"), R.Tensor((2,), "float32")),
    ) -> R.Tensor((2,), "float32"):
        R.func_attr({"num_input": 1})
        s = state[0]
        a = params[0]
        b = params[1]
        with R.dataflow():
            y = R.multiply(R.add(x, s), R.subtract(a, b))
            R.output(y)
        return y


def test_state_and_weights_become_two_tuples():
    after = BundleParameters()(Before)
    assert tvm_ffi.structural_equal(after, Expected, map_free_vars=True)
    assert relax.analysis.well_formed(after) is not False


def test_a_function_without_the_attribute_stays():
    plain = tvm.IRModule({"main": Before["main"].without_attr("tvm_sparse.num_state")})
    assert tvm_ffi.structural_equal(BundleParameters()(plain), plain)


def test_values_stay():
    vm = relax.VirtualMachine(tvm.compile(BundleParameters()(Before), target="llvm"), tvm.cpu())
    x, s, a, b = (tvm.runtime.tensor(np.array(v, np.float32)) for v in ([1, 2], [3, 4], [5, 6], [7, 9]))
    assert vm["main"](x, [s], [a, b]).numpy().tolist() == [-8.0, -18.0]
