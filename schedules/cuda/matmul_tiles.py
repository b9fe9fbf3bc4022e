"""y = x W^T with W as tiles, on a GPU's tensor cores: the kernel of 2 to 16 tokens.

A CTA owns a bin of rows, a warp some of its tiles and a part of the columns; formats/tiles.py says which elements a
lane's stream holds, tile_ring.py how they become fragments of mma.m16n8k16, a step of 16 columns at a time. Up to 8
tokens two tiles of W are the first operand and x the second; from 9 to 16 x is the first, a tile the second. x comes
from memory, one block of columns ahead, and is scaled by 2^96 on the way; a float32 x is the sum of three bfloat16.

The parts' sums of a row are added in order, so two runs agree bit for bit. Words are read again for every 16 tokens.
"""

from __future__ import annotations

from collections.abc import Mapping

import tvm
from tvm.script import tirx as T

from tvm_sparse.formats.tiles import cut_of
from tvm_sparse.schedules.cuda.dependent_launch import ALONE, dependent
from tvm_sparse.schedules.cuda.device_code import TYPES, WARP, symbol
from tvm_sparse.schedules.cuda.tensor_core import SOURCE as TENSOR_CORE
from tvm_sparse.schedules.cuda.tile_ring import SOURCE as RING_SOURCE
from tvm_sparse.schedules.cuda.tile_ring import ring_bytes
from tvm_sparse.schedules.cuda.token_tile import tokens_of
from tvm_sparse.schedules.spec import KernelSpec
from tvm_sparse.schedules.table import Decision

