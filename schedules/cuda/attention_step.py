"""Attention of one new token a sequence over a long cache, on a GPU: tensor cores, the context split among CTAs.

Two kernels. `attention_part`: a CTA takes one key head with all its query heads, norms and turns the queries for
itself, and walks its share of the cache, 16 positions a warp and step; the CTA of share 0 also makes and stores the
token's own key and value. `attention_join` adds the shares in their order (flash-decoding, Dao et al. 2023; online
softmax, Milakov and Gimelshein 2018, arXiv:1805.02867). How many shares there are follows from the length, which the
kernels read: a captured graph serves every length.

Fragments of mma.m16n8k16 (lane = 4 g + t) without any shuffle of the cache: which dimension stands at which index of a
product is free as long as both factors agree.
  scores [16 positions, 8 heads]: lane reads dims 32 j + 8 t .. + 7 of rows g and g + 8, which are the A of two products
  values [16 dims, 8 heads]: lane reads dims 64 j + 8 g .. + 7 of rows 2 t, 2 t + 1, 2 t + 8, 2 t + 9; rows pair up
Queries and weights are split into two bfloat16 each (the rest is the second), so that only the cache is rounded.
Numbers are float32, scores in base 2.
"""

from __future__ import annotations

import tvm
from tvm.script import tirx as T

from tvm_sparse.schedules.cuda.attention_code import SOURCE, inverse_frequencies
from tvm_sparse.schedules.cuda.dependent_launch import dependent, start_dependents
from tvm_sparse.schedules.cuda.device_code import WARP, symbol

WARPS = 8  # of a CTA
CTAS = 128  # of a step, over sequences and key heads
MOST_SHARES = 64


def shares_of(tokens: int, heads: int, kv_heads: int, head_dim: int, rotary_dim: int, dtype: str) -> int:
    """The most shares of a context; 0 where these kernels do not fit."""
    fits = dtype == "bfloat16" and head_dim % 64 == 0 and head_dim <= 256 and heads // kv_heads <= WARPS
    if not fits or (rotary_dim % (2 * WARP) and rotary_dim > WARP):
        return 0
    return min(MOST_SHARES, max(1, CTAS // (tokens * kv_heads)))


def attention_part(
    tokens: int, heads: int, kv_heads: int, head_dim: int, rotary_dim: int, theta: float, eps: float, dtype: str
) -> tvm.tirx.PrimFunc:
    """See schedules/ops.py."""
    row_length, context = symbol("row_length"), symbol("context")
    shares = shares_of(tokens, heads, kv_heads, head_dim, rotary_dim, dtype)
    group = heads // kv_heads
    inverse, inverse_source = inverse_frequencies(rotary_dim, theta)

    @T.prim_func(s_tir=True)
    def attention_part(
        qkv: T.Buffer((tokens, row_length), dtype),
        q_norm: T.Buffer((head_dim,), "float32"),
        k_norm: T.Buffer((head_dim,), "float32"),
        position: T.Buffer((tokens,), "int32"),
        k_cache: T.Buffer((tokens, kv_heads, context, head_dim), dtype),
        v_cache: T.Buffer((tokens, kv_heads, context, head_dim), dtype),
        sums: T.Buffer((tokens, heads, shares, head_dim), "float32"),
        marks: T.Buffer((tokens, heads, shares, 2), "float32"),
    ):
        share = T.launch_thread("blockIdx.x", shares)
        head = T.launch_thread("blockIdx.y", kv_heads)
        token = T.launch_thread("blockIdx.z", tokens)
        thread = T.launch_thread("threadIdx.x", WARPS * WARP)
        start_dependents()
        T.evaluate(
            T.cuda.func_call(
                f"tvms_attention_part<{head_dim}, {group}, {rotary_dim}, {inverse}>",
                T.address_of(qkv[token, 0]),
                T.address_of(q_norm[0]),
                T.address_of(k_norm[0]),
                T.address_of(position[token]),
                T.address_of(k_cache[token, head, 0, 0]),
                T.address_of(v_cache[token, head, 0, 0]),
                T.address_of(sums[token, head * group, share, 0]),
                T.address_of(marks[token, head * group, share, 0]),
                head,
                kv_heads,
                share,
                shares,
                T.cast(context, "int32"),
                T.float32(eps),
                source_code=inverse_source + SOURCE,
            )
        )

    return dependent(attention_part)


def attention_join(
    tokens: int, heads: int, kv_heads: int, head_dim: int, rotary_dim: int, dtype: str
) -> tvm.tirx.PrimFunc:
    """See schedules/ops.py."""
    row_length, context = symbol("row_length"), symbol("context")
    shares = shares_of(tokens, heads, kv_heads, head_dim, rotary_dim, dtype)

    @T.prim_func(s_tir=True)
    def attention_join(
        sums: T.Buffer((tokens, heads, shares, head_dim), "float32"),
        marks: T.Buffer((tokens, heads, shares, 2), "float32"),
        qkv: T.Buffer((tokens, row_length), dtype),
        position: T.Buffer((tokens,), "int32"),
        k_cache: T.Buffer((tokens, kv_heads, context, head_dim), dtype),
        y: T.Buffer((tokens, heads * head_dim), dtype),
    ):
        head = T.launch_thread("blockIdx.x", heads)
        token = T.launch_thread("blockIdx.y", tokens)
        thread = T.launch_thread("threadIdx.x", head_dim)
        start_dependents()
        y[token, head * head_dim + thread] = T.cast(
            T.cuda.func_call(
                f"tvms_attention_join<{head_dim}, {shares}>",
                T.address_of(sums[token, head, 0, 0]),
                T.address_of(marks[token, head, 0, 0]),
                T.address_of(qkv[token, (2 * head + 1) * head_dim]),
                T.address_of(position[token]),
                T.cast(context, "int32"),
                source_code=SOURCE,
                return_type="float32",
            ),
            dtype,
        )

    return dependent(attention_join)
