"""y = x W^T with W dense, for several tokens and many, on the tensor cores that an H200 and a B200 share.

A CTA takes a tile of tokens times features. Both operands come through shared memory in stages of 64 columns, several
of them on their way (cp.async) while one is multiplied; a stage holds rows of 128 bytes, x's before W's, laid out as
tensor_core.py says. Where tokens are few, so that reading W is what takes time, warps share out a stage's panels of 64
columns instead of its rows, and add up their sums in a fixed order at the end. The tile of many tokens is multiplied by
warpgroups where there are any (matmul_warpgroup.py).

A lane's sums of four neighbouring 8-column products are 8 neighbours of a row of y, because W's rows are put into
shared memory in the order that makes them so:

    row of the tile, in each 32    8 j + 2 t + e     j = 0..3, t = 0..3, e = 0..1
    holds feature                  8 t + 2 j + e     lane 4 g + t has sums 2 t + e of product j
"""

from __future__ import annotations

from collections.abc import Mapping

import tvm
from tvm.script import tirx as T

from tvm_sparse.schedules.cuda import matmul_warpgroup, tensor_core
from tvm_sparse.schedules.cuda.device_code import WARP
from tvm_sparse.schedules.cuda.token_tile import tokens_of
from tvm_sparse.schedules.spec import KernelSpec
from tvm_sparse.schedules.table import Decision

