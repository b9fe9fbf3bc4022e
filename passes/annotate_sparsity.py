"""AnnotateSparsity: notes on each function the format of every parameter the plan names."""

from __future__ import annotations

import json
from collections.abc import Mapping

import tvm
from tvm import relax

from tvm_sparse.errors import Refusal
from tvm_sparse.formats.base import FormatChoice
from tvm_sparse.passes.linear import relax_functions
from tvm_sparse.plan import PlanEntry

FORMATS_ATTR = "tvm_sparse.formats"


@tvm.transform.module_pass(opt_level=0)
class AnnotateSparsity:
    """`plan` maps parameter names to entries with a `choice` and a `shape`.

    Raises Refusal for a parameter that no function has, and for one whose shape is another.
    """

    def __init__(self, plan: Mapping[str, PlanEntry]):
        self.plan = plan

    def transform_module(self, mod: tvm.IRModule, _: tvm.transform.PassContext) -> tvm.IRModule:
        mod = mod.clone()
        missing = dict(self.plan)
        for gvar, function in relax_functions(mod).items():
            here = {param.name: self.plan[param.name] for param in function.params if param.name in self.plan}
            for param in function.params:
                if param.name in here:
                    _check_shape(param, here[param.name])
                    missing.pop(param.name, None)
            if here:
                mod.update_func(gvar, function.with_attr(FORMATS_ATTR, _write(here)))
        if missing:
            raise Refusal(f"the plan names parameters the model does not have: {', '.join(missing)}")
        return mod


def _check_shape(param: relax.Var, entry: PlanEntry) -> None:
    shape = tuple(int(dim) for dim in param.ty.shape)
    if shape != tuple(entry.shape):
        raise Refusal(f"{param.name}: the plan says {list(entry.shape)}, the model has {list(shape)}")


def _write(entries: Mapping[str, PlanEntry]) -> str:
    return json.dumps({name: [e.choice.name, [list(o) for o in e.choice.options]] for name, e in entries.items()})


def annotated_formats(function: relax.Function) -> dict[str, FormatChoice]:
    """The formats noted on a function, by parameter: {} where there are none."""
    noted = (function.attrs or {}).get(FORMATS_ATTR)
    if noted is None:
        return {}
    read = json.loads(str(noted))
    return {name: FormatChoice(fmt, tuple((key, value) for key, value in opts)) for name, (fmt, opts) in read.items()}
