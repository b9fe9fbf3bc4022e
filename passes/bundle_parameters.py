"""BundleParameters: a function's state and weights become two tuples, the last step before code generation.

Passes see every parameter by name; whoever calls the library passes two tuples instead of a thousand tensors.
"""

from __future__ import annotations

import tvm
from tvm import relax

NUM_STATE_ATTR = "tvm_sparse.num_state"
"""How many parameters before the weights are state; `num_input` counts inputs and state together."""


@tvm.transform.module_pass(opt_level=0)
class BundleParameters:
    """f(inputs..., state..., weights...) -> f(inputs..., state: Tuple, params: Tuple), order kept.

    Looks at functions with the attributes `num_input` (inputs and state together) and `tvm_sparse.num_state`.
    """

    def transform_module(self, mod: tvm.IRModule, _: tvm.transform.PassContext) -> tvm.IRModule:
        changed = {}
        for name, function in mod.functions_items():
            if isinstance(function, relax.Function) and NUM_STATE_ATTR in (function.attrs or {}):
                changed[name] = _bundle(function)
        for name, function in changed.items():
            mod.update_func(name, function)
        return mod


def _bundle(function: relax.Function) -> relax.Function:
    leading = int(function.attrs["num_input"])
    inputs = leading - int(function.attrs[NUM_STATE_ATTR])
    bundles = {
        "state": function.params[inputs:leading],
        "params": function.params[leading:],
    }
    opened, tuples, builder = [], [], relax.BlockBuilder()
    for name, members in bundles.items():
        bundle = relax.Var(name, relax.TupleType([member.ty for member in members]))
        tuples.append(bundle)
        # the members' own variables stay: the body needs no change
        items = [builder.normalize(relax.TupleGetItem(bundle, i)) for i in range(len(members))]
        opened += [relax.VarBinding(member, item) for member, item in zip(members, items, strict=True)]
    body = builder.normalize(relax.SeqExpr([relax.BindingBlock(opened), *function.body.blocks], function.body.body))
    attrs = {key: value for key, value in function.attrs.items() if key != NUM_STATE_ATTR}
    return relax.Function(
        [*function.params[:inputs], *tuples],
        body,
        function.ret_ty,
        function.is_pure,
        tvm.ir.make_node("ir.DictAttrs", **{**attrs, "num_input": inputs}),
        function.span,
    )