_SOURCE = r"""
#ifndef TVMS_MATMUL
#define TVMS_MATMUL
// (Where the code is emulated, on a machine without a GPU, a copy is done at once.)
__device__ __forceinline__ void tvms_commit() {
#ifdef __CUDA_ARCH__
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int LEFT> __device__ __forceinline__ void tvms_wait() {
#ifdef __CUDA_ARCH__
  asm volatile("cp.async.wait_group %0;" :: "n"(LEFT) : "memory");
#endif
}

__device__ __forceinline__ void tvms_store8(unsigned short* y, const float* sums) {
  *(uint4*)y = make_uint4(tvms_pack_bf16(sums[0], sums[1]), tvms_pack_bf16(sums[2], sums[3]),
                          tvms_pack_bf16(sums[4], sums[5]), tvms_pack_bf16(sums[6], sums[7]));
}
__device__ __forceinline__ void tvms_store8(float* y, const float* sums) {
  ((float4*)y)[0] = make_float4(sums[0], sums[1], sums[2], sums[3]);
  ((float4*)y)[1] = make_float4(sums[4], sums[5], sums[6], sums[7]);
}
__device__ __forceinline__ void tvms_store1(unsigned short* y, float sum) { *y = tvms_pack_bf16(sum, 0.f); }
__device__ __forceinline__ void tvms_store1(float* y, float sum) { *y = sum; }
// Up to 8 sums of neighbouring features, as many as are `left` of a row of N.
template <int N, class Out> __device__ __forceinline__ void tvms_store_row(Out* y, const float* sums, int left) {
  if (N % 8 == 0) {
    if (left > 0) tvms_store8(y, sums);
  } else {
#pragma unroll
    for (int e = 0; e < 8; ++e)
      if (e < left) tvms_store1(y + e, sums[e]);
  }
}

// A warp has TOKENS x FEATURES sums; ACROSS warps side by side in tokens, DOWN in features, DEEP in columns.
template <int TOKENS, int FEATURES, int ACROSS, int DOWN, int DEEP, int STAGES, int n, int k, class Out>
__device__ __forceinline__ void tvms_matmul(
    const void* x_bits, const void* w_bits, void* y_bits, void* shared_bytes, long long m) {
  const unsigned short *x = (const unsigned short*)x_bits, *w = (const unsigned short*)w_bits;
  Out* y = (Out*)y_bits;
  char* shared = (char*)shared_bytes;
  constexpr int WIDE = TOKENS * ACROSS, HIGH = FEATURES * DOWN, ROWS = WIDE + HIGH;
  constexpr int PANEL = ROWS * 128, STAGE = DEEP * PANEL, THREADS = 32 * ACROSS * DOWN * DEEP;
  constexpr int A = TOKENS / 16, B = FEATURES / 16;
  const int warp = threadIdx.x / 32, lane = threadIdx.x & 31;
  const int across = warp % ACROSS, down = warp / ACROSS % DOWN, deep = warp / (ACROSS * DOWN);
  const long long token0 = (long long)blockIdx.x * WIDE;
  const int feature0 = blockIdx.y * HIGH;
  const int steps = (k + 64 * DEEP - 1) / (64 * DEEP);

  auto load = [&](int step) {
    char* stage = shared + step % STAGES * STAGE;
#pragma unroll
    for (int turn = 0; turn < DEEP * ROWS * 8 / THREADS; ++turn) {
      const int i = turn * THREADS + threadIdx.x;
      const int unit = i % 8, row = i / 8 % ROWS, panel = i / 8 / ROWS;
      const int column = (step * DEEP + panel) * 64 + unit * 8;
      bool there = column < k;
      const unsigned short* from = x;
      if (row < WIDE) {
        there = there && token0 + row < m;
        if (there) from = x + (token0 + row) * k + column;
      } else {
        const int r = row - WIDE, feature = feature0 + (r & ~31) + (r & 6) * 4 + (r >> 3 & 3) * 2 + (r & 1);
        there = there && feature < n;
        if (there) from = w + (long long)feature * k + column;
      }
      tvms_copy_async(stage + panel * PANEL + tvms_unit<8>(row, unit), from, there ? 16 : 0);
    }
  };

  float sums[A][2 * B][4];
#pragma unroll
  for (int i = 0; i < A * B * 8; ++i) (&sums[0][0][0])[i] = 0.f;
#pragma unroll
  for (int step = 0; step < STAGES - 1; ++step) {
    if (step < steps) load(step);
    tvms_commit();
  }
  for (int step = 0; step < steps; ++step) {
    tvms_wait<STAGES - 2>();
    __syncthreads();  // this step's copies are there for all, and nobody reads the stage before any more
    if (step + STAGES - 1 < steps) load(step + STAGES - 1);
    tvms_commit();
    const char* panel = shared + step % STAGES * STAGE + deep * PANEL;
    unsigned a[2][A][4], b[2][B][4];
    auto fetch = [&](int to, int unit) {
#pragma unroll
      for (int i = 0; i < A; ++i) tvms_rows<8>(a[to][i], panel, across * TOKENS + 16 * i, unit);
#pragma unroll
      for (int j = 0; j < B; ++j) tvms_rows<8>(b[to][j], panel, WIDE + down * FEATURES + 16 * j, unit);
    };
    fetch(0, 0);
#pragma unroll
    for (int part = 0; part < 4; ++part) {
      if (part < 3) fetch((part + 1) & 1, 2 * part + 2);
#pragma unroll
      for (int i = 0; i < A; ++i)
#pragma unroll
        for (int j = 0; j < B; ++j) {
          tvms_mma_bf16(sums[i][2 * j], a[part & 1][i], b[part & 1][j][0], b[part & 1][j][2]);
          tvms_mma_bf16(sums[i][2 * j + 1], a[part & 1][i], b[part & 1][j][1], b[part & 1][j][3]);
        }
    }
  }

  if (DEEP > 1) {
    float* parts = (float*)shared;
    const int place = warp % (ACROSS * DOWN) * 32 + lane;
    __syncthreads();
    if (deep > 0)
#pragma unroll
      for (int i = 0; i < A * B * 8; ++i)
        parts[((deep - 1) * A * B * 8 + i) * (THREADS / DEEP) + place] = (&sums[0][0][0])[i];
    __syncthreads();
    if (deep > 0) return;
#pragma unroll
    for (int part = 0; part < DEEP - 1; ++part)
#pragma unroll
      for (int i = 0; i < A * B * 8; ++i)
        (&sums[0][0][0])[i] += parts[(part * A * B * 8 + i) * (THREADS / DEEP) + place];
  }
#pragma unroll
  for (int i = 0; i < A; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const long long token = token0 + across * TOKENS + 16 * i + 8 * half + lane / 4;
      if (token >= m) continue;
#pragma unroll
      for (int q = 0; q < FEATURES / 32; ++q) {
        const int feature = feature0 + down * FEATURES + 32 * q + 8 * (lane & 3);
        float row[8];
#pragma unroll
        for (int j = 0; j < 4; ++j)
          row[2 * j] = sums[i][4 * q + j][2 * half], row[2 * j + 1] = sums[i][4 * q + j][2 * half + 1];
        tvms_store_row<n>(y + token * n + feature, row, n - feature);
      }
    }
}
#endif
"""

