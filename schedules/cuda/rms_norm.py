"""RMS normalisation, with and without the residual sum before it, on a GPU: one CTA a row, the row in registers."""

from __future__ import annotations

import tvm
from tvm.script import tirx as T

from tvm_sparse.schedules.cuda.device_code import WARP, block_sum, f32, token_dim

_MOST_THREADS = 512


def _threads(hidden: int) -> int:
    return min(_MOST_THREADS, -(-hidden // WARP) * WARP)


def rms_norm(tokens: int | None, hidden: int, eps: float, dtype: str) -> tvm.tirx.PrimFunc:
    """See schedules/ops.py."""
    n = token_dim(tokens)
    threads = _threads(hidden)
    each = -(-hidden // threads)

    @T.prim_func(s_tir=True)
    def rms_norm(
        x: T.Buffer((n, hidden), dtype),
        w: T.Buffer((hidden,), "float32"),
        y: T.Buffer((n, hidden), dtype),
    ):
        row = T.launch_thread("blockIdx.x", n)
        thread = T.launch_thread("threadIdx.x", threads)
        values = T.alloc_buffer((each,), "float32", scope="local")
        squares = T.alloc_buffer((1,), "float32", scope="local")
        squares[0] = T.float32(0)
        for i in T.unroll(each):
            values[i] = T.float32(0)
            if i * threads + thread < hidden:
                values[i] = f32(x[row, i * threads + thread])
            squares[0] += values[i] * values[i]
        squares[0] = T.rsqrt(block_sum(squares[0]) / T.float32(hidden) + T.float32(eps))
        for i in T.unroll(each):
            if i * threads + thread < hidden:
                y[row, i * threads + thread] = T.cast(
                    values[i] * squares[0] * w[i * threads + thread], dtype
                )

    return rms_norm


def add_rms_norm(tokens: int | None, hidden: int, eps: float, dtype: str) -> tvm.tirx.PrimFunc:
    """See schedules/ops.py."""
    n = token_dim(tokens)
    threads = _threads(hidden)
    each = -(-hidden // threads)

    @T.prim_func(s_tir=True)
    def add_rms_norm(
        x: T.Buffer((n, hidden), dtype),
        delta: T.Buffer((n, hidden), dtype),
        w: T.Buffer((hidden,), "float32"),
        total: T.Buffer((n, hidden), dtype),
        y: T.Buffer((n, hidden), dtype),
    ):
        row = T.launch_thread("blockIdx.x", n)
        thread = T.launch_thread("threadIdx.x", threads)
        rounded = T.alloc_buffer((each,), dtype, scope="local")
        squares = T.alloc_buffer((1,), "float32", scope="local")
        squares[0] = T.float32(0)
        for i in T.unroll(each):
            if i * threads + thread < hidden:
                rounded[i] = T.cast(
                    f32(x[row, i * threads + thread]) + f32(delta[row, i * threads + thread]), dtype
                )
                total[row, i * threads + thread] = rounded[i]
                squares[0] += f32(rounded[i]) * f32(rounded[i])
        squares[0] = T.rsqrt(block_sum(squares[0]) / T.float32(hidden) + T.float32(eps))
        for i in T.unroll(each):
            if i * threads + thread < hidden:
                y[row, i * threads + thread] = T.cast(
                    f32(rounded[i]) * squares[0] * w[i * threads + thread], dtype
                )

    return add_rms_norm
