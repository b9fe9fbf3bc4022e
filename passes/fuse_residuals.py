"""FuseResiduals: the residual stream is summed by the product that brings the next summand.

    z = call_tir(product, (x, w...))                ->    h = call_tir(product_add, (x, w..., r))
    h, y = call_tir(add_rms_norm, (r, z, norm))           y = call_tir(rms_norm, (h, norm))

For one token, where the product's kernel can (schedules/table.py, `fuses`). The norm is left to FuseNorms. Runs between
LowerSparseMatmul and ApplySchedules, on sketches.
"""

from __future__ import annotations

import tvm
from tvm import relax

from tvm_sparse.passes.kernel_calls import KernelCalls, fuse
from tvm_sparse.schedules.ops import ModelOps


@tvm.transform.module_pass(opt_level=0)
class FuseResiduals:
    def transform_module(self, mod: tvm.IRModule, _: tvm.transform.PassContext) -> tvm.IRModule:
        return fuse(mod, _Fuser)


@relax.expr_functor.mutator
class _Fuser(KernelCalls):
    def visit_call_(self, call: relax.Call) -> relax.Expr:
        name, *static = self.operation(call)
        if name != "add_rms_norm":
            return super().visit_call_(call)
        residual, summand, weight = call.args[1]
        found = self.product(self.sole_producer(summand), after="add")
        if found is None:
            return super().visit_call_(call)
        spec, arguments = found
        total = self.builder_.emit(self.call(spec, [*arguments, residual]))
        norm = self.builder_.add_func(ModelOps(spec.device).rms_norm(*static), "rms_norm")
        y = relax.op.call_tir(norm, relax.Tuple([total, self.visit_expr(weight)]), total.ty)
        return relax.Tuple([total, self.builder_.emit(y)])
