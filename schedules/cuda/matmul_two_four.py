"""y = x W^T with W as 2:4, on a GPU: one warp a row, a lane 16 columns at a time.

A lane loads its 8 values as 16 bytes and one word of positions. (Prefill on the sparse tensor cores, mma.sp, reads
the same buffers.)
"""

from __future__ import annotations

from collections.abc import Mapping

import tvm
from tvm.script import tirx as T

from tvm_sparse.schedules.cuda.device_code import WARP, f32
from tvm_sparse.schedules.cuda.token_tile import tile_decision, tokens_of
from tvm_sparse.schedules.spec import KernelSpec
from tvm_sparse.schedules.table import Decision


def space(spec: KernelSpec) -> tuple[Decision, ...]:
    """`tile` tokens a CTA, `warps` rows a CTA."""
    return (tile_decision(spec), Decision("warps", (2, 4, 8, 16), 8))


def build(spec: KernelSpec, decisions: Mapping[str, int]) -> tvm.tirx.PrimFunc:
    """(x [m, k], values, meta, y [m, n])."""
    n, k, m = spec.n, spec.k, tokens_of(spec)
    tile, warps = decisions["tile"], decisions["warps"]
    words = -(-k // 16)

    @T.prim_func(s_tir=True)
    def matmul_two_four(
        x: T.Buffer((m, k), spec.x_dtype),
        values: T.Buffer((n, 8 * words), "bfloat16"),
        meta: T.Buffer((n, words), "uint16"),
        y: T.Buffer((m, n), spec.out_dtype),
    ):
        block = T.launch_thread("blockIdx.x", T.ceildiv(n, warps))
        tiles = T.launch_thread("blockIdx.y", T.ceildiv(m, tile))
        thread = T.launch_thread("threadIdx.x", warps * WARP)
        pairs = T.decl_buffer((n, 4 * words), "uint32", data=values.data)
        lane: T.let[T.int32] = thread % WARP
        row: T.let[T.int32] = block * warps + thread // WARP
        pair = T.alloc_buffer((4,), "uint32", scope="local")
        places = T.alloc_buffer((1,), "uint32", scope="local")
        value = T.alloc_buffer((1,), "float32", scope="local")
        column = T.alloc_buffer((1,), "int32", scope="local")
        sums = T.alloc_buffer((tile,), "float32", scope="local")
        if row < n:
            for token in T.unroll(tile):
                sums[token] = T.float32(0)
            for step in range(T.ceildiv(words, WARP)):
                if step * WARP + lane < words:
                    for v in T.vectorized(4):
                        pair[v] = pairs[row, (step * WARP + lane) * 4 + v]
                    places[0] = T.cast(meta[row, step * WARP + lane], "uint32")
                    for j in T.unroll(8):
                        column[0] = (
                            (step * WARP + lane) * 16
                            + j // 2 * 4
                            + T.cast(
                                T.shift_right(places[0], T.uint32(2) * T.cast(j, "uint32"))
                                & T.uint32(3),
                                "int32",
                            )
                        )
                        value[0] = T.reinterpret(
                            "float32",
                            T.if_then_else(
                                j % 2 == 0,
                                T.shift_left(pair[j // 2], T.uint32(16)),
                                pair[j // 2] & T.uint32(0xFFFF0000),
                            ),
                        )
                        # The padding after column K holds zeros, which x has no place for.
                        if column[0] < k:
                            for token in T.unroll(tile):
                                if tiles * tile + token < m:
                                    sums[token] += value[0] * f32(
                                        x[tiles * tile + token, column[0]]
                                    )
            for token in T.unroll(tile):
                sums[token] = T.cuda.warp_sum(sums[token])
                if lane == 0 and tiles * tile + token < m:
                    y[tiles * tile + token, row] = T.cast(sums[token], spec.out_dtype)

    return matmul_two_four
