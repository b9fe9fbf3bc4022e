"""FuseProjections: projections of one input become one matmul with their weights stacked along the rows.

concat(x @ w1^T, x @ w2^T)   ->   x @ w^T                        w = w1 over w2
x @ w1^T ... x @ w2^T        ->   split(x @ w^T)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import tvm
from tvm import relax

from tvm_sparse.passes.linear import Linear, bindings, match_linear, relax_functions, with_params

_CONCAT = tvm.ir.Op.get("relax.concat")
_SPLIT = tvm.ir.Op.get("relax.split")
Fusions = Mapping[str, Sequence[str]]


@tvm.transform.module_pass(opt_level=0)
class FuseProjections:
    """`fusions` maps a fused parameter's name to its sources in row order (`Layout.fusions`, or `find_fusions`).

    The fused parameter takes the place of its first source among the parameters. A fusion is done where every source
    multiplies the same input; a source with another use as well stays a parameter too.
    """

    def __init__(self, fusions: Fusions):
        self.fusions = fusions

    def transform_module(self, mod: tvm.IRModule, _: tvm.transform.PassContext) -> tvm.IRModule:
        mod = mod.clone()
        fusers = {gvar: _Fuser(mod, function, self.fusions) for gvar, function in relax_functions(mod).items()}
        for gvar, fuser in fusers.items():
            mod.update_func(gvar, fuser.rewrite())
        tidy = [relax.transform.CanonicalizeBindings(), relax.transform.DeadCodeElimination()]
        mod = tvm.transform.Sequential(tidy)(mod)
        for gvar, fuser in fusers.items():
            mod.update_func(gvar, fuser.without_sources(mod[gvar]))
        return mod


def find_fusions(mod: tvm.IRModule) -> dict[str, tuple[str, ...]]:
    """The fusions a graph allows, named after their sources: for imported graphs, which have no layout.

    Equal inputs must be one variable (`relax.transform.EliminateCommonSubexpr`). Parameters go by name: one that
    meets different company elsewhere is left alone.
    """
    found: dict[tuple[str, ...], None] = {}
    met: dict[str, set[tuple[str, ...]]] = {}
    for function in relax_functions(mod).values():
        sharing: dict[tuple, list[str]] = {}
        for linear in _linears(function).values():
            key = (linear.x, linear.shape[1], str(linear.weight.ty.dtype), linear.out_dtype)
            sharing.setdefault(key, []).append(linear.weight.name)
        for names in sharing.values():
            group = tuple(dict.fromkeys(names))
            found[group] = None
            for name in group:
                met.setdefault(name, set()).add(group)
    alone = [group for group in found if len(group) > 1 and all(met[name] == {group} for name in group)]
    return {"+".join(group): group for group in alone}


def _linears(function: relax.Function) -> dict[relax.Var, Linear]:
    bound = bindings(function)
    params = set(function.params)
    found = {var: match_linear(value, bound.get) for var, value in bound.items()}
    return {var: linear for var, linear in found.items() if linear and linear.weight in params}


@relax.expr_functor.mutator
class _Fuser(relax.PyExprMutator):
    def __init__(self, mod: tvm.IRModule, function: relax.Function, fusions: Fusions):
        super().__init__(mod)
        self.function = function
        self.place = {source: (fused, i) for fused, sources in fusions.items() for i, source in enumerate(sources)}
        by_name = {param.name: param for param in function.params}
        self.linears = _linears(function)
        present: dict[tuple, set[str]] = {}
        for linear in self.linears.values():
            if linear.weight.name in self.place:
                present.setdefault(self._key(linear), set()).add(linear.weight.name)
        self.complete = {key for key, names in present.items() if names == set(fusions[key[0]])}
        self.rows: dict[str, list[int]] = {}
        self.weights: dict[str, relax.Var] = {}
        for fused in {key[0] for key in self.complete}:
            sources = [by_name[source] for source in fusions[fused]]
            self.rows[fused] = [int(source.ty.shape[0]) for source in sources]
            shape = (sum(self.rows[fused]), sources[0].ty.shape[1])
            self.weights[fused] = relax.Var(fused, relax.TensorType(shape, sources[0].ty.dtype))
        self.parts: dict[tuple, relax.Var] = {}
        self.whole: dict[relax.Var, relax.Var] = {}

    def _key(self, linear: Linear) -> tuple:
        return self.place[linear.weight.name][0], linear.x, linear.out_dtype

    def rewrite(self) -> relax.Function:
        """The fused function, which still has all its old parameters."""
        params: list[relax.Var] = []
        for param in self.function.params:
            fused, i = self.place.get(param.name, ("", -1))
            if fused in self.weights and i == 0:
                params.append(self.weights[fused])
            params.append(param)
        return with_params(self.function, params, self.visit_expr(self.function.body))

    def without_sources(self, function: relax.Function) -> relax.Function:
        """Drops the parameters that fusing has left without a use."""
        used = set(relax.analysis.free_vars(function.body))
        kept = [p for p in function.params if p in used or self.place.get(p.name, ("",))[0] not in self.weights]
        return with_params(function, kept, function.body)

    def visit_call_(self, call: relax.Call) -> relax.Expr:
        linear = match_linear(call, self._original)
        if linear and linear.weight.name in self.place and self._key(linear) in self.complete:
            return relax.TupleGetItem(self._fused(linear), self.place[linear.weight.name][1])
        call = super().visit_call_(call)
        joined = self._joined(call) if call.op == _CONCAT else None
        return call if joined is None else joined

    def _original(self, var: relax.Var) -> relax.Expr | None:
        # The mutator may have given `var` a successor; permute_dims of a parameter reads the same either way.
        return self.lookup_binding(var)

    def _fused(self, linear: Linear) -> relax.Var:
        """The parts of the fused matmul, made where its first source stood."""
        key = self._key(linear)
        if key not in self.parts:
            fused = key[0]
            x = self.visit_expr(linear.x)
            transposed = self.builder_.emit(relax.op.permute_dims(self.weights[fused]))
            plain = linear.out_dtype == str(x.ty.dtype) == str(transposed.ty.dtype)  # else matmul must be told
            out_dtype = None if plain else linear.out_dtype
            whole = self.builder_.emit(relax.op.matmul(x, transposed, out_dtype=out_dtype))
            ends = [sum(self.rows[fused][: i + 1]) for i in range(len(self.rows[fused]) - 1)]
            parts = self.builder_.emit(relax.op.split(whole, ends, axis=-1))
            self.parts[key], self.whole[parts] = parts, whole
        return self.parts[key]

    def _joined(self, concat: relax.Call) -> relax.Var | None:
        """The fused matmul itself, where a concatenation puts all its parts together again."""
        if not isinstance(concat.args[0], relax.Tuple) or concat.attrs.axis is None:
            return None
        items = [self.lookup_binding(f) if isinstance(f, relax.Var) else f for f in concat.args[0].fields]
        if not all(isinstance(item, relax.TupleGetItem) and item.tuple_value in self.whole for item in items):
            return None
        parts = items[0].tuple_value
        in_order = [item.index for item in items] == list(range(len(parts.ty.fields)))
        last = int(concat.attrs.axis) in (-1, self.whole[parts].ty.ndim - 1)
        if not in_order or not last or any(item.tuple_value != parts for item in items):
            return None
        return self.whole[parts]
