"""embedding: one row of a table for each token."""

from __future__ import annotations

from tvm.script import tirx as T

from tvm_sparse.schedules.cpu.vector import count, lanes, over_tokens


def embedding(tokens: int | None, vocab: int, hidden: int, table_dtype: str, dtype: str):
    n, width, each_token = count(tokens), lanes(hidden), over_tokens(tokens)

    @T.prim_func(s_tir=True)
    def kernel(ids_: T.handle, table_: T.handle, y_: T.handle):
        ids = T.match_buffer(ids_, (n,), "int32")
        table = T.match_buffer(table_, (vocab, hidden), table_dtype)
        y = T.match_buffer(y_, (n, hidden), dtype)
        for t in each_token(n):
            for block in T.serial(hidden // width):
                for v in T.vectorized(width):
                    y[t, block * width + v] = T.Cast(dtype, table[ids[t], block * width + v])

    return kernel
