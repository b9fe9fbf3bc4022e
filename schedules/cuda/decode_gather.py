"""The gather format back to a dense matrix, on a GPU: a CTA has a bin's rows in one span, a warp one of them at a time.

It walks the chunks of its group for this one row, each lane by its own gaps, and puts values into the row's columns,
which stand in shared memory and are written whole.
"""

from __future__ import annotations

import tvm
from tvm.script import tirx as T

from tvm_sparse.formats.gather import ROWS, cut_of
from tvm_sparse.schedules.cuda.device_code import WARP, symbol
from tvm_sparse.schedules.cuda.token_tile import SHARED_LIMIT
from tvm_sparse.schedules.spec import KernelSpec

_WARPS = 24

_SOURCE = r"""
#ifndef TVMS_DECODE_GATHER
#define TVMS_DECODE_GATHER
template <int GAP_BITS, int WARPS, int CLASSES, int SPANS, int GROUPS, int AT_ONCE, int K>
__device__ __forceinline__ void tvms_decode_gather(
    const ushort* words, const int* warps, const int* groups, const int* rows, const int* row_ends,
    const int* row_slots, const int* scale, const int* res_col, const void* res_val, void* dense, void* memory, int bin,
    int span) {
  const int COLUMNS = (K + 8 * SPANS - 1) / (8 * SPANS) * 8, SHIFT = 15 - GAP_BITS;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const unsigned base = (unsigned)*scale << 7;
  uint4* own = (uint4*)memory + warp * (COLUMNS / 8);
  ushort* row = (ushort*)own;
  for (int i = lane; i < COLUMNS / 8; i += 32) own[i] = make_uint4(0, 0, 0, 0);
  __syncwarp();
  // Neighbouring warps take rows of one group, whose words they share.
  int* entry_of = (int*)((char*)memory + AT_ONCE * COLUMNS * 2);
  for (int i = threadIdx.x; i < GROUPS * 8; i += AT_ONCE * 32) entry_of[row_slots[bin * GROUPS * 8 + i]] = i;
  __syncthreads();
  const int* job = warps + 2 * (bin * SPANS + span) * WARPS;
  for (int i = warp; i < GROUPS * 8; i += AT_ONCE) {
    const int place = i % 8, at = bin * GROUPS * 8 + entry_of[i], target = rows[at];
    if (target < 0) continue;
    const int* pieces = groups + (bin * SPANS + span) * (GROUPS + 1) + i / 8;
    for (int piece = pieces[0]; piece < pieces[1]; ++piece) {
      int owner = 0;  // the last warp whose first piece is not behind this one
#pragma unroll 8
      for (int w = 1; w < WARPS; ++w) owner += job[2 * w + 1] <= piece;
      const ushort* head = words + (long long)job[2 * owner] * 256;
      auto chunks = [&]() { return head[0] >> 12 | head[1] >> 12 << 4 | head[2] >> 12 << 8; };
      for (int before = job[2 * owner + 1]; before < piece; ++before) head += (1 + chunks()) * 256;
      int column = (head[lane * 8 + place] & 0xfff) - 1;
      const int count = chunks();
      const ushort* gap_at = head + 256 + lane * 8 + place;
      const int value_lane = place % 4 * 8 + lane / 8 % 2 * 4 + lane / 2 % 4;
      const ushort* value_at = head + 256 + value_lane * 8 + place / 4 * 4 + lane / 16 * 2 + lane % 2;
#pragma unroll 8
      for (int i = 0; i < count; ++i) {
        const unsigned word = value_at[i * 256], code = word & ((1 << SHIFT) - 1);
        column += gap_at[i * 256] >> SHIFT & ((1 << GAP_BITS) - 1);
        if (code) row[column * CLASSES + lane % CLASSES] = (word & 0x8000) | (code + base);
      }
    }
    __syncwarp();
    for (int r = (at ? row_ends[at - 1] : 0) + lane; r < row_ends[at]; r += 32)
      if (res_col[r] / COLUMNS == span) row[res_col[r] % COLUMNS] = ((const ushort*)res_val)[r];
    __syncwarp();
    ushort* to = (ushort*)dense + (long long)target * K + span * COLUMNS;
    for (int i = lane; i < COLUMNS / 8; i += 32) {
      if (span * COLUMNS + i * 8 < K) ((uint4*)to)[i] = own[i];
      own[i] = make_uint4(0, 0, 0, 0);
    }
    __syncwarp();
  }
}
#endif
"""


def build(spec: KernelSpec) -> tvm.tirx.PrimFunc:
    """(words, warps, groups, rows, scale, res_col, res_val, w [n, k] bfloat16); k a multiple of 8."""
    n, k = spec.n, spec.k
    cut = cut_of((n, k), spec.choice)
    chunks, nr = symbol("chunks"), symbol("nr")
    at_once = min(_WARPS, SHARED_LIMIT // (2 * cut.columns))
    numbers = (cut.gap_bits, cut.warps, cut.classes, cut.spans, cut.groups, at_once, k)

    @T.prim_func(s_tir=True)
    def decode_gather(
        words: T.Buffer((chunks, WARP, 8), "uint16"),
        warps: T.Buffer((cut.bins * cut.spans * cut.warps + 1, 2), "int32"),
        groups: T.Buffer((cut.bins, cut.spans, cut.groups + 1), "int32"),
        rows: T.Buffer((3, ROWS * cut.bins * cut.groups), "int32"),
        scale: T.Buffer((1,), "int32"),
        res_col: T.Buffer((nr,), "int32"),
        res_val: T.Buffer((nr,), "bfloat16"),
        w: T.Buffer((n, k), "bfloat16"),
    ):
        block = T.launch_thread("blockIdx.x", cut.bins * cut.spans)
        T.launch_thread("threadIdx.x", at_once * WARP)
        shared = T.alloc_buffer((at_once * cut.columns // 2 + ROWS * cut.groups,), "uint32", scope="shared.dyn")
        T.evaluate(
            T.cuda.func_call(
                f"tvms_decode_gather<{', '.join(map(str, numbers))}>",
                T.address_of(words[0, 0, 0]),
                T.address_of(warps[0, 0]),
                T.address_of(groups[0, 0, 0]),
                T.address_of(rows[0, 0]),
                T.address_of(rows[1, 0]),
                T.address_of(rows[2, 0]),
                T.address_of(scale[0]),
                T.address_of(res_col[0]),
                T.address_of(res_val[0]),
                T.address_of(w[0, 0]),
                shared.data,  # address_of would make TVM shrink it to one element
                block // cut.spans,
                block % cut.spans,
                source_code=_SOURCE,
            )
        )

    return decode_gather
