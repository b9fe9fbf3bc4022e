"""The gate of the MLP on a GPU: one thread an element."""

from __future__ import annotations

import tvm
from tvm.script import tirx as T

from tvm_sparse.schedules.cuda.device_code import f32, silu, token_dim

THREADS = 256


def silu_mul(tokens: int | None, inner: int, dtype: str) -> tvm.tirx.PrimFunc:
    """See schedules/ops.py."""
    n = token_dim(tokens)

    @T.prim_func(s_tir=True)
    def silu_mul(gate_up: T.Buffer((n, 2 * inner), dtype), y: T.Buffer((n, inner), dtype)):
        token = T.launch_thread("blockIdx.x", n)
        block = T.launch_thread("blockIdx.y", T.ceildiv(inner, THREADS))
        thread = T.launch_thread("threadIdx.x", THREADS)
        if block * THREADS + thread < inner:
            y[token, block * THREADS + thread] = T.cast(
                silu(f32(gate_up[token, block * THREADS + thread]))
                * f32(gate_up[token, inner + block * THREADS + thread]),
                dtype,
            )

    return silu_mul
