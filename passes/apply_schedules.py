"""ApplySchedules: every kernel's sketch becomes the kernel, by its tuning record or by the default schedule."""

from __future__ import annotations

import tvm

from tvm_sparse.schedules.records import Records
from tvm_sparse.schedules.space import is_sketch
from tvm_sparse.schedules.spec import KernelSpec
from tvm_sparse.schedules.table import SPEC_ATTR, instantiate, write_decisions


@tvm.transform.module_pass(opt_level=0)
class ApplySchedules:
    """`records` are the tuning records that serve a machine, or None: defaults everywhere.

    A CPU kernel notes the decisions for every instruction set, since its library holds all of them; the function in
    the module is the one that runs on any x86-64.
    """

    def __init__(self, records: Records | None = None):
        self.records = records

    def transform_module(self, mod: tvm.IRModule, _: tvm.transform.PassContext) -> tvm.IRModule:
        mod = mod.clone()
        for gvar, function in mod.functions_items():
            if isinstance(function, tvm.tirx.PrimFunc) and is_sketch(function):
                kernel = self._schedule(KernelSpec.from_json(function.attrs[SPEC_ATTR]))
                if symbol := function.attrs.get("global_symbol"):  # host code calls it by this name
                    kernel = kernel.with_attr("global_symbol", symbol)
                mod.update_func(gvar, kernel)
        return mod

    def _schedule(self, spec: KernelSpec) -> tvm.tirx.PrimFunc:
        tuned = self.records.tuned(spec) if self.records is not None else {}
        return write_decisions(instantiate(spec, tuned.get(spec.arch)), tuned)
