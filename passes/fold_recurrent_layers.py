"""FoldRecurrentLayers: executed layers come to use the weights that the layer schedule gives them.

    f(x, state.0, state.1, layers.0.w, layers.1.w)   ->   f(x, state.0, state.1, layers.0.w)        schedule (0, 0)

The model is imported dense, at the depth that is executed, every executed layer with weights of its own; which of them
are one and the same is decided here. Caches and states stay one for each executed layer. Importing at another depth
than the checkpoint's costs nothing, since a dense graph holds no weights; cutting layers out of a graph, or copying
them, would mean to cut operations that span two layers: the sum at one layer's end is one kernel with the norm at the
next one's beginning.
"""

from __future__ import annotations

from collections.abc import Callable

import tvm
import tvm_ffi
from tvm import relax

from tvm_sparse.errors import Refusal
from tvm_sparse.passes.linear import relax_functions, with_params


@tvm.transform.module_pass(opt_level=0)
class FoldRecurrentLayers:
    """`stored_name` maps a parameter's name to that of the weights it uses (`Layout.stored_name`).

    Of the parameters with the same weights the first stays, under the weights' name; all uses become its uses. Raises
    Refusal where two of them differ in shape or dtype: layers of different kinds are never one.
    """

    def __init__(self, stored_name: Callable[[str], str]):
        self.stored_name = stored_name

    def transform_module(self, mod: tvm.IRModule, _: tvm.transform.PassContext) -> tvm.IRModule:
        mod = mod.clone()
        for gvar, function in relax_functions(mod).items():
            mod.update_func(gvar, self._fold(function))
        return mod

    def _fold(self, function: relax.Function) -> relax.Function:
        first = int((function.attrs or {}).get("num_input", 0))  # inputs and state before the weights keep their names
        kept: dict[str, relax.Var] = {}
        uses: dict[relax.Var, relax.Var] = {}
        for param in function.params[first:]:
            name = self.stored_name(param.name)
            weights = kept.setdefault(name, relax.Var(name, param.ty))
            if not tvm_ffi.structural_equal(weights.ty, param.ty):
                raise Refusal(f"{param.name} cannot use the weights {name}: they are {weights.ty}, not {param.ty}")
            uses[param] = weights
        body = _Replaced(uses).visit_expr(function.body)
        return with_params(function, [*function.params[:first], *kept.values()], body)


@relax.expr_functor.mutator
class _Replaced(relax.PyExprMutator):
    """Puts one variable in another's place wherever it is read."""

    def __init__(self, uses: dict[relax.Var, relax.Var]):
        super().__init__()
        self.uses = uses

    def visit_var_(self, var: relax.Var) -> relax.Expr:
        return self.uses[var] if var in self.uses else super().visit_var_(var)
