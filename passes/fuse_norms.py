"""FuseNorms: a norm is computed by the product after it.

    y = call_tir(rms_norm, (h, norm))               ->    z = call_tir(product_norm, (h, norm, w...))
    z = call_tir(product, (y, w...))

norm(h) W^T = s (h norm) W^T, where s, the inverse of the root mean square, is known once all of h is read: the kernel
multiplies the sums with it. For one token, where the product's kernel can (schedules/table.py, `fuses`) and nothing
else reads y. Runs between LowerSparseMatmul and ApplySchedules, on sketches.
"""

from __future__ import annotations

import tvm
from tvm import relax

from tvm_sparse.passes.kernel_calls import KernelCalls, fuse


@tvm.transform.module_pass(opt_level=0)
class FuseNorms:
    def transform_module(self, mod: tvm.IRModule, _: tvm.transform.PassContext) -> tvm.IRModule:
        return fuse(mod, _Fuser)


@relax.expr_functor.mutator
class _Fuser(KernelCalls):
    def visit_call_(self, call: relax.Call) -> relax.Expr:
        if self.spec(call) is not None:
            norm = self.sole_producer(call.args[1][0])
            name, *static = self.operation(norm)
            if norm is not None and name == "rms_norm":
                found = self.product(call, norm_eps=static[2])
                if found is not None:
                    spec, (_, *buffers) = found
                    return self.call(spec, [*norm.args[1], *buffers])
        return super().visit_call_(call)
