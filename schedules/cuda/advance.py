"""Moves the positions on after a call, on a GPU."""

from __future__ import annotations

import tvm
from tvm.script import tirx as T

from tvm_sparse.schedules.cuda.dependent_launch import dependent, start_dependents, wait_for_inputs
from tvm_sparse.schedules.cuda.device_code import token_dim


def advance(
    tokens: int | None, batch: int, result_shape: tuple[int | None, ...]
) -> tvm.tirx.PrimFunc:
    """See schedules/ops.py."""
    n = token_dim(tokens)
    shape = tuple(n if extent is None else extent for extent in result_shape)
    threads = 1 if tokens is None else tokens

    if tokens is None:

        @T.prim_func(s_tir=True)
        def advance(
            ids: T.Buffer((n,), "int32"),
            slot: T.Buffer((1,), "int32"),
            position: T.Buffer((batch,), "int32"),
            result: T.Buffer(shape, "float32"),
        ):
            block = T.launch_thread("blockIdx.x", 1)
            thread = T.launch_thread("threadIdx.x", 1)
            start_dependents()
            wait_for_inputs()
            position[slot[0]] = position[slot[0]] + T.cast(n, "int32")

        return dependent(advance)

    @T.prim_func(s_tir=True)
    def advance_each(
        ids: T.Buffer((n,), "int32"),
        slot: T.Buffer((1,), "int32"),
        position: T.Buffer((batch,), "int32"),
        result: T.Buffer(shape, "float32"),
    ):
        sequence = T.launch_thread("blockIdx.x", threads)
        thread = T.launch_thread("threadIdx.x", 1)
        start_dependents()
        wait_for_inputs()
        position[sequence] = position[sequence] + 1

    return dependent(advance_each)
