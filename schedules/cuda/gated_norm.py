"""The gated normalisation after the delta rule, on a GPU: one warp a head."""

from __future__ import annotations

import tvm
from tvm.script import tirx as T

from tvm_sparse.schedules.cuda.device_code import WARP, f32, silu, symbol, token_dim

WARPS = 4


def gated_norm(
    tokens: int | None,
    key_heads: int,
    value_heads: int,
    key_dim: int,
    value_dim: int,
    eps: float,
    dtype: str,
) -> tvm.tirx.PrimFunc:
    """See schedules/ops.py."""
    n = token_dim(tokens)
    row_length = symbol("row_length")
    gate_column = 2 * key_heads * key_dim + value_heads * value_dim
    each = -(-value_dim // WARP)

    @T.prim_func(s_tir=True)
    def gated_norm(
        o: T.Buffer((n, value_heads * value_dim), "float32"),
        mixed: T.Buffer((n, row_length), dtype),
        w: T.Buffer((value_dim,), "float32"),
        y: T.Buffer((n, value_heads * value_dim), dtype),
    ):
        token = T.launch_thread("blockIdx.x", n)
        block = T.launch_thread("blockIdx.y", T.ceildiv(value_heads, WARPS))
        thread = T.launch_thread("threadIdx.x", WARPS * WARP)
        head: T.let[T.int32] = block * WARPS + thread // WARP
        lane: T.let[T.int32] = thread % WARP
        values = T.alloc_buffer((each,), "float32", scope="local")
        squares = T.alloc_buffer((1,), "float32", scope="local")
        if head < value_heads:
            squares[0] = T.float32(0)
            for i in T.unroll(each):
                values[i] = T.float32(0)
                if i * WARP + lane < value_dim:
                    values[i] = o[token, head * value_dim + i * WARP + lane]
                squares[0] += values[i] * values[i]
            squares[0] = T.rsqrt(
                T.cuda.warp_sum(squares[0]) / T.float32(value_dim) + T.float32(eps)
            )
            for i in T.unroll(each):
                if i * WARP + lane < value_dim:
                    y[token, head * value_dim + i * WARP + lane] = T.cast(
                        w[i * WARP + lane]
                        * values[i]
                        * squares[0]
                        * silu(
                            f32(mixed[token, gate_column + head * value_dim + i * WARP + lane])
                        ),
                        dtype,
                    )

    return gated_norm
