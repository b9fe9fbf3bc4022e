"""The gate of the MLP on a GPU: one thread an element, or eight where rows allow."""

from __future__ import annotations

import tvm
from tvm.script import tirx as T

from tvm_sparse.schedules.cuda.dependent_launch import dependent, read, read_quad, start_dependents, wait_for_inputs
from tvm_sparse.schedules.cuda.device_code import f32, silu, token_dim

THREADS = 64


def silu_mul(tokens: int | None, inner: int, dtype: str) -> tvm.tirx.PrimFunc:
    """See schedules/ops.py."""
    n = token_dim(tokens)
    run = 8 if dtype == "bfloat16" and inner % 8 == 0 else 1

    @T.prim_func(s_tir=True)
    def silu_mul(gate_up: T.Buffer((n, 2 * inner), dtype), y: T.Buffer((n, inner), dtype)):
        token = T.launch_thread("blockIdx.x", n)
        block = T.launch_thread("blockIdx.y", T.ceildiv(inner, THREADS * run))
        thread = T.launch_thread("threadIdx.x", THREADS)
        gate = T.alloc_buffer((run,), dtype, scope="local")
        up = T.alloc_buffer((run,), dtype, scope="local")
        start_dependents()
        wait_for_inputs()
        if (block * THREADS + thread) * run < inner:
            if T.bool(run == 8):
                read_quad(gate_up[token, (block * THREADS + thread) * run], gate[0])
                read_quad(gate_up[token, inner + (block * THREADS + thread) * run], up[0])
            else:
                gate[0] = T.cast(read(gate_up[token, block * THREADS + thread]), dtype)
                up[0] = T.cast(read(gate_up[token, inner + block * THREADS + thread]), dtype)
            for v in T.unroll(run):
                up[v] = T.cast(silu(f32(gate[v])) * f32(up[v]), dtype)
            for v in T.vectorized(run):
                y[token, (block * THREADS + thread) * run + v] = up[v]

    return dependent(silu_mul)
