"""Tiles back to a dense matrix, on a GPU: the walk of the matmul, with each lane writing its elements out.

A lane has 8 neighbouring columns of a block of each of its rows: 16 bytes, once both steps of the block are there.
"""

from __future__ import annotations

import tvm
from tvm.script import tirx as T

from tvm_sparse.formats.tiles import cut_of
from tvm_sparse.schedules.cuda.device_code import WARP, symbol
from tvm_sparse.schedules.cuda.tensor_core import SOURCE as TENSOR_CORE
from tvm_sparse.schedules.cuda.tile_ring import SOURCE as RING_SOURCE
from tvm_sparse.schedules.cuda.tile_ring import ring_bytes
from tvm_sparse.schedules.spec import KernelSpec

_KERNEL = r"""
#ifndef TVMS_DECODE_TILES
#define TVMS_DECODE_TILES
__device__ __forceinline__ unsigned tvms_with_base(unsigned pair, unsigned base) {
  // The words' exponent codes become exponents, zeros stay.
  return pair + (pair & 0x7fffu ? base : 0) + (pair & 0x7fff0000u ? base << 16 : 0);
}
template <int GAP_BITS, int PARTS, int SETS, int TILES, int K>
__device__ __forceinline__ void tvms_decode_tiles(
    const void* words, const unsigned* counts, const int* warps, const int* rows, const int* row_ends,
    const int* scale, const int* res_col, const void* res_val, void* dense, void* memory) {
  const int REGISTERS = 2 * TILES, BLOCKS = (K + 31) / 32, PLACES = SETS * TILES * 8;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, part = warp / SETS;
  tvms_ring<GAP_BITS, PARTS * SETS, REGISTERS> own;
  own.begin(words, counts, warps, memory);
  const unsigned base = (unsigned)*scale << 7;
  const int* places = rows + blockIdx.x * PLACES;
  int row[TILES];
#pragma unroll
  for (int i = 0; i < TILES; ++i) row[i] = places[(warp % SETS * TILES + i) * 8 + lane / 4];
  const int begin = BLOCKS * part / PARTS, end = BLOCKS * (part + 1) / PARTS;
  int steps = 2 * begin;
  unsigned first[REGISTERS];
  auto write = [&]() {
    unsigned b[REGISTERS];
    own.take(b, [](int i) { return i; });
#pragma unroll
    for (int i = 0; i < REGISTERS; ++i) b[i] = tvms_with_base(b[i], base);
    const int column = steps / 2 * 32 + lane % 4 * 8;
    if (steps++ % 2 == 0) {
#pragma unroll
      for (int i = 0; i < REGISTERS; ++i) first[i] = b[i];
      return;
    }
#pragma unroll
    for (int i = 0; i < TILES; ++i)
      if (row[i] >= 0 && column < K)  // counted in 16 bytes, so that 32 bits are enough: registers are short
        ((uint4*)dense)[(unsigned)row[i] * (K / 8) + column / 8] =
            make_uint4(first[2 * i], first[2 * i + 1], b[2 * i], b[2 * i + 1]);
  };
  own.walk([&](unsigned passed) {
    for (; passed; --passed) write();
  });
  while (steps < 2 * end) write();
  __syncthreads();  // the residual's places have been written as zeros
  for (int place = threadIdx.x; place < PLACES; place += PARTS * SETS * 32) {
    const int slot = blockIdx.x * PLACES + place;
    for (int r = slot ? row_ends[slot - 1] : 0; r < row_ends[slot]; ++r)
      ((ushort*)dense)[(long long)places[place] * K + res_col[r]] = ((const ushort*)res_val)[r];
  }
}
#endif
"""


def build(spec: KernelSpec) -> tvm.tirx.PrimFunc:
    """(words, counts, warps, rows, scale, res_col, res_val, w [n, k] bfloat16); k a multiple of 8."""
    n, k = spec.n, spec.k
    cut = cut_of((n, k), spec.choice)
    rounds, nc, nr = symbol("rounds"), symbol("nc"), symbol("nr")
    numbers = ", ".join(map(str, (cut.gap_bits, cut.parts, cut.sets, cut.tiles, k)))

    @T.prim_func(s_tir=True)
    def decode_tiles(
        words: T.Buffer((rounds, WARP, 8), "uint16"),
        counts: T.Buffer((nc,), "uint32"),
        warps: T.Buffer((cut.bins * cut.warps, 4), "int32"),
        rows: T.Buffer((2, cut.bins * cut.rows), "int32"),
        scale: T.Buffer((1,), "int32"),
        res_col: T.Buffer((nr,), "int32"),
        res_val: T.Buffer((nr,), "bfloat16"),
        w: T.Buffer((n, k), "bfloat16"),
    ):
        T.launch_thread("blockIdx.x", cut.bins)
        T.launch_thread("threadIdx.x", cut.warps * WARP)
        shared = T.alloc_buffer((ring_bytes(cut) // 4,), "uint32", scope="shared.dyn")
        T.evaluate(
            T.cuda.func_call(
                f"tvms_decode_tiles<{numbers}>",
                T.address_of(words[0, 0, 0]),
                T.address_of(counts[0]),
                T.address_of(warps[0, 0]),
                T.address_of(rows[0, 0]),
                T.address_of(rows[1, 0]),
                T.address_of(scale[0]),
                T.address_of(res_col[0]),
                T.address_of(res_val[0]),
                T.address_of(w[0, 0]),
                shared.data,  # address_of would make TVM shrink it to one element
                source_code=TENSOR_CORE + RING_SOURCE + _KERNEL,
            )
        )

    return decode_tiles