_KERNEL = r"""
#ifndef TVMS_TILES_X
#define TVMS_TILES_X
// 8 columns of a token as they stand in memory, and as fragments: two steps of two registers for each bfloat16 summand.
template <typename X> struct tvms_eight;
template <> struct tvms_eight<nv_bfloat16> {
  static const int PARTS = 1, AT_ONCE = 8;
  uint4 raw;
  __device__ __forceinline__ void load(const nv_bfloat16* from) { raw = tvms_quad(from); }
  __device__ __forceinline__ void load_some(const nv_bfloat16* from, int count) {
    unsigned w[4] = {0, 0, 0, 0};
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (i < count) w[i / 2] |= tvms_half(from + i) << (i % 2 * 16);
    raw = make_uint4(w[0], w[1], w[2], w[3]);
  }
  __device__ __forceinline__ void fragments(unsigned (*to)[4]) const {
    to[0][0] = tvms_scale_pair(raw.x), to[0][1] = tvms_scale_pair(raw.y);
    to[0][2] = tvms_scale_pair(raw.z), to[0][3] = tvms_scale_pair(raw.w);
  }
};
template <> struct tvms_eight<float> {
  static const int PARTS = 3, AT_ONCE = 4;
  uint4 low, high;
  __device__ __forceinline__ void load(const float* from) { low = tvms_quad(from), high = tvms_quad(from + 4); }
  __device__ __forceinline__ void load_some(const float* from, int count) {
    unsigned w[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) w[i] = i < count ? tvms_one(from + i) : 0;
    low = make_uint4(w[0], w[1], w[2], w[3]), high = make_uint4(w[4], w[5], w[6], w[7]);
  }
  __device__ __forceinline__ void fragments(unsigned (*to)[4]) const {
    // The upper 8 bits of what is left, three times: 24 bits, exactly.
    unsigned w[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float a = __uint_as_float(w[2 * i]), b = __uint_as_float(w[2 * i + 1]);
      a = fabsf(a) >= 4294967296.f ? copysignf(3.0e38f, a) : a * 79228162514264337593543950336.f;
      b = fabsf(b) >= 4294967296.f ? copysignf(3.0e38f, b) : b * 79228162514264337593543950336.f;
#pragma unroll
      for (int part = 0; part < 3; ++part) {
        unsigned upper_a = __float_as_uint(a) & 0xffff0000u, upper_b = __float_as_uint(b) & 0xffff0000u;
        to[part][i] = upper_a >> 16 | upper_b;
        a -= __uint_as_float(upper_a), b -= __uint_as_float(upper_b);
      }
    }
  }
};
// Of all tokens a lane multiplies, one block of columns after the other.
template <int K, int HALVES, typename X> struct tvms_columns_of_x {
  tvms_eight<X> eight[HALVES];
  const X *row[HALVES], *at[HALVES];
  int next, column, last;
  __device__ __forceinline__ void begin(const X* x, int first, int token, int left) {
    next = first, last = K - 32 + first % 32;
#pragma unroll
    for (int half = 0; half < HALVES; ++half) {
      const X* from = x + (token + 8 * half < left ? (long long)(token + 8 * half) * K : 0);
      row[half] = (const X*)__shfl_sync(0xffffffffu, (unsigned long long)from, threadIdx.x & 31);  // to be kept
    }
    advance();
  }
  // Where `fetch` reads, a step before it does: a register that a load still has to read makes its next writer wait.
  __device__ __forceinline__ void advance() {
    column = next;
#pragma unroll
    for (int half = 0; half < HALVES; ++half) at[half] = row[half] + column;
    // Behind the last block its columns once more: never multiplied.
    next = K % 32 ? column + 32 : min(column + 32, last);
  }
  __device__ __forceinline__ void fetch() {
#pragma unroll
    for (int half = 0; half < HALVES; ++half) {
      if (K % 32 == 0 || (K % tvms_eight<X>::AT_ONCE == 0 && column + 8 <= K)) {
        eight[half].load(at[half]);
      } else {
        eight[half].load_some(at[half], K - column);
      }
    }
  }
};
__device__ __forceinline__ float tvms_of_x(const nv_bfloat16* x) { return __uint_as_float(tvms_half(x) << 16); }
__device__ __forceinline__ float tvms_of_x(const float* x) { return __uint_as_float(tvms_one(x)); }
#endif

#ifndef TVMS_TILES_KERNEL
#define TVMS_TILES_KERNEL
template <int GAP_BITS, int PARTS, int SETS, int TILES, int TOKENS, int N, int K, typename X, typename Y>
__device__ __forceinline__ void tvms_tiles(
    const X* x, const void* words, const unsigned* counts, const int* warps, const int* rows, const int* row_ends,
    const int* scale, const int* res_col, const nv_bfloat16* res_val, Y* y, void* memory, int left) {
  tvms_start_dependents();
  const int REGISTERS = 2 * TILES, PAIRS = (TILES + 1) / 2, BLOCKS = (K + 31) / 32, PLACES = SETS * TILES * 8;
  const int SUMMANDS = tvms_eight<X>::PARTS, HALVES = TOKENS / 8;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, c = lane & 3, part = warp / SETS;
  tvms_ring<GAP_BITS, PARTS * SETS, REGISTERS> own;
  own.begin(words, counts, warps, memory);
  const float by = __uint_as_float((unsigned)((int)tvms_one(scale) + (127 - 96)) << 23);  // 2^(base - 96)
  const int SUMS = TOKENS == 8 ? PAIRS : TILES;
  float sums[SUMS][4];
#pragma unroll
  for (int i = 0; i < SUMS; ++i) sums[i][0] = sums[i][1] = sums[i][2] = sums[i][3] = 0.f;

  // A token that is not there reads the first one's x, whose sums nobody asks for.
  tvms_columns_of_x<K, HALVES, X> ahead;
  ahead.begin(x, BLOCKS * part / PARTS * 32 + 8 * c, g, left);
  const int* slots = rows + blockIdx.x * PLACES;
  const int* ends = row_ends + blockIdx.x * PLACES;
  // Which row the thread sums at the end, and where its residual values begin and end: asked for here, not waited for.
  const int THREADS = PARTS * SETS * 32, AT_ONCE = THREADS < PLACES ? 1 : THREADS / PLACES;
  int row = -1, begin = 0, end = 0;
  auto find = [&](int i) {
    const int place = i % PLACES;
    if (i >= PLACES * AT_ONCE) return;
    row = (int)tvms_one(slots + place), end = (int)tvms_one(ends + place);
    begin = place || blockIdx.x ? (int)tvms_one(ends + place - 1) : 0;
  };
  find(threadIdx.x);
  tvms_wait_for_inputs();
  ahead.fetch();
  // A step's registers are asked for two steps before they are multiplied, so that words are stored meanwhile. Before
  // the first one stands a block of zeros.
  unsigned first[4 * PAIRS], second[4 * PAIRS], fragment[HALVES][SUMMANDS][4];
#pragma unroll
  for (int i = 0; i < 4 * PAIRS; ++i) first[i] = second[i] = 0;
#pragma unroll
  for (int i = 0; i < HALVES * SUMMANDS * 4; ++i) fragment[0][0][i] = 0;
  auto multiply = [&](const unsigned* b, int of) {
#pragma unroll
    for (int s = 0; s < SUMMANDS; ++s) {
      const unsigned* lower = fragment[0][s] + of;
      const unsigned* upper = fragment[HALVES - 1][s] + of;
      if (TOKENS == 8) {
#pragma unroll
        for (int i = 0; i < PAIRS; ++i) tvms_mma_bf16(sums[i], b + 4 * i, lower[0], lower[1]);
      } else {
        const unsigned a[4] = {lower[0], upper[0], lower[1], upper[1]};
#pragma unroll
        for (int i = 0; i < TILES; ++i) tvms_mma_bf16(sums[i], a, b[2 * i], b[2 * i + 1]);
      }
    }
  };
  auto multiply_first = [&]() {
    multiply(first, 0);
    ahead.advance();
  };
  auto multiply_second = [&]() {
    multiply(second, 2);
#pragma unroll
    for (int half = 0; half < HALVES; ++half) ahead.eight[half].fragments(fragment[half]);
    ahead.fetch();
  };
  // Up to 8 tokens b0 and b1 of two tiles in a's order, both b0, both b1; a last tile has none beside it.
  auto order = [](int i) { return TOKENS == 8 && i % 4 % 3 ? i ^ 3 : i; };
  unsigned odd = 0;
  own.walk([&](unsigned steps) {
#pragma unroll 1
    for (; steps; --steps, odd ^= 1) {
      if (odd) {
        multiply_second();
        own.take(second, order);
      } else {
        multiply_first();
        own.take(first, order);
      }
    }
  });
  if (odd) multiply_second(), multiply_first();
  else multiply_first(), multiply_second();

  // Each warp's sums over the rings, [token][row of the set]; 4 more a token, so that its lanes meet in no bank.
  __syncthreads();
  const int ROWS = TILES * 8, PITCH = ROWS + 4, ROOM = TOKENS * PITCH * 4;
  auto leave = [&](int row, int token, float sum) { tvms_put_float(warp * ROOM + (token * PITCH + row) * 4, sum); };
#pragma unroll
  for (int i = 0; i < SUMS; ++i) {
    if (TOKENS == 8) {
      leave(16 * i + g, 2 * c, sums[i][0]), leave(16 * i + g, 2 * c + 1, sums[i][1]);
      if (2 * i + 1 < TILES) leave(16 * i + 8 + g, 2 * c, sums[i][2]), leave(16 * i + 8 + g, 2 * c + 1, sums[i][3]);
    } else {
      leave(8 * i + 2 * c, g, sums[i][0]), leave(8 * i + 2 * c + 1, g, sums[i][1]);
      leave(8 * i + 2 * c, g + 8, sums[i][2]), leave(8 * i + 2 * c + 1, g + 8, sums[i][3]);
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < PLACES * AT_ONCE; i += THREADS, find(i)) {
    const int place = i % PLACES;
    if (row < 0) continue;
    for (int token = i / PLACES; token < min(TOKENS, left); token += AT_ONCE) {
      float total = 0.f;
      for (int p = 0; p < PARTS; ++p)
        total += tvms_get_float((p * SETS + place / ROWS) * ROOM + (token * PITCH + place % ROWS) * 4);
      total *= by;
      for (int r = begin; r < end; ++r)
        total += tvms_of_x(res_val + r) * tvms_of_x(x + (long long)token * K + res_col[r]);
      tvms_leave(y + (long long)token * N + row, total);
    }
  }
}
#endif
"""
SOURCE = TENSOR_CORE + RING_SOURCE + _KERNEL