# The tile of many tokens, by the fastest way that an architecture has.
_MANY = r"""
#ifndef TVMS_MATMUL_MANY
#define TVMS_MATMUL_MANY
template <int STAGES, int N, int K, class Out>
__device__ __forceinline__ void tvms_matmul_many(const void* x, const void* w, void* y, void* shared, long long m) {
#ifdef TVMS_WARPGROUP
  tvms_matmul_groups<STAGES, N, K, Out>(x, w, y, shared, m);
#else
  tvms_matmul<64, 64, 2, 4, 1, STAGES, N, K, Out>(x, w, y, shared, m);
#endif
}
#endif
"""

# tokens and features of a warp, warps side by side in tokens, in features, in columns
TILES = (
    (16, 32, 1, 1, 8),
    (16, 64, 1, 1, 8),
    (32, 64, 1, 2, 4),
    (64, 32, 1, 4, 2),
    (64, 64, 2, 4, 1),
)
_SHARED = 208 << 10  # bytes a CTA


def takes(spec: KernelSpec) -> bool:
    """bfloat16 in, rows of whole 16 bytes, more than one token."""
    return not spec.choice.options and spec.x_dtype == "bfloat16" and spec.k % 8 == 0 and spec.m != 1


def space(spec: KernelSpec) -> tuple[Decision, ...]:
    """`tile` is one of TILES, `stages` what is held of it at a time (or as many as have room)."""
    wanted = spec.m or 2048
    fitting = next((i for i, tile in enumerate(TILES) if tile[0] * tile[2] >= wanted), len(TILES) - 1)
    return (
        Decision("tile", tuple(range(len(TILES))), fitting),
        Decision("stages", (2, 3, 4, 6), 4),
    )


def build(spec: KernelSpec, decisions: Mapping[str, int]) -> tvm.tirx.PrimFunc:
    """(x [m, k] bfloat16, weight [n, k] bfloat16, y [m, n])."""
    n, k, m = spec.n, spec.k, tokens_of(spec)
    tile = tokens, features, across, down, deep = TILES[decisions["tile"]]
    wide, high = tokens * across, features * down
    stage = deep * (wide + high) * 128
    many = tile == TILES[-1]
    stages = max(2 + many, min(decisions["stages"], _SHARED // stage))
    threads = WARP * across * down * deep
    out = {"bfloat16": "unsigned short", "float32": "float"}[spec.out_dtype]
    code = tensor_core.SOURCE + _SOURCE + matmul_warpgroup.SOURCE + _MANY
    name, numbers = ("tvms_matmul_many", (stages, n, k)) if many else ("tvms_matmul", (*tile, stages, n, k))
    name += f"<{', '.join(map(str, numbers))}, {out}>"

    def multiply(x, weight, y, operands):
        pointers = [buffer.data for buffer in (x, weight, y, operands)]  # address_of would shrink them to one element
        return T.evaluate(T.cuda.func_call(name, *pointers, T.cast(m, "int64"), source_code=code))

    @T.prim_func(s_tir=True)
    def matmul_mma(
        x: T.Buffer((m, k), "bfloat16"),
        weight: T.Buffer((n, k), "bfloat16"),
        y: T.Buffer((m, n), spec.out_dtype),
    ):
        tokens_at = T.launch_thread("blockIdx.x", T.ceildiv(m, wide))
        features_at = T.launch_thread("blockIdx.y", T.ceildiv(n, high))
        thread = T.launch_thread("threadIdx.x", threads)
        operands = T.alloc_buffer((stages * stage,), "uint8", scope="shared.dyn")
        multiply(x, weight, y, operands)

    return matmul_mma
