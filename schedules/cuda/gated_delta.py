"""The gated delta rule on a GPU: a CTA owns 32 columns of one head's state and holds them in registers.

Lane l of every warp is a column, each warp a range of the key rows. Per token the two products with the state, S^T k
and S^T q, are summed over the warps through shared memory in a fixed order. Columns do not depend on one another, so
a head of 128 columns gives four CTAs; a prefill walks its tokens in order inside the kernel and reads and writes the
state once.
"""

from __future__ import annotations

import math

import tvm
from tvm.script import tirx as T

from tvm_sparse.schedules.cuda import gated_delta_chunked
from tvm_sparse.schedules.cuda.device_code import WARP, f32, softplus, symbol, token_dim

_MOST_PARTS = 8  # warps of a CTA


def gated_delta(
    tokens: int | None,
    batch: int,
    key_heads: int,
    value_heads: int,
    key_dim: int,
    value_dim: int,
    dtype: str,
) -> tvm.tirx.PrimFunc:
    """See schedules/ops.py."""
    if tokens is None and gated_delta_chunked.fits(key_dim, value_dim, dtype):
        return gated_delta_chunked.gated_delta(batch, key_heads, value_heads, key_dim, value_dim, dtype)
    n = token_dim(tokens)
    sequences = 1 if tokens is None else tokens
    steps = n if tokens is None else 1
    prefill = tokens is None
    row_length = symbol("row_length")
    channels = 2 * key_heads * key_dim + value_heads * value_dim
    key_columns = key_heads * key_dim
    group = value_heads // key_heads
    parts = math.gcd(key_dim, _MOST_PARTS)
    rows = key_dim // parts
    loads = -(-key_dim // WARP)
    beta_column = channels + value_heads * value_dim
    query_scale = 1.0 / math.sqrt(key_dim)

    @T.prim_func(s_tir=True)
    def gated_delta(
        y: T.Buffer((n, channels), "float32"),
        mixed: T.Buffer((n, row_length), dtype),
        a_log: T.Buffer((value_heads,), "float32"),
        dt_bias: T.Buffer((value_heads,), "float32"),
        slot: T.Buffer((1,), "int32"),
        state: T.Buffer((batch, value_heads, key_dim, value_dim), "float32"),
        o: T.Buffer((n, value_heads * value_dim), "float32"),
    ):
        sequence = T.launch_thread("blockIdx.z", sequences)
        head = T.launch_thread("blockIdx.y", value_heads)
        block = T.launch_thread("blockIdx.x", T.ceildiv(value_dim, WARP))
        thread = T.launch_thread("threadIdx.x", parts * WARP)
        lane: T.let[T.int32] = thread % WARP
        part: T.let[T.int32] = thread // WARP
        column: T.let[T.int32] = block * WARP + lane
        owner = T.alloc_buffer((1,), "int32", scope="local")
        s = T.alloc_buffer((rows,), "float32", scope="local")
        norm = T.alloc_buffer((2,), "float32", scope="local")
        scalars = T.alloc_buffer((3,), "float32", scope="local")  # decay, beta, v - S^T k
        product = T.alloc_buffer((1,), "float32", scope="local")
        from_k = T.alloc_buffer((parts, WARP), "float32", scope="shared")
        from_q = T.alloc_buffer((parts, WARP), "float32", scope="shared")

        if T.bool(prefill):
            owner[0] = slot[0]
        else:
            owner[0] = sequence
        for r in T.unroll(rows):
            s[r] = T.float32(0)
            if column < value_dim:
                s[r] = state[owner[0], head, part * rows + r, column]

        for step in range(steps):
            # 1 / |q| and 1 / |k|, by every warp for itself
            norm[0] = T.float32(0)
            norm[1] = T.float32(0)
            for i in T.unroll(loads):
                if i * WARP + lane < key_dim:
                    product[0] = y[sequence + step, head // group * key_dim + i * WARP + lane]
                    norm[0] += product[0] * product[0]
                    product[0] = y[
                        sequence + step, key_columns + head // group * key_dim + i * WARP + lane
                    ]
                    norm[1] += product[0] * product[0]
            norm[0] = T.rsqrt(T.cuda.warp_sum(norm[0]) + T.float32(1e-6)) * T.float32(query_scale)
            norm[1] = T.rsqrt(T.cuda.warp_sum(norm[1]) + T.float32(1e-6))
            scalars[0] = T.exp(
                -T.exp(a_log[head])
                * softplus(
                    f32(mixed[sequence + step, beta_column + value_heads + head]) + dt_bias[head]
                )
            )
            scalars[1] = T.sigmoid(f32(mixed[sequence + step, beta_column + head]))

            product[0] = T.float32(0)
            for r in T.unroll(rows):
                s[r] = s[r] * scalars[0]
                product[0] += s[r] * (
                    y[sequence + step, key_columns + head // group * key_dim + part * rows + r]
                    * norm[1]
                )
            from_k[part, lane] = product[0]
            T.tvm_storage_sync("shared")
            scalars[2] = T.float32(0)
            if column < value_dim:
                scalars[2] = y[sequence + step, 2 * key_columns + head * value_dim + column]
            for p in T.unroll(parts):
                scalars[2] -= from_k[p, lane]
            scalars[2] = scalars[2] * scalars[1]

            product[0] = T.float32(0)
            for r in T.unroll(rows):
                s[r] += (
                    y[sequence + step, key_columns + head // group * key_dim + part * rows + r]
                    * norm[1]
                    * scalars[2]
                )
                product[0] += s[r] * (
                    y[sequence + step, head // group * key_dim + part * rows + r] * norm[0]
                )
            from_q[part, lane] = product[0]
            T.tvm_storage_sync("shared")
            if part == 0 and column < value_dim:
                product[0] = T.float32(0)
                for p in T.unroll(parts):
                    product[0] += from_q[p, lane]
                o[sequence + step, head * value_dim + column] = product[0]

        for r in T.unroll(rows):
            if column < value_dim:
                state[owner[0], head, part * rows + r, column] = s[r]

    return gated_delta
