"""advance: count the tokens that a call has put into the caches."""

from __future__ import annotations

from tvm.script import tirx as T

from tvm_sparse.schedules.cpu.vector import count


def advance(tokens: int | None, batch: int, result_shape: tuple[int | None, ...]):
    n = count(tokens)
    shape = tuple(n if extent is None else extent for extent in result_shape)

    @T.prim_func(s_tir=True)
    def counted(ids_: T.handle, slot_: T.handle, position_: T.handle, result_: T.handle):
        ids = T.match_buffer(ids_, (n,), "int32")
        slot = T.match_buffer(slot_, (1,), "int32")
        position = T.match_buffer(position_, (batch,), "int32")
        result = T.match_buffer(result_, shape, "float32")
        if tokens is None:
            position[slot[0]] += T.Cast("int32", n)
        else:
            for i in T.serial(batch):
                position[i] += 1

    return counted
