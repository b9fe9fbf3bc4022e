"""y = x W^T with W as a bitmap, on a GPU: one warp a row.

A mask word is the same for all lanes; lane l looks at bit l, which is column 32 i + l, and finds its value by counting
the bits below. Loads of masks, values and x are contiguous.
"""

from __future__ import annotations

from collections.abc import Mapping

import tvm
from tvm.script import tirx as T

from tvm_sparse.schedules.cuda.device_code import WARP, f32, symbol
from tvm_sparse.schedules.cuda.token_tile import tile_decision, tokens_of
from tvm_sparse.schedules.spec import KernelSpec
from tvm_sparse.schedules.table import Decision


def space(spec: KernelSpec) -> tuple[Decision, ...]:
    """`tile` tokens a CTA, `warps` rows a CTA."""
    return (tile_decision(spec), Decision("warps", (2, 4, 8, 16), 8))


def build(spec: KernelSpec, decisions: Mapping[str, int]) -> tvm.tirx.PrimFunc:
    """(x [m, k], mask, row_start, values, y [m, n])."""
    n, k, m = spec.n, spec.k, tokens_of(spec)
    tile, warps = decisions["tile"], decisions["warps"]
    mask_words = -(-k // WARP)
    stored = symbol("nv")

    @T.prim_func(s_tir=True)
    def matmul_bitmap(
        x: T.Buffer((m, k), spec.x_dtype),
        mask: T.Buffer((n, mask_words), "uint32"),
        row_start: T.Buffer((n + 1,), "int32"),
        values: T.Buffer((stored,), "bfloat16"),
        y: T.Buffer((m, n), spec.out_dtype),
    ):
        block = T.launch_thread("blockIdx.x", T.ceildiv(n, warps))
        tiles = T.launch_thread("blockIdx.y", T.ceildiv(m, tile))
        thread = T.launch_thread("threadIdx.x", warps * WARP)
        lane: T.let[T.int32] = thread % WARP
        row: T.let[T.int32] = block * warps + thread // WARP
        at = T.alloc_buffer((1,), "int32", scope="local")
        bits = T.alloc_buffer((1,), "uint32", scope="local")
        value = T.alloc_buffer((1,), "float32", scope="local")
        sums = T.alloc_buffer((tile,), "float32", scope="local")
        if row < n:
            for token in T.unroll(tile):
                sums[token] = T.float32(0)
            at[0] = row_start[row]
            for i in range(mask_words):
                bits[0] = mask[row, i]
                # Past column K no bit is set: a ragged last word needs no test of its own.
                if (T.shift_right(bits[0], T.cast(lane, "uint32")) & T.uint32(1)) != T.uint32(0):
                    value[0] = f32(
                        values[
                            at[0]
                            + T.cast(
                                T.popcount(
                                    bits[0]
                                    & (
                                        T.shift_left(T.uint32(1), T.cast(lane, "uint32"))
                                        - T.uint32(1)
                                    )
                                ),
                                "int32",
                            )
                        ]
                    )
                    for token in T.unroll(tile):
                        if tiles * tile + token < m:
                            sums[token] += value[0] * f32(x[tiles * tile + token, i * WARP + lane])
                at[0] = at[0] + T.cast(T.popcount(bits[0]), "int32")
            for token in T.unroll(tile):
                sums[token] = T.cuda.warp_sum(sums[token])
                if lane == 0 and tiles * tile + token < m:
                    y[tiles * tile + token, row] = T.cast(sums[token], spec.out_dtype)

    return matmul_bitmap
