"""FuseGates: the gate of an MLP is computed by the product before it.

    z = call_tir(product, (x, w...))                ->    y = call_tir(product_silu_mul, (x, w...))
    y = call_tir(silu_mul, (z,))

Where the product's matrix is packed in pairs, so that its kernel holds both factors of a number, and the step is one
token's. Runs between LowerSparseMatmul and ApplySchedules, on sketches.
"""

from __future__ import annotations

import tvm
from tvm import relax

from tvm_sparse.passes.kernel_calls import KernelCalls, fuse


@tvm.transform.module_pass(opt_level=0)
class FuseGates:
    def transform_module(self, mod: tvm.IRModule, _: tvm.transform.PassContext) -> tvm.IRModule:
        return fuse(mod, _Fuser)


@relax.expr_functor.mutator
class _Fuser(KernelCalls):
    def visit_call_(self, call: relax.Call) -> relax.Expr:
        if self.operation(call)[0] == "silu_mul":
            found = self.product(self.sole_producer(call.args[1][0]), after="silu_mul")
            if found is not None:
                return self.call(*found)
        return super().visit_call_(call)
