"""What passes on lowered graphs share: calls of matmul sketches and of the model's operations, and who uses what."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import tvm
from tvm import relax

from tvm_sparse.passes.linear import bindings, relax_functions
from tvm_sparse.schedules.ops import OPERATION_ATTR
from tvm_sparse.schedules.space import sketch
from tvm_sparse.schedules.spec import KernelSpec
from tvm_sparse.schedules.table import SPEC_ATTR, fuses

_CALL_TIR = tvm.ir.Op.get("relax.call_tir")


class KernelCalls(relax.PyExprMutator):
    """A mutator that knows, of the function as it was, what each variable is bound to and how often it is read."""

    def __init__(self, mod: tvm.IRModule):
        super().__init__(mod)
        self.mod = mod
        self.bound: dict[relax.Var, relax.Expr] = {}
        self.uses: Counter[relax.Var] = Counter()
        self.kernels: dict[KernelSpec, tvm.ir.GlobalVar] = {}

    def rewrite(self, gvar: tvm.ir.GlobalVar, function: relax.Function) -> None:
        self.bound = bindings(function)
        self.uses = Counter(var for value in self.bound.values() for var in relax.analysis.free_vars(value))
        self.uses.update(relax.analysis.free_vars(function.body.body))
        self.builder_.update_func(gvar, self.visit_expr(function))

    def _callee(self, call: relax.Expr | None) -> tvm.tirx.PrimFunc | None:
        if not isinstance(call, relax.Call) or call.op != _CALL_TIR:
            return None
        return self.mod[call.args[0]]

    def operation(self, call: relax.Expr | None) -> list:
        """[name, its builder's arguments...] of one of the model's operations (schedules/ops.py), [""] of none."""
        callee = self._callee(call)
        noted = callee.attrs.get(OPERATION_ATTR) if callee is not None else None
        return json.loads(str(noted)) if noted is not None else [""]

    def spec(self, call: relax.Expr | None) -> KernelSpec | None:
        """Of a matmul kernel's call; host code that chooses among several (schedules/product.py) is none."""
        callee = self._callee(call)
        noted = callee.attrs.get(SPEC_ATTR) if callee is not None else None
        return KernelSpec.from_json(noted) if noted is not None else None

    def product(self, call: relax.Expr | None, **besides) -> tuple[KernelSpec, list[relax.Expr]] | None:
        """A product's spec with more fused into it, where there is such a kernel, and the call's arguments."""
        spec = self.spec(call)
        if call is None or spec is None or any(getattr(spec, key) for key in besides):
            return None
        fused = replace(spec, **besides)
        return (fused, list(call.args[1])) if fuses(fused) else None

    def sole_producer(self, var: relax.Expr) -> relax.Expr | None:
        """What a variable is bound to, where nothing else reads it."""
        return self.bound.get(var) if self.uses[var] == 1 else None

    def call(self, spec: KernelSpec, arguments: Sequence[relax.Expr]) -> relax.Call:
        """A call of the spec's sketch; arguments as they were in the function before."""
        if spec not in self.kernels:
            self.kernels[spec] = self.builder_.add_func(sketch(spec), spec.name)
        out = relax.TensorType((spec.m, spec.out_features), spec.out_dtype)
        return relax.op.call_tir(self.kernels[spec], self.visit_expr(relax.Tuple(arguments)), out)


def fuse(mod: tvm.IRModule, fuser: Callable[[tvm.IRModule], KernelCalls]) -> tvm.IRModule:
    """Every function of the module rewritten, and without what that has left without a use."""
    made = fuser(mod.clone())
    for gvar, function in relax_functions(mod).items():
        made.rewrite(gvar, function)
    tidy = [relax.transform.CanonicalizeBindings(), relax.transform.DeadCodeElimination()]
    return tvm.transform.Sequential(tidy)(made.builder_.get())
