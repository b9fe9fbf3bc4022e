"""What the passes look for: matmul(x, permute_dims(w)), a linear layer on a parameter of the function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import tvm
from tvm import relax

_MATMUL = tvm.ir.Op.get("relax.matmul")
_PERMUTE = tvm.ir.Op.get("relax.permute_dims")


@dataclass(frozen=True)
class Linear:
    """y = x @ weight^T with weight [N, K] a parameter; `out_dtype` is that of y."""

    x: relax.Expr
    weight: relax.Var
    out_dtype: str

    @property
    def shape(self) -> tuple[int, int]:
        n, k = (int(dim) for dim in self.weight.ty.shape)
        return n, k


def match_linear(call: relax.Expr, lookup: Callable[[relax.Var], relax.Expr | None]) -> Linear | None:
    """The linear layer that `call` computes, if it is one; `lookup` gives a variable's bound expression."""
    if not isinstance(call, relax.Call) or call.op != _MATMUL:
        return None
    transposed = call.args[1]
    if isinstance(transposed, relax.Var):
        transposed = lookup(transposed)
    if not isinstance(transposed, relax.Call) or transposed.op != _PERMUTE:
        return None
    weight = transposed.args[0]
    axes = transposed.attrs.axes
    if not isinstance(weight, relax.Var) or (axes is not None and [int(a) for a in axes] != [1, 0]):
        return None
    if weight.ty.ndim != 2 or not all(isinstance(dim, tvm.tirx.IntImm) for dim in weight.ty.shape):
        return None
    out_dtype = str(call.attrs.out_dtype or "")
    return Linear(call.args[0], weight, out_dtype if out_dtype not in ("", "void") else str(call.args[0].ty.dtype))


def bindings(function: relax.Function) -> dict[relax.Var, relax.Expr]:
    """Every variable the body binds, with its expression, in order."""
    return {
        binding.var: binding.value
        for block in function.body.blocks
        for binding in block.bindings
        if isinstance(binding, relax.VarBinding)
    }


def relax_functions(mod: tvm.IRModule) -> dict[tvm.ir.GlobalVar, relax.Function]:
    return {gvar: f for gvar, f in mod.functions_items() if isinstance(f, relax.Function)}


def with_params(function: relax.Function, params: list[relax.Var], body: relax.Expr) -> relax.Function:
    """The function with other parameters and body, attributes kept."""
    return relax.Function(params, body, function.ret_ty, function.is_pure, function.attrs, function.span)
