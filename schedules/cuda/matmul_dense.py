"""y = x W^T with W dense, on a GPU: one warp a row, 16 bytes of the row a lane and step, several steps in flight.

Several tokens in bfloat16 go to the tensor cores instead (matmul_mma.py).
"""

from __future__ import annotations

from collections.abc import Mapping

import tvm
from tvm.script import tirx as T

from tvm_sparse.schedules.cuda import matmul_mma
from tvm_sparse.schedules.cuda.dependent_launch import dependent, read_quad, start_dependents, wait_for_inputs
from tvm_sparse.schedules.cuda.device_code import WARP, f32
from tvm_sparse.schedules.cuda.token_tile import tile_decision, tokens_of
from tvm_sparse.schedules.spec import KernelSpec
from tvm_sparse.schedules.table import Decision


def space(spec: KernelSpec) -> tuple[Decision, ...]:
    """`tile` tokens a CTA, `warps` rows a CTA, `depth` loads of 16 bytes in flight a lane; or matmul_mma's."""
    if matmul_mma.takes(spec):
        return matmul_mma.space(spec)
    return (
        tile_decision(spec),
        Decision("warps", (2, 4, 8, 16), 8),
        Decision("depth", (1, 2, 4, 8), 4),
    )


def build(spec: KernelSpec, decisions: Mapping[str, int]) -> tvm.tirx.PrimFunc:
    """(x [m, k], weight [n, k] bfloat16 or float32, y [m, n])."""
    if matmul_mma.takes(spec):
        return matmul_mma.build(spec, decisions)
    if not spec.choice.options and spec.k % 8 == 0 and spec.m == 1 and spec.x_dtype == "bfloat16":
        return _one_token(spec, decisions)
    return _any(spec, decisions)


def _one_token(spec: KernelSpec, decisions: Mapping[str, int]) -> tvm.tirx.PrimFunc:
    """Launched early: a row's first loads are on their way before x is there."""
    n, k = spec.n, spec.k
    warps, depth = decisions["warps"], decisions["depth"]
    loads = k // 8
    steps = -(-loads // (WARP * depth))

    @T.prim_func(s_tir=True)
    def matmul_dense(
        x: T.Buffer((1, k), "bfloat16"),
        weight: T.Buffer((n, k), "bfloat16"),
        y: T.Buffer((1, n), spec.out_dtype),
    ):
        block = T.launch_thread("blockIdx.x", T.ceildiv(n, warps))
        thread = T.launch_thread("threadIdx.x", warps * WARP)
        lane: T.let[T.int32] = thread % WARP
        row: T.let[T.int32] = T.min(block * warps + thread // WARP, n - 1)  # warps past the end repeat the last row
        w = T.alloc_buffer((depth * 4,), "uint32", scope="local")
        v = T.alloc_buffer((4,), "uint32", scope="local")
        total = T.alloc_buffer((1,), "float32", scope="local")
        start_dependents()
        for d in T.unroll(depth):
            if d * WARP + lane < loads:
                read_quad(weight[row, (d * WARP + lane) * 8], w[d * 4], once=True)
        wait_for_inputs()
        total[0] = T.float32(0)
        for step in range(steps):
            for d in T.unroll(depth):
                if (step * depth + d) * WARP + lane < loads:
                    read_quad(x[0, ((step * depth + d) * WARP + lane) * 8], v[0])
                    for i in T.unroll(4):
                        total[0] += T.reinterpret(
                            "float32", T.shift_left(w[d * 4 + i], T.uint32(16))
                        ) * T.reinterpret("float32", T.shift_left(v[i], T.uint32(16)))
                        total[0] += T.reinterpret(
                            "float32", w[d * 4 + i] & T.uint32(0xFFFF0000)
                        ) * T.reinterpret("float32", v[i] & T.uint32(0xFFFF0000))
                if ((step + 1) * depth + d) * WARP + lane < loads:
                    read_quad(
                        weight[row, (((step + 1) * depth + d) * WARP + lane) * 8], w[d * 4], once=True
                    )
        total[0] = T.cuda.warp_sum(total[0])
        if lane == 0:
            y[0, row] = T.cast(total[0], spec.out_dtype)

    return dependent(matmul_dense)


def _any(spec: KernelSpec, decisions: Mapping[str, int]) -> tvm.tirx.PrimFunc:
    n, k, m = spec.n, spec.k, tokens_of(spec)
    tile, warps = decisions["tile"], decisions["warps"]
    weight_dtype = "float32" if spec.choice.options else "bfloat16"

    @T.prim_func(s_tir=True)
    def matmul_dense(
        x: T.Buffer((m, k), spec.x_dtype),
        weight: T.Buffer((n, k), weight_dtype),
        y: T.Buffer((m, n), spec.out_dtype),
    ):
        block = T.launch_thread("blockIdx.x", T.ceildiv(n, warps))
        tiles = T.launch_thread("blockIdx.y", T.ceildiv(m, tile))
        thread = T.launch_thread("threadIdx.x", warps * WARP)
        lane: T.let[T.int32] = thread % WARP
        row: T.let[T.int32] = block * warps + thread // WARP
        value = T.alloc_buffer((1,), "float32", scope="local")
        sums = T.alloc_buffer((tile,), "float32", scope="local")
        if row < n:
            for token in T.unroll(tile):
                sums[token] = T.float32(0)
            for step in range(T.ceildiv(k, WARP)):
                if step * WARP + lane < k:
                    value[0] = f32(weight[row, step * WARP + lane])
                    for token in T.unroll(tile):
                        if tiles * tile + token < m:
                            sums[token] += value[0] * f32(
                                x[tiles * tile + token, step * WARP + lane]
                            )
            for token in T.unroll(tile):
                sums[token] = T.cuda.warp_sum(sums[token])
                if lane == 0 and tiles * tile + token < m:
                    y[tiles * tile + token, row] = T.cast(sums[token], spec.out_dtype)

    return matmul_dense
