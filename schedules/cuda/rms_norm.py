"""RMS normalisation, with and without the residual sum before it, on a GPU: one CTA a row, the row in registers.

A thread holds runs of neighbouring elements, 16 bytes each where the row allows; its weights come before the wait.
"""

from __future__ import annotations

import tvm
from tvm.script import tirx as T

from tvm_sparse.schedules.cuda.dependent_launch import dependent, read, read_quad, start_dependents, wait_for_inputs
from tvm_sparse.schedules.cuda.device_code import WARP, block_sum, f32, token_dim

_MOST_THREADS = 1024


def _shares(hidden: int, dtype: str) -> tuple[int, int, int]:
    """Elements side by side in a run, threads of a CTA, runs a thread."""
    run = 8 if dtype == "bfloat16" and hidden % 8 == 0 else 1
    runs = hidden // run
    threads = min(_MOST_THREADS, -(-runs // WARP) * WARP)
    return run, threads, -(-runs // threads)


def rms_norm(tokens: int | None, hidden: int, eps: float, dtype: str) -> tvm.tirx.PrimFunc:
    """See schedules/ops.py."""
    n = token_dim(tokens)
    run, threads, each = _shares(hidden, dtype)

    @T.prim_func(s_tir=True)
    def rms_norm(
        x: T.Buffer((n, hidden), dtype),
        w: T.Buffer((hidden,), "float32"),
        y: T.Buffer((n, hidden), dtype),
    ):
        row = T.launch_thread("blockIdx.x", n)
        thread = T.launch_thread("threadIdx.x", threads)
        values = T.alloc_buffer((each * run,), dtype, scope="local")
        weight = T.alloc_buffer((each * run,), "float32", scope="local")
        squares = T.alloc_buffer((1,), "float32", scope="local")
        start_dependents()
        for i in T.unroll(each):
            if (i * threads + thread) * run < hidden:
                if T.bool(run == 8):
                    read_quad(w[(i * threads + thread) * run], weight[i * run])
                    read_quad(w[(i * threads + thread) * run + 4], weight[i * run + 4])
                else:
                    weight[i] = read(w[i * threads + thread])
        wait_for_inputs()
        squares[0] = T.float32(0)
        for i in T.unroll(each):
            if (i * threads + thread) * run < hidden:
                if T.bool(run == 8):
                    read_quad(x[row, (i * threads + thread) * run], values[i * run])
                else:
                    values[i] = T.cast(read(x[row, i * threads + thread]), dtype)
                for v in T.unroll(run):
                    squares[0] += f32(values[i * run + v]) * f32(values[i * run + v])
        squares[0] = T.rsqrt(block_sum(squares[0]) / T.float32(hidden) + T.float32(eps))
        for i in T.unroll(each):
            if (i * threads + thread) * run < hidden:
                for v in T.unroll(run):
                    values[i * run + v] = T.cast(
                        f32(values[i * run + v]) * squares[0] * weight[i * run + v], dtype
                    )
                for v in T.vectorized(run):
                    y[row, (i * threads + thread) * run + v] = values[i * run + v]

    return dependent(rms_norm)


def add_rms_norm(tokens: int | None, hidden: int, eps: float, dtype: str) -> tvm.tirx.PrimFunc:
    """See schedules/ops.py."""
    n = token_dim(tokens)
    run, threads, each = _shares(hidden, dtype)

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
        values = T.alloc_buffer((each * run,), dtype, scope="local")
        added = T.alloc_buffer((each * run,), dtype, scope="local")
        weight = T.alloc_buffer((each * run,), "float32", scope="local")
        squares = T.alloc_buffer((1,), "float32", scope="local")
        start_dependents()
        for i in T.unroll(each):
            if (i * threads + thread) * run < hidden:
                if T.bool(run == 8):
                    read_quad(w[(i * threads + thread) * run], weight[i * run])
                    read_quad(w[(i * threads + thread) * run + 4], weight[i * run + 4])
                else:
                    weight[i] = read(w[i * threads + thread])
        wait_for_inputs()
        squares[0] = T.float32(0)
        for i in T.unroll(each):
            if (i * threads + thread) * run < hidden:
                if T.bool(run == 8):
                    read_quad(x[row, (i * threads + thread) * run], values[i * run])
                    read_quad(delta[row, (i * threads + thread) * run], added[i * run])
                else:
                    values[i] = T.cast(read(x[row, i * threads + thread]), dtype)
                    added[i] = T.cast(read(delta[row, i * threads + thread]), dtype)
                for v in T.unroll(run):
                    values[i * run + v] = T.cast(
                        f32(values[i * run + v]) + f32(added[i * run + v]), dtype
                    )
                    squares[0] += f32(values[i * run + v]) * f32(values[i * run + v])
                for v in T.vectorized(run):
                    total[row, (i * threads + thread) * run + v] = values[i * run + v]
        squares[0] = T.rsqrt(block_sum(squares[0]) / T.float32(hidden) + T.float32(eps))
        for i in T.unroll(each):
            if (i * threads + thread) * run < hidden:
                for v in T.unroll(run):
                    values[i * run + v] = T.cast(
                        f32(values[i * run + v]) * squares[0] * weight[i * run + v], dtype
                    )
                for v in T.vectorized(run):
                    y[row, (i * threads + thread) * run + v] = values[i * run + v]

    return dependent(add_rms_norm)
