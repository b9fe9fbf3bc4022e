"""y = x W^T with W as blocks, on a GPU: one warp a row, its lanes over the columns of the row's blocks, end to end."""

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
    """(x [m, k], blocks, cols, row_start, y [m, n])."""
    n, k, m = spec.n, spec.k, tokens_of(spec)
    rows, cols_each = spec.choice.option("rows"), spec.choice.option("cols")
    tile, warps = decisions["tile"], decisions["warps"]
    count = symbol("nb")

    @T.prim_func(s_tir=True)
    def matmul_block(
        x: T.Buffer((m, k), spec.x_dtype),
        blocks: T.Buffer((count, rows, cols_each), "bfloat16"),
        cols: T.Buffer((count,), "int32"),
        row_start: T.Buffer(((n + rows - 1) // rows + 1,), "int32"),
        y: T.Buffer((m, n), spec.out_dtype),
    ):
        block = T.launch_thread("blockIdx.x", T.ceildiv(n, warps))
        tiles = T.launch_thread("blockIdx.y", T.ceildiv(m, tile))
        thread = T.launch_thread("threadIdx.x", warps * WARP)
        lane: T.let[T.int32] = thread % WARP
        row: T.let[T.int32] = block * warps + thread // WARP
        first = T.alloc_buffer((1,), "int32", scope="local")
        length = T.alloc_buffer((1,), "int32", scope="local")
        at = T.alloc_buffer((2,), "int32", scope="local")  # block, column of x
        value = T.alloc_buffer((1,), "float32", scope="local")
        sums = T.alloc_buffer((tile,), "float32", scope="local")
        if row < n:
            for token in T.unroll(tile):
                sums[token] = T.float32(0)
            first[0] = row_start[row // rows]
            length[0] = (row_start[row // rows + 1] - first[0]) * cols_each
            for step in range(T.ceildiv(length[0], WARP)):
                if step * WARP + lane < length[0]:
                    at[0] = first[0] + (step * WARP + lane) // cols_each
                    at[1] = cols[at[0]] * cols_each + (step * WARP + lane) % cols_each
                    if at[1] < k:
                        value[0] = f32(
                            blocks[at[0], row % rows, (step * WARP + lane) % cols_each]
                        )
                        for token in T.unroll(tile):
                            if tiles * tile + token < m:
                                sums[token] += value[0] * f32(x[tiles * tile + token, at[1]])
            for token in T.unroll(tile):
                sums[token] = T.cuda.warp_sum(sums[token])
                if lane == 0 and tiles * tile + token < m:
                    y[tiles * tile + token, row] = T.cast(sums[token], spec.out_dtype)

    return matmul_block
