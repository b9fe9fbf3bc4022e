"""The kernels of a GPU benchmark as one library, built where the compiler is, run where the GPU is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import tvm
from tvm.script import tirx as T

from tvm_sparse.codegen.cuda import build_cuda_library
from tvm_sparse.schedules.cuda.device_code import WARP, symbol
from tvm_sparse.schedules.cuda.matmul_delta import LAUNCH_PARAMS, PROGRAMMATIC
from tvm_sparse.schedules.spec import KernelSpec
from tvm_sparse.schedules.table import instantiate
from tvm_sparse.targets import Machine

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


def floor_name(spec: KernelSpec) -> str:
    return f"floor_{spec.name}"


def build(path: Path, specs: Sequence[KernelSpec], machine: Machine) -> None:
    """Every kernel under its spec's name; beside each delta kernel the one that only reads its words."""
    functions = {spec.name: instantiate(spec) for spec in specs}
    functions |= {floor_name(spec): _floor(spec) for spec in specs if spec.choice.name == "delta"}
    mod = tvm.IRModule({name: function.with_attr("global_symbol", name) for name, function in functions.items()})
    build_cuda_library(mod, path, [machine])


def _floor(spec: KernelSpec) -> tvm.tirx.PrimFunc:
    """(words, out uint32 [1]): the same CTAs in the same launch mode read every word; out is as good as never written."""
    bins, warps = spec.choice.option("bins"), spec.choice.option("warps")
    steps = symbol("steps")

    @T.prim_func(s_tir=True)
    def stream(words: T.Buffer((bins, steps, WARP, 8), "uint16"), out: T.Buffer((1,), "uint32")):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
        bin = T.launch_thread("blockIdx.x", bins)
        thread = T.launch_thread("threadIdx.x", warps * WARP)
        all = T.alloc_buffer((1,), "uint32", scope="local")
        T.evaluate(T.ptx["griddepcontrol.launch_dependents"]())
        all[0] = T.cuda.func_call(
            "tvms_stream",
            T.address_of(words[bin, 0, thread % WARP, 0]),
            T.cast(steps, "int32") * (thread // WARP) // warps,
            T.cast(steps, "int32") * (thread // WARP + 1) // warps,
            source_code=_STREAM,
            return_type="uint32",
        )
        T.evaluate(T.ptx["griddepcontrol.wait"]())
        if all[0] == T.uint32(0x9E3779B9):
            out[0] = all[0]

    return stream.with_attr(LAUNCH_PARAMS, PROGRAMMATIC)