def space(spec: KernelSpec) -> tuple[Decision, ...]:
    """`tile` tokens a CTA multiplies at a time."""
    return (Decision("tile", (8, 16), 8 if spec.m is not None and spec.m <= 8 else 16),)


def build(spec: KernelSpec, decisions: Mapping[str, int]) -> tvm.tirx.PrimFunc:
    """(x [m, k], words, counts, warps, rows, scale, res_col, res_val, y [m, n])."""
    n, k, m = spec.n, spec.k, tokens_of(spec)
    cut, tile = cut_of((n, k), spec.choice), decisions["tile"]
    rounds, nc, nr = symbol("rounds"), symbol("nc"), symbol("nr")
    numbers = (cut.gap_bits, cut.parts, cut.sets, cut.tiles, tile, n, k)
    arguments = ", ".join([*map(str, numbers), TYPES[spec.x_dtype], TYPES[spec.out_dtype]])
    room = max(ALONE, ring_bytes(cut))

    @T.prim_func(s_tir=True)
    def matmul_tiles(
        x: T.Buffer((m, k), spec.x_dtype),
        words: T.Buffer((rounds, WARP, 8), "uint16"),
        counts: T.Buffer((nc,), "uint32"),
        warps: T.Buffer((cut.bins * cut.warps, 4), "int32"),
        rows: T.Buffer((2, cut.bins * cut.rows), "int32"),
        scale: T.Buffer((1,), "int32"),
        res_col: T.Buffer((nr,), "int32"),
        res_val: T.Buffer((nr,), "bfloat16"),
        y: T.Buffer((m, n), spec.out_dtype),
    ):
        bin = T.launch_thread("blockIdx.x", cut.bins)
        tiles = T.launch_thread("blockIdx.y", T.ceildiv(m, tile))
        thread = T.launch_thread("threadIdx.x", cut.warps * WARP)
        shared = T.alloc_buffer((room // 4,), "uint32", scope="shared.dyn")
        T.evaluate(
            T.cuda.func_call(
                f"tvms_tiles<{arguments}>",
                T.address_of(x[tiles * tile, 0]),
                T.address_of(words[0, 0, 0]),
                T.address_of(counts[0]),
                T.address_of(warps[0, 0]),
                T.address_of(rows[0, 0]),
                T.address_of(rows[1, 0]),
                T.address_of(scale[0]),
                T.address_of(res_col[0]),
                T.address_of(res_val[0]),
                T.address_of(y[tiles * tile, 0]),
                shared.data,  # address_of would make TVM shrink it to one element
                T.cast(m - tiles * tile, "int32"),
                source_code=SOURCE,
            )
        )

    return dependent(matmul_tiles)
