"""Norm and rotation of queries and keys, and the caches' new rows, on a GPU: one warp a head of a token."""

from __future__ import annotations

import tvm
from tvm.script import tirx as T

from tvm_sparse.schedules.cuda.device_code import WARP, f32, symbol, token_dim

WARPS = 4


def rope_append(
    tokens: int | None,
    batch: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    rotary_dim: int,
    theta: float,
    eps: float,
    dtype: str,
) -> tvm.tirx.PrimFunc:
    """See schedules/ops.py."""
    n = token_dim(tokens)
    prefill = tokens is None
    row_length, context = symbol("row_length"), symbol("context")
    each = -(-head_dim // WARP)
    half = rotary_dim // 2
    normed = heads + kv_heads  # warps after these copy v
    jobs = normed + kv_heads
    k_column = 2 * heads * head_dim

    @T.prim_func(s_tir=True)
    def rope_append(
        qkv: T.Buffer((n, row_length), dtype),
        q_norm: T.Buffer((head_dim,), "float32"),
        k_norm: T.Buffer((head_dim,), "float32"),
        slot: T.Buffer((1,), "int32"),
        position: T.Buffer((batch,), "int32"),
        k_cache: T.Buffer((batch, kv_heads, context, head_dim), dtype),
        v_cache: T.Buffer((batch, kv_heads, context, head_dim), dtype),
        q: T.Buffer((n, heads * head_dim), "float32"),
    ):
        token = T.launch_thread("blockIdx.x", n)
        block = T.launch_thread("blockIdx.y", T.ceildiv(jobs, WARPS))
        thread = T.launch_thread("threadIdx.x", WARPS * WARP)
        job: T.let[T.int32] = block * WARPS + thread // WARP
        lane: T.let[T.int32] = thread % WARP
        owner = T.alloc_buffer((1,), "int32", scope="local")
        at = T.alloc_buffer((1,), "int64", scope="local")
        column = T.alloc_buffer((1,), "int32", scope="local")
        scale = T.alloc_buffer((1,), "float32", scope="local")
        value = T.alloc_buffer((1,), "float32", scope="local")
        partner = T.alloc_buffer((1,), "float32", scope="local")
        other = T.alloc_buffer((1,), "int32", scope="local")
        angle = T.alloc_buffer((1,), "float32", scope="local")
        if T.bool(prefill):
            owner[0] = slot[0]
            at[0] = T.cast(position[owner[0]], "int64") + token
        else:
            owner[0] = T.cast(token, "int32")
            at[0] = T.cast(position[owner[0]], "int64")

        if job < normed:
            column[0] = T.if_then_else(
                job < heads, job * 2 * head_dim, k_column + (job - heads) * head_dim
            )
            scale[0] = T.float32(0)
            for i in T.unroll(each):
                if i * WARP + lane < head_dim:
                    value[0] = f32(qkv[token, column[0] + i * WARP + lane])
                    scale[0] += value[0] * value[0]
            scale[0] = T.rsqrt(
                T.cuda.warp_sum(scale[0]) / T.float32(head_dim) + T.float32(eps)
            )
            for i in T.unroll(each):
                if i * WARP + lane < head_dim:
                    value[0] = (
                        f32(qkv[token, column[0] + i * WARP + lane])
                        * scale[0]
                        * T.if_then_else(
                            job < heads, q_norm[i * WARP + lane], k_norm[i * WARP + lane]
                        )
                    )
                    if i * WARP + lane < rotary_dim:
                        other[0] = T.if_then_else(
                            i * WARP + lane < half, i * WARP + lane + half, i * WARP + lane - half
                        )
                        partner[0] = (
                            f32(qkv[token, column[0] + other[0]])
                            * scale[0]
                            * T.if_then_else(job < heads, q_norm[other[0]], k_norm[other[0]])
                        )
                        if i * WARP + lane < half:
                            partner[0] = -partner[0]
                            other[0] = i * WARP + lane
                        # In float64, then rounded: the float32 frequency and angle of the model's definition.
                        angle[0] = f32(at[0]) * f32(
                            T.pow(
                                T.float64(theta),
                                T.cast(other[0], "float64") * T.float64(-2.0 / rotary_dim),
                            )
                        )
                        value[0] = value[0] * T.cos(angle[0]) + partner[0] * T.sin(angle[0])
                    if job < heads:
                        q[token, job * head_dim + i * WARP + lane] = value[0]
                    if job >= heads and at[0] < context:
                        k_cache[owner[0], job - heads, at[0], i * WARP + lane] = T.cast(
                            value[0], dtype
                        )
        if job >= normed and job < jobs and at[0] < context:
            for i in T.unroll(each):
                if i * WARP + lane < head_dim:
                    v_cache[owner[0], job - normed, at[0], i * WARP + lane] = qkv[
                        token, k_column + (job - heads) * head_dim + i * WARP + lane
                    ]

    return rope_append
