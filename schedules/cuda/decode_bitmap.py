"""A bitmap back to a dense matrix, on a GPU: one warp a row, 8 columns a lane.

A lane reads the mask byte of its columns; how many values stand before its own is a sum over the lanes below. Mask
bytes and results are contiguous over a warp, and values nearly so.

    lane            0               1              ...
    mask byte       0b00010010      0b10000001
    values          1 4 | 8 15 | ...                    a lane's first value: row's + those of the lanes below
"""

from __future__ import annotations

import tvm
from tvm.script import tirx as T

from tvm_sparse.schedules.cuda.device_code import WARP, symbol
from tvm_sparse.schedules.spec import KernelSpec

_WARPS = 8  # rows a CTA
_DEPTH = 2  # bytes of the mask a lane has in flight

_SCAN = """
__device__ __forceinline__ int tvms_scan(int count) {
  // The sum over this lane and those below.
  for (int step = 1; step < 32; step *= 2) {
    int below = __shfl_up_sync(0xffffffffu, count, step);
    if ((threadIdx.x & 31) >= step) count += below;
  }
  return count;
}
"""
_LAST = """
__device__ __forceinline__ int tvms_last(int value) { return __shfl_sync(0xffffffffu, value, 31); }
"""


def build(spec: KernelSpec) -> tvm.tirx.PrimFunc:
    """(mask, row_start, values, w [n, k] bfloat16); k a multiple of 8."""
    n, k = spec.n, spec.k
    words = -(-k // WARP)
    stored = symbol("nv")

    def scan(count):
        return T.cuda.func_call("tvms_scan", count, source_code=_SCAN, return_type="int32")

    def last(value):
        return T.cuda.func_call("tvms_last", value, source_code=_LAST, return_type="int32")

    @T.prim_func(s_tir=True)
    def decode_bitmap(
        mask: T.Buffer((n, words), "uint32"),
        row_start: T.Buffer((n + 1,), "int32"),
        values: T.Buffer((stored,), "bfloat16"),
        w: T.Buffer((n, k), "bfloat16"),
    ):
        block = T.launch_thread("blockIdx.x", T.ceildiv(n, _WARPS))
        thread = T.launch_thread("threadIdx.x", _WARPS * WARP)
        mask_bytes = T.decl_buffer((n, 4 * words), "uint8", data=mask.data)
        bits_of = T.decl_buffer((stored,), "uint16", data=values.data)
        pairs = T.decl_buffer((n, k // 2), "uint32", data=w.data)
        lane: T.let[T.int32] = thread % WARP
        row: T.let[T.int32] = block * _WARPS + thread // WARP
        bits = T.alloc_buffer((_DEPTH,), "int32", scope="local")
        upto = T.alloc_buffer((_DEPTH,), "int32", scope="local")
        at = T.alloc_buffer((2,), "int32", scope="local")  # the warp's next value, the lane's
        pair = T.alloc_buffer((4,), "uint32", scope="local")
        if row < n:
            at[0] = row_start[row]
            for step in range(T.ceildiv(k, 8 * WARP * _DEPTH)):
                for d in T.unroll(_DEPTH):
                    bits[d] = 0
                    if (step * _DEPTH + d) * WARP + lane < 4 * words:
                        bits[d] = T.cast(mask_bytes[row, (step * _DEPTH + d) * WARP + lane], "int32")
                for d in T.unroll(_DEPTH):
                    upto[d] = scan(T.cast(T.popcount(T.cast(bits[d], "uint32")), "int32"))
                for d in T.unroll(_DEPTH):
                    at[1] = at[0] + upto[d] - T.cast(T.popcount(T.cast(bits[d], "uint32")), "int32")
                    at[0] += last(upto[d])
                    for i in T.unroll(4):
                        pair[i] = T.uint32(0)
                        if T.bitwise_and(T.shift_right(bits[d], 2 * i), 1) != 0:
                            pair[i] = T.cast(bits_of[at[1]], "uint32")
                            at[1] += 1
                        if T.bitwise_and(T.shift_right(bits[d], 2 * i + 1), 1) != 0:
                            pair[i] |= T.shift_left(T.cast(bits_of[at[1]], "uint32"), T.uint32(16))
                            at[1] += 1
                    if (step * _DEPTH + d) * WARP + lane < k // 8:
                        for i in T.vectorized(4):
                            pairs[row, ((step * _DEPTH + d) * WARP + lane) * 4 + i] = pair[i]

    return decode_bitmap
