"""A kernel before its schedule: the sketch that lowering leaves, and the space MetaSchedule searches.

A hand-written kernel cannot be rescheduled by primitives, so its space is a function of `sample_categorical` and
`annotate` on the sketch's one block. A trace of those, found by tuning or read from a record, replays on the same
sketch; the annotations it leaves are the decisions the kernel's template is instantiated with. One space serves the
default schedule, tuning and replay.
"""

from __future__ import annotations

import tvm
from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from tvm_sparse.schedules.cpu.signature import arguments
from tvm_sparse.schedules.spec import KernelSpec
from tvm_sparse.schedules.table import SPEC_ATTR, space

BLOCK = "kernel"


def sketch(spec: KernelSpec) -> tirx.PrimFunc:
    """The kernel's arguments around an empty block: what LowerSparseMatmul leaves for ApplySchedules."""
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("main")
        _, _, y = arguments(spec, tirx.Var("m", "int64") if spec.m is None else spec.m)
        _empty_block(y, [0, 0])
    attrs = {"op_pattern": 8, "tirx.noalias": True, SPEC_ATTR: spec.to_json()}
    return builder.get().without_attr("global_symbol").with_attr(attrs)


def is_sketch(function: tirx.PrimFunc) -> bool:
    attrs = function.attrs or {}
    return SPEC_ATTR in attrs and "tirx.is_scheduled" not in attrs


def workload(spec: KernelSpec) -> tvm.IRModule:
    """What a tuning record belongs to: the spec on a sketch without any dimension that the weights decide.

    MetaSchedule refuses symbolic shapes, and one record serves every matrix of the spec's shape and format.
    """
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("main")
        y = T.arg("y", T.buffer((spec.n,), spec.out_dtype))
        _empty_block(y, [0])
    attrs = {"global_symbol": "main", "tirx.noalias": True, SPEC_ATTR: spec.to_json()}
    return tvm.IRModule({"main": builder.get().with_attr(attrs)})


def schedule_space(sch: tvm.s_tir.Schedule) -> None:
    """The schedule function: one categorical choice for each decision, noted on the block."""
    spec = KernelSpec.from_json(sch.mod["main"].attrs[SPEC_ATTR])
    block = sch.get_sblock(BLOCK)
    for decision in space(spec):
        chances = [1.0 / len(decision.choices)] * len(decision.choices)
        sch.annotate(block, decision.name, sch.sample_categorical(list(decision.choices), chances))


def annotated_decisions(mod: tvm.IRModule) -> tuple[KernelSpec, dict[str, int]]:
    """What a scheduled `workload` is: its spec and the decisions on its block, of whatever version of the kernel."""
    schedule = tvm.s_tir.Schedule(mod)
    annotations = schedule.get(schedule.get_sblock(BLOCK)).annotations
    spec = KernelSpec.from_json(mod["main"].attrs[SPEC_ATTR])
    return spec, {str(name): int(value) for name, value in annotations.items()}


def _empty_block(y: tirx.Buffer, at: list[int]) -> None:
    with T.sblock(BLOCK):
        T.reads([])
        T.writes([])
        T.buffer_store(y, T.cast(0, y.dtype), at)
