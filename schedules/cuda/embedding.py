"""Rows of the embedding table, on a GPU: one CTA a token.

The first kernel of a step, launched in the ordinary way: see dependent_launch.py.
"""

from __future__ import annotations

import tvm
from tvm.script import tirx as T

from tvm_sparse.schedules.cuda.dependent_launch import start_dependents
from tvm_sparse.schedules.cuda.device_code import token_dim

THREADS = 256


def embedding(
    tokens: int | None, vocab: int, hidden: int, table_dtype: str, dtype: str
) -> tvm.tirx.PrimFunc:
    """See schedules/ops.py."""
    n = token_dim(tokens)

    @T.prim_func(s_tir=True)
    def embedding(
        ids: T.Buffer((n,), "int32"),
        table: T.Buffer((vocab, hidden), table_dtype),
        y: T.Buffer((n, hidden), dtype),
    ):
        token = T.launch_thread("blockIdx.x", n)
        thread = T.launch_thread("threadIdx.x", THREADS)
        start_dependents()
        for step in T.unroll(T.ceildiv(hidden, THREADS)):
            if step * THREADS + thread < hidden:
                y[token, step * THREADS + thread] = T.cast(
                    table[ids[token], step * THREADS + thread], dtype
                )

    return embedding
