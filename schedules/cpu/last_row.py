"""last_row: the row of the last token, all that the head of a prefill needs."""

from __future__ import annotations

from tvm.script import tirx as T

from tvm_sparse.schedules.cpu.vector import lanes, symbolic


def last_row(hidden: int, dtype: str):
    n, width = symbolic("n"), lanes(hidden)

    @T.prim_func(s_tir=True)
    def kernel(x_: T.handle, y_: T.handle):
        x = T.match_buffer(x_, (n, hidden), dtype)
        y = T.match_buffer(y_, (1, hidden), dtype)
        for block in T.serial(hidden // width):
            for v in T.vectorized(width):
                y[0, block * width + v] = x[n - 1, block * width + v]

    return kernel
