"""Kernels that start while the one before still runs: programmatic dependent launch (CUDA programming guide).

Such a kernel lets its successor start with its first instruction, reads what no kernel of this step writes (weights,
tables, state of earlier steps), waits for the kernel before to be finished, and only then reads its inputs and writes
anything at all. Every kernel waits, so whatever came earlier is finished too. A step's first kernel is launched in the
ordinary way: nothing of a step begins before the step before has ended, which is why state may be read early.

ptxas moves non-coherent loads across the wait, both ways; the loads here are volatile and stay where they are written.
"""

from __future__ import annotations

import tvm
from tvm.script import tirx as T

LAUNCH_PARAMS, PROGRAMMATIC = "tirx.kernel_launch_params", ["tirx.use_programtic_dependent_launch"]

ALONE = 116 << 10
"""Bytes, more than half of an SM's shared memory: with so many, no SM takes two CTAs of a kernel. Launched early,
behind a small kernel, they would settle two by two where the kernel before has left an SM already, and others would
stand empty."""

_READ = """
#ifndef TVMS_READ
#define TVMS_READ
template <class T>
__device__ __forceinline__ float tvms_read(const T* from) {
  if constexpr (sizeof(T) == 4) {
    float v;
    asm volatile("ld.global.f32 %0, [%1];" : "=f"(v) : "l"(from));
    return v;
  } else {  // bfloat16, whose type is not known where no kernel uses it
    unsigned short v;
    asm volatile("ld.global.u16 %0, [%1];" : "=h"(v) : "l"(from));
    return __uint_as_float((unsigned)v << 16);
  }
}
__device__ __forceinline__ int tvms_read_int(const int* from) {
  int v;
  asm volatile("ld.global.s32 %0, [%1];" : "=r"(v) : "l"(from));
  return v;
}
__device__ __forceinline__ void tvms_read_quad(const void* from, void* to) {
  uint4 v;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from));
  *(uint4*)to = v;
}
__device__ __forceinline__ void tvms_read_quad_once(const void* from, void* to) {
  uint4 v;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from));
  *(uint4*)to = v;
}
#endif
"""


def dependent(function: tvm.tirx.PrimFunc) -> tvm.tirx.PrimFunc:
    """Marks a kernel that calls `wait_for_inputs` to be launched early."""
    return function.with_attr(LAUNCH_PARAMS, PROGRAMMATIC)


def start_dependents() -> tvm.tirx.Stmt:
    return T.evaluate(T.ptx["griddepcontrol.launch_dependents"]())


def wait_for_inputs() -> tvm.tirx.Stmt:
    return T.evaluate(T.ptx["griddepcontrol.wait"]())


def read(element: tvm.tirx.Expr) -> tvm.tirx.Expr:
    """A float32 or bfloat16 in global memory, as float32."""
    return T.cuda.func_call("tvms_read", T.address_of(element), source_code=_READ, return_type="float32")


def read_int(element: tvm.tirx.Expr) -> tvm.tirx.Expr:
    return T.cuda.func_call("tvms_read_int", T.address_of(element), source_code=_READ, return_type="int32")


def read_quad(element: tvm.tirx.Expr, register: tvm.tirx.Expr, once: bool = False) -> tvm.tirx.Stmt:
    """16 bytes from `element` on, aligned, into local memory from `register` on; `once` goes past L1."""
    name = "tvms_read_quad_once" if once else "tvms_read_quad"
    return T.evaluate(T.cuda.func_call(name, T.address_of(element), T.address_of(register), source_code=_READ))
