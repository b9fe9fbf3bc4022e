"""Softmax attention over the caches, on a GPU: one CTA a head of a token, its warps share the context.

A warp takes four positions at a time; a lane holds the same few neighbouring dimensions of the query, of the running
sum of values and, as they pass, of keys. Each warp keeps a maximum, a sum of weights and a sum of weighted values
(online softmax, Milakov and Gimelshein 2018, arXiv:1805.02867); the CTA joins its warps at the end in their order.
"""

from __future__ import annotations

import math

import tvm
from tvm.script import tirx as T

from tvm_sparse.schedules.cuda import attention_tiled
from tvm_sparse.schedules.cuda.device_code import WARP, f32, symbol, token_dim

WARPS = 8
KEYS = 4  # positions a warp has in flight
_LOWEST = -3.4028234663852886e38


def attention(
    tokens: int | None, batch: int, heads: int, kv_heads: int, head_dim: int, dtype: str
) -> tvm.tirx.PrimFunc:
    """See schedules/ops.py."""
    if tokens is None and attention_tiled.fits(head_dim, dtype):
        return attention_tiled.attention(batch, heads, kv_heads, head_dim, dtype)
    n = token_dim(tokens)
    prefill = tokens is None
    row_length, context = symbol("row_length"), symbol("context")
    each = -(-head_dim // WARP)
    whole = head_dim % WARP == 0
    # A lane's dimensions of one cache row, in loads of at most 16 bytes.
    width = math.gcd(each, 8 if dtype == "bfloat16" else 4) if whole else 1
    group = heads // kv_heads
    scale = 1.0 / math.sqrt(head_dim)

    @T.prim_func(s_tir=True)
    def attention(
        q: T.Buffer((n, heads * head_dim), "float32"),
        qkv: T.Buffer((n, row_length), dtype),
        slot: T.Buffer((1,), "int32"),
        position: T.Buffer((batch,), "int32"),
        k_cache: T.Buffer((batch, kv_heads, context, head_dim), dtype),
        v_cache: T.Buffer((batch, kv_heads, context, head_dim), dtype),
        y: T.Buffer((n, heads * head_dim), dtype),
    ):
        token = T.launch_thread("blockIdx.x", n)
        head = T.launch_thread("blockIdx.y", heads)
        thread = T.launch_thread("threadIdx.x", WARPS * WARP)
        lane: T.let[T.int32] = thread % WARP
        warp: T.let[T.int32] = thread // WARP
        owner = T.alloc_buffer((1,), "int32", scope="local")
        length = T.alloc_buffer((1,), "int64", scope="local")
        first = T.alloc_buffer((1,), "int64", scope="local")
        query = T.alloc_buffer((each,), "float32", scope="local")
        values = T.alloc_buffer((each,), "float32", scope="local")
        rows = T.alloc_buffer((2 * KEYS * each,), dtype, scope="local")  # keys, then values
        running = T.alloc_buffer((2,), "float32", scope="local")  # maximum, sum of weights
        scores = T.alloc_buffer((KEYS,), "float32", scope="local")
        largest = T.alloc_buffer((1,), "float32", scope="local")
        joined = T.alloc_buffer((2,), "float32", scope="local")
        warps = T.alloc_buffer((2, WARPS), "float32", scope="shared")
        parts = T.alloc_buffer((WARPS, head_dim), "float32", scope="shared")
        if T.bool(prefill):
            owner[0] = slot[0]
            length[0] = T.min(T.cast(position[owner[0]], "int64") + token + 1, context)
        else:
            owner[0] = T.cast(token, "int32")
            length[0] = T.min(T.cast(position[owner[0]], "int64") + 1, context)

        running[0] = T.float32(_LOWEST)
        running[1] = T.float32(0)
        for i in T.unroll(each):
            values[i] = T.float32(0)
            query[i] = T.float32(0)
            if lane * each + i < head_dim:
                query[i] = q[token, head * head_dim + lane * each + i] * T.float32(scale)
        for i in T.unroll(2 * KEYS * each):
            rows[i] = T.cast(T.float32(0), dtype)
        for step in range(T.ceildiv(length[0], WARPS * KEYS)):
            first[0] = (step * WARPS + warp) * KEYS
            if first[0] < length[0]:
                for j in T.unroll(KEYS):
                    # Past the end the last row is read again; its weight becomes zero.
                    for block in T.unroll(each // width):
                        if lane * each + block * width < head_dim:
                            for v in T.vectorized(width):
                                rows[j * each + block * width + v] = k_cache[
                                    owner[0],
                                    head // group,
                                    T.min(first[0] + j, length[0] - 1),
                                    lane * each + block * width + v,
                                ]
                for j in T.unroll(KEYS):
                    for block in T.unroll(each // width):
                        if lane * each + block * width < head_dim:
                            for v in T.vectorized(width):
                                rows[(KEYS + j) * each + block * width + v] = v_cache[
                                    owner[0],
                                    head // group,
                                    T.min(first[0] + j, length[0] - 1),
                                    lane * each + block * width + v,
                                ]
                largest[0] = running[0]
                for j in T.unroll(KEYS):
                    scores[j] = T.float32(0)
                    for i in T.unroll(each):
                        scores[j] += query[i] * f32(rows[j * each + i])
                    scores[j] = T.cuda.warp_sum(scores[j])
                    if first[0] + j >= length[0]:
                        scores[j] = T.float32(_LOWEST)
                    largest[0] = T.max(largest[0], scores[j])
                running[0] = T.exp(running[0] - largest[0])
                running[1] = running[1] * running[0]
                for i in T.unroll(each):
                    values[i] = values[i] * running[0]
                running[0] = largest[0]
                for j in T.unroll(KEYS):
                    scores[j] = T.exp(scores[j] - running[0])
                    running[1] += scores[j]
                    for i in T.unroll(each):
                        values[i] += scores[j] * f32(rows[(KEYS + j) * each + i])

        if lane == 0:
            warps[0, warp] = running[0]
            warps[1, warp] = running[1]
        for i in T.unroll(each):
            if lane * each + i < head_dim:
                parts[warp, lane * each + i] = values[i]
        T.tvm_storage_sync("shared")
        joined[0] = T.float32(_LOWEST)
        joined[1] = T.float32(0)
        for w in T.unroll(WARPS):
            joined[0] = T.max(joined[0], warps[0, w])
        for w in T.unroll(WARPS):
            joined[1] += warps[1, w] * T.exp(warps[0, w] - joined[0])
        for i in range(T.ceildiv(head_dim, WARPS * WARP)):
            if i * WARPS * WARP + thread < head_dim:
                largest[0] = T.float32(0)
                for w in T.unroll(WARPS):
                    largest[0] += parts[w, i * WARPS * WARP + thread] * T.exp(warps[0, w] - joined[0])
                y[token, head * head_dim + i * WARPS * WARP + thread] = T.cast(
                    largest[0]
                    / joined[1]
                    * T.sigmoid(f32(qkv[token, (2 * head + 1) * head_dim + i * WARPS * WARP + thread])),
                    dtype,
                )

    return attention
