"""A bitmap back to a dense matrix, on a GPU: one warp a row, 512 columns at a time.

A lane reads two bytes of the mask, 256 columns apart. How many values stand before a byte's first is a sum over the
lanes below, both at once as halves of a word. Then lane l takes the bits of 4 columns, 128 neighbours a turn, so that a
warp's loads of values stay within two cache lines and its stores are contiguous.

    columns      0 .. 7        8 .. 15       ...        mask bytes b0, b1, ...
    values       v v v         v v           ...        those of b1 begin popcount(b0) later
    lanes        0     1       2     3                  half a byte each
"""

from __future__ import annotations

import tvm
from tvm.script import tirx as T

from tvm_sparse.schedules.cuda.device_code import WARP, symbol
from tvm_sparse.schedules.spec import KernelSpec

_WARPS = 8  # rows a CTA

_SOURCE = """
#ifndef TVMS_DECODE_BITMAP
#define TVMS_DECODE_BITMAP
template <int K>
__device__ __forceinline__ void tvms_decode_bitmap(const void* mask, const void* stored, void* row) {
  constexpr int BYTES = K / 8;
  const unsigned char* bytes = (const unsigned char*)mask;
  const unsigned short* values = (const unsigned short*)stored;
  uint2* columns = (uint2*)row;
  const int lane = threadIdx.x & 31;
  unsigned ahead[2];  // the masks of the next step, on their way
  for (int d = 0; d < 2; ++d) ahead[d] = 32 * d + lane < BYTES ? bytes[32 * d + lane] : 0u;
  for (int first = 0; first < BYTES; first += 64) {
    unsigned byte[2] = {ahead[0], ahead[1]};
#pragma unroll
    for (int d = 0; d < 2; ++d) {
      const int at = first + 64 + 32 * d + lane;
      ahead[d] = at < BYTES ? bytes[at] : 0u;
    }
    const unsigned counts = __popc(byte[0]) | __popc(byte[1]) << 16;
    unsigned upto = counts;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const unsigned below = __shfl_up_sync(0xffffffffu, upto, step);
      if (lane >= step) upto += below;
    }
    const unsigned all = __shfl_sync(0xffffffffu, upto, 31), before = upto - counts + (all << 16);
#pragma unroll
    for (int turn = 0; turn < 4; ++turn) {
      const int from = 16 * (turn & 1) + lane / 2;
      unsigned bits = __shfl_sync(0xffffffffu, byte[turn / 2], from);
      const unsigned places = __shfl_sync(0xffffffffu, before, from);
      const unsigned short* v = values + (turn < 2 ? places & 0xffffu : places >> 16);
      if (lane & 1) v += __popc(bits & 15u), bits >>= 4;
      // All four are loaded, needed or not: no branches. After the last value stand zeros enough.
      const int second = bits & 1, third = second + (bits >> 1 & 1), fourth = third + (bits >> 2 & 1);
      const unsigned low = v[0] * (bits & 1) + v[second] * ((bits & 2) << 15);
      const unsigned high = v[third] * (bits >> 2 & 1) + v[fourth] * ((bits & 8) << 13);
      const int four = first * 2 + 32 * turn + lane;
      if (four < 2 * BYTES) columns[four] = make_uint2(low, high);
    }
    values += (all & 0xffffu) + (all >> 16);
  }
}
#endif
"""


def build(spec: KernelSpec) -> tvm.tirx.PrimFunc:
    """(mask, row_start, values, w [n, k] bfloat16); k a multiple of 8."""
    n, k = spec.n, spec.k
    words = -(-k // WARP)
    stored = symbol("nv")

    def decode(mask, values, w):
        pointers = [T.address_of(element) for element in (mask, values, w)]
        return T.evaluate(T.cuda.func_call(f"tvms_decode_bitmap<{k}>", *pointers, source_code=_SOURCE))

    @T.prim_func(s_tir=True)
    def decode_bitmap(
        mask: T.Buffer((n, words), "uint32"),
        row_start: T.Buffer((n + 1,), "int32"),
        values: T.Buffer((stored,), "bfloat16"),
        w: T.Buffer((n, k), "bfloat16"),
    ):
        block = T.launch_thread("blockIdx.x", T.ceildiv(n, _WARPS))
        thread = T.launch_thread("threadIdx.x", _WARPS * WARP)
        row: T.let[T.int32] = block * _WARPS + thread // WARP
        if row < n:
            decode(mask[row, 0], values[row_start[row]], w[row, 0])

    return decode_bitmap
