"""Norm and rotation of queries and keys, and the caches' new rows, on a GPU: one warp a head of a token.

In a prefill a warp goes on to further heads of its token, for which the angles are the same.
"""

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
    rounds = 1 if tokens is not None else -(-jobs // (2 * WARPS))  # jobs of a warp, two CTAs a token
    turned = -(-rotary_dim // WARP)
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
        block = T.launch_thread("blockIdx.y", T.ceildiv(jobs, WARPS * rounds))
        thread = T.launch_thread("threadIdx.x", WARPS * WARP)
        lane: T.let[T.int32] = thread % WARP
        owner = T.alloc_buffer((1,), "int32", scope="local")
        at = T.alloc_buffer((1,), "int64", scope="local")
        job = T.alloc_buffer((1,), "int32", scope="local")
        column = T.alloc_buffer((1,), "int32", scope="local")
        scale = T.alloc_buffer((1,), "float32", scope="local")
        values = T.alloc_buffer((each,), "float32", scope="local")
        partner = T.alloc_buffer((1,), "float32", scope="local")
        other = T.alloc_buffer((1,), "int32", scope="local")
        angle = T.alloc_buffer((1,), "float32", scope="local")
        cosine = T.alloc_buffer((turned,), "float32", scope="local")
        sine = T.alloc_buffer((turned,), "float32", scope="local")  # of what the partner counts
        if T.bool(prefill):
            owner[0] = slot[0]
            at[0] = T.cast(position[owner[0]], "int64") + token
        else:
            owner[0] = T.cast(token, "int32")
            at[0] = T.cast(position[owner[0]], "int64")
        for i in T.unroll(turned):
            other[0] = (i * WARP + lane) % half
            # In float64, then rounded: the float32 frequency and angle of the model's definition.
            angle[0] = f32(at[0]) * f32(
                T.pow(T.float64(theta), T.cast(other[0], "float64") * T.float64(-2.0 / rotary_dim))
            )
            cosine[i] = T.cos(angle[0])
            sine[i] = T.if_then_else(i * WARP + lane < half, -T.sin(angle[0]), T.sin(angle[0]))

        for turn in range(rounds):
            job[0] = (block * rounds + turn) * WARPS + thread // WARP
            if job[0] < normed:
                column[0] = T.if_then_else(
                    job[0] < heads, job[0] * 2 * head_dim, k_column + (job[0] - heads) * head_dim
                )
                scale[0] = T.float32(0)
                for i in T.unroll(each):
                    values[i] = T.float32(0)
                    if i * WARP + lane < head_dim:
                        values[i] = f32(qkv[token, column[0] + i * WARP + lane])
                for i in T.unroll(each):
                    scale[0] += values[i] * values[i]
                scale[0] = T.rsqrt(
                    T.cuda.warp_sum(scale[0]) / T.float32(head_dim) + T.float32(eps)
                )
                for i in T.unroll(each):
                    if i * WARP + lane < head_dim:
                        values[i] = (
                            values[i]
                            * scale[0]
                            * T.if_then_else(
                                job[0] < heads, q_norm[i * WARP + lane], k_norm[i * WARP + lane]
                            )
                        )
                        if i * WARP + lane < rotary_dim:
                            other[0] = T.if_then_else(
                                i * WARP + lane < half, i * WARP + lane + half, i * WARP + lane - half
                            )
                            partner[0] = (
                                f32(qkv[token, column[0] + other[0]])
                                * scale[0]
                                * T.if_then_else(job[0] < heads, q_norm[other[0]], k_norm[other[0]])
                            )
                            values[i] = values[i] * cosine[i] + partner[0] * sine[i]
                        if job[0] < heads:
                            q[token, job[0] * head_dim + i * WARP + lane] = values[i]
                        if job[0] >= heads and at[0] < context:
                            k_cache[owner[0], job[0] - heads, at[0], i * WARP + lane] = T.cast(
                                values[i], dtype
                            )
            if job[0] >= normed and job[0] < jobs and at[0] < context:
                for i in T.unroll(each):
                    if i * WARP + lane < head_dim:
                        v_cache[owner[0], job[0] - normed, at[0], i * WARP + lane] = qkv[
                            token, k_column + (job[0] - heads) * head_dim + i * WARP + lane
                        ]

    return rope_append
