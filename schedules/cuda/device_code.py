"""The few lines of CUDA that TensorIR has no word for, and the shapes every kernel of this folder shares.

Kernels are written at the level of threads: a CTA is `blockIdx`, its threads `threadIdx.x`, registers are buffers of
scope "local". Index arithmetic follows the dimensions: int64 where one is symbolic.
"""

from __future__ import annotations

from collections.abc import Sequence

import tvm
from tvm.script import tirx as T

WARP = 32
TYPES = {"bfloat16": "nv_bfloat16", "float32": "float"}  # of CUDA, by dtype

_REDUCE = """
__device__ __forceinline__ float tvms_block_{name}(float value) {{
  // Every thread of the CTA gets the result; a fixed tree, so that runs agree bit for bit.
  __shared__ float partial[32];
  for (int step = 16; step > 0; step >>= 1)
    value = {combine}(value, __shfl_xor_sync(0xffffffffu, value, step));
  __syncthreads();  // an earlier call's partial sums may still be read
  if ((threadIdx.x & 31) == 0) partial[threadIdx.x >> 5] = value;
  __syncthreads();
  value = (threadIdx.x & 31) < (blockDim.x >> 5) ? partial[threadIdx.x & 31] : {neutral};
  for (int step = 16; step > 0; step >>= 1)
    value = {combine}(value, __shfl_xor_sync(0xffffffffu, value, step));
  return value;
}}
"""
_BLOCK_SUM = _REDUCE.format(name="sum", combine="__fadd_rn", neutral="0.f")
_BLOCK_MAX = _REDUCE.format(name="max", combine="fmaxf", neutral="-INFINITY")

_SILU = """
#ifndef TVMS_SILU
#define TVMS_SILU
__device__ __forceinline__ float tvms_silu(float x) {
  // x / (1 + e^-x) in six instructions, where exact exp and division take seventy; error below 2^-22 (1 + |x|) silu(x).
#ifdef __CUDA_ARCH__
  float power, inverse;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(-1.4426950408889634f * x));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(1.f + power));
  return x * inverse;
#else
  return x / (1.f + expf(-x));
#endif
}
#endif
"""


def token_dim(tokens: int | None) -> int | tvm.tirx.Var:
    """The first dimension of an operation: its number of tokens, symbolic where it is not given."""
    return tvm.tirx.Var("n", "int64") if tokens is None else tokens


def symbol(name: str) -> tvm.tirx.Var:
    """A dimension that no builder argument names."""
    return tvm.tirx.Var(name, "int64")


def without_arguments(function: tvm.tirx.PrimFunc, names: Sequence[str]) -> tvm.tirx.PrimFunc:
    """A kernel of several forms declares all their arguments; those that this form leaves unread go."""
    kept = [param for param in function.params if param.name not in names]
    return tvm.tirx.PrimFunc(kept, function.body, function.ret_type, function.attrs, function.span)


def block_sum(value: tvm.tirx.Expr) -> tvm.tirx.Expr:
    """The sum of a float32 over all threads of the CTA (one dimension, whole warps); all of them must call it."""
    return T.cuda.func_call(
        "tvms_block_sum", value, source_code=_BLOCK_SUM, return_type="float32"
    )


def block_max(value: tvm.tirx.Expr) -> tvm.tirx.Expr:
    """As block_sum, the maximum."""
    return T.cuda.func_call(
        "tvms_block_max", value, source_code=_BLOCK_MAX, return_type="float32"
    )


def f32(value: tvm.tirx.Expr) -> tvm.tirx.Expr:
    return T.cast(value, "float32")


def silu(value: tvm.tirx.Expr) -> tvm.tirx.Expr:
    return T.cuda.func_call("tvms_silu", value, source_code=_SILU, return_type="float32")


def softplus(value: tvm.tirx.Expr) -> tvm.tirx.Expr:
    """log(1 + e^x) without overflow."""
    return T.max(value, T.float32(0)) + T.log(T.float32(1) + T.exp(-T.abs(value)))
