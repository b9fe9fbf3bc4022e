"""2:4 back to a dense matrix, on a GPU: a lane takes 8 columns, that is 8 bytes of values and a byte of positions.

A group's two values go to their places among four as shifts of a 64-bit word: 4 columns of 16 bits.
"""

from __future__ import annotations

import tvm
from tvm.script import tirx as T

from tvm_sparse.schedules.spec import KernelSpec

_THREADS = 256

_EXPAND = """
__device__ __forceinline__ void tvms_expand_two_four(const unsigned* pair, unsigned places, unsigned* columns) {
  // pair[g]: the two values of group g, whose positions are bits 4 g .. 4 g + 3. Where a group has less than two
  // values, zeros stand for them, at positions of their own.
#pragma unroll
  for (int g = 0; g < 2; ++g) {
    unsigned long long low = (unsigned long long)(pair[g] & 0xffffu) << (16 * (places >> 4 * g & 3));
    unsigned long long high = (unsigned long long)(pair[g] >> 16) << (16 * (places >> (4 * g + 2) & 3));
    columns[2 * g] = (unsigned)(low | high);
    columns[2 * g + 1] = (unsigned)((low | high) >> 32);
  }
}
"""


def build(spec: KernelSpec) -> tvm.tirx.PrimFunc:
    """(values, meta, w [n, k] bfloat16); k a multiple of 8."""
    n, k = spec.n, spec.k
    words, eights = -(-k // 16), k // 8

    def expand(pair, places, columns):
        pointers = T.address_of(pair[0]), places, T.address_of(columns[0])
        return T.evaluate(T.cuda.func_call("tvms_expand_two_four", *pointers, source_code=_EXPAND))

    @T.prim_func(s_tir=True)
    def decode_two_four(
        values: T.Buffer((n, 8 * words), "bfloat16"),
        meta: T.Buffer((n, words), "uint16"),
        w: T.Buffer((n, k), "bfloat16"),
    ):
        block = T.launch_thread("blockIdx.x", T.ceildiv(n * eights, _THREADS))
        thread = T.launch_thread("threadIdx.x", _THREADS)
        kept = T.decl_buffer((n, 4 * words), "uint32", data=values.data)
        places = T.decl_buffer((n, 2 * words), "uint8", data=meta.data)
        pairs = T.decl_buffer((n, k // 2), "uint32", data=w.data)
        row: T.let[T.int32] = (block * _THREADS + thread) // eights
        at: T.let[T.int32] = (block * _THREADS + thread) % eights
        pair = T.alloc_buffer((2,), "uint32", scope="local")
        columns = T.alloc_buffer((4,), "uint32", scope="local")
        if row < n:
            for i in T.vectorized(2):
                pair[i] = kept[row, at * 2 + i]
            expand(pair, T.cast(places[row, at], "uint32"), columns)
            for i in T.vectorized(4):
                pairs[row, at * 4 + i] = columns[i]

    return decode_two_four
