"""What a kernel is measured against: one CTA an SM reads as many bytes in the same launch mode, and no more."""

from __future__ import annotations

import tvm
from tvm.script import tirx as T

from tvm_sparse.schedules.cuda.dependent_launch import dependent, start_dependents, wait_for_inputs
from tvm_sparse.schedules.cuda.device_code import WARP, symbol

_STREAM = """
__device__ __forceinline__ unsigned tvms_stream(const void* from, int begin, int end) {
  const uint4* words = (const uint4*)from;
  unsigned all = 0;
#pragma unroll 8
  for (int i = begin; i < end; ++i) {
    uint4 w;
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(w.x), "=r"(w.y), "=r"(w.z), "=r"(w.w) : "l"(words + 32ll * i));
    all ^= w.x ^ w.y ^ w.z ^ w.w;
  }
  return all;
}
"""


def build(bins: int, warps: int) -> tvm.tirx.PrimFunc:
    """(words uint16 [bins, steps, 32, 8], out uint32 [1]); out is hardly ever written."""
    steps = symbol("steps")

    @T.prim_func(s_tir=True)
    def stream(words: T.Buffer((bins, steps, WARP, 8), "uint16"), out: T.Buffer((1,), "uint32")):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
        bin = T.launch_thread("blockIdx.x", bins)
        thread = T.launch_thread("threadIdx.x", warps * WARP)
        all = T.alloc_buffer((1,), "uint32", scope="local")
        start_dependents()
        all[0] = T.cuda.func_call(
            "tvms_stream",
            T.address_of(words[bin, 0, thread % WARP, 0]),
            T.cast(steps, "int32") * (thread // WARP) // warps,
            T.cast(steps, "int32") * (thread // WARP + 1) // warps,
            source_code=_STREAM,
            return_type="uint32",
        )
        wait_for_inputs()
        if all[0] == T.uint32(0x9E3779B9):
            out[0] = all[0]

    return dependent(stream)
