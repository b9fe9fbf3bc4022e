"""The last token's row, on a GPU: one thread an element."""

from __future__ import annotations

import tvm
from tvm.script import tirx as T

from tvm_sparse.schedules.cuda.device_code import token_dim

THREADS = 256


def last_row(hidden: int, dtype: str) -> tvm.tirx.PrimFunc:
    """See schedules/ops.py."""
    n = token_dim(None)

    @T.prim_func(s_tir=True)
    def last_row(x: T.Buffer((n, hidden), dtype), y: T.Buffer((1, hidden), dtype)):
        block = T.launch_thread("blockIdx.x", T.ceildiv(hidden, THREADS))
        thread = T.launch_thread("threadIdx.x", THREADS)
        if block * THREADS + thread < hidden:
            y[0, block * THREADS + thread] = x[n - 1, block * THREADS + thread]

    return last_row
