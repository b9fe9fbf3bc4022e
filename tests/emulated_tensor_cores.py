"""Runs generated CUDA kernels with warp-wide instructions on this machine: a fiber for each thread of a CTA.

The source that nvcc would get, with `schedules.cuda.tensor_core`'s few functions in PTX replaced by what the PTX manual
says they do. All threads of a CTA take turns on one core and change at barriers and warp-wide instructions, so a run is
the same each time. Copies are done at once: a missing wait does not show, a missing barrier may.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

import torch
import tvm

from tvm_sparse.codegen import cuda, cuda_stub
from tvm_sparse.targets import MACHINES

SHIM = r"""
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <ucontext.h>
#include <vector>
#define __device__
#define __global__
#define __forceinline__ inline
#define __restrict__
#define __launch_bounds__(...)
typedef unsigned int uint; typedef unsigned char uchar; typedef unsigned short ushort;
struct uint2 { unsigned x, y; }; struct uint4 { unsigned x, y, z, w; };
struct float2 { float x, y; }; struct float4 { float x, y, z, w; };
struct half { unsigned short bits; }; struct nv_bfloat16 { unsigned short bits; };
static unsigned __byte_perm(unsigned a, unsigned b, unsigned order) {
  unsigned long long all = (unsigned long long)b << 32 | a, out = 0;
  for (int byte = 0; byte < 4; ++byte) out |= (all >> 8 * (order >> 4 * byte & 7) & 255) << 8 * byte;
  return (unsigned)out;
}
static uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
static uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
static float2 make_float2(float x, float y) { return {x, y}; }
static float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
struct dim { unsigned x, y, z; };
static dim threadIdx, blockIdx, blockDim, gridDim;
using std::min; using std::max;
static float __fdividef(float x, float y) { return x / y; }
static float rsqrtf(float x) { return 1 / sqrtf(x); }
static float __uint_as_float(unsigned u) { float f; memcpy(&f, &u, 4); return f; }
static unsigned __float_as_uint(float f) { unsigned u; memcpy(&u, &f, 4); return u; }
alignas(1024) static unsigned char shared_memory[227 << 10];

struct Barrier { int waiting = 0, round = 0; };
static ucontext_t scheduler, fibers[1024];
static bool done[1024];
static int running, threads;
static Barrier cta, warps[32];
struct Scratch { unsigned words[32][12]; };
static Scratch scratch[32][2];
static int phase[1024];
static void meet(Barrier& barrier, int count) {
  int round = barrier.round;
  if (++barrier.waiting == count) { barrier.waiting = 0; ++barrier.round; return; }
  while (barrier.round == round) swapcontext(&fibers[running], &scheduler);
}
static void __syncthreads() { meet(cta, threads); }
// Every lane leaves its words; afterwards all may read them until they meet again.
static const Scratch& exchange(const unsigned* words, int count) {
  int warp = running / 32;
  Scratch& place = scratch[warp][phase[running] ^= 1];
  memcpy(place.words[running % 32], words, 4 * count);
  meet(warps[warp], 32);
  return place;
}
static float __shfl_xor_sync(unsigned, float value, int step) {
  return __uint_as_float(exchange((const unsigned*)&value, 1).words[running % 32 ^ step][0]);
}
static void __syncwarp() { meet(warps[running / 32], 32); }
static int shuffled(int value, int lane) {
  const Scratch& all = exchange((const unsigned*)&value, 1);
  return (int)all.words[lane][0];
}
static int __shfl_sync(unsigned, int value, int lane) { return shuffled(value, lane); }
static int __shfl_up_sync(unsigned, int value, int step) { return shuffled(value, max(running % 32 - step, 0)); }
static int __popc(unsigned bits) { return __builtin_popcount(bits); }
static bool __any_sync(unsigned, bool value) {
  unsigned word = value, any = 0;
  const Scratch& all = exchange(&word, 1);
  for (int lane = 0; lane < 32; ++lane) any |= all.words[lane][0];
  return any;
}
#define TVMS_TENSOR_CORE
static void load_matrices(unsigned* to, const char* row, bool transposed) {
  const Scratch& all = exchange((const unsigned*)&row, 2);
  int lane = running % 32;
  for (int m = 0; m < 4; ++m) {
    unsigned short pair[2];
    for (int e = 0; e < 2; ++e) {
      int r = transposed ? lane % 4 * 2 + e : lane / 4, c = transposed ? lane / 4 : lane % 4 * 2 + e;
      const char* from;
      memcpy(&from, all.words[8 * m + r], 8);
      if ((uintptr_t)from % 16) abort();
      memcpy(&pair[e], from + 2 * c, 2);
    }
    memcpy(&to[m], pair, 4);
  }
}
static void tvms_ldmatrix(unsigned* to, const char* row) { load_matrices(to, row, false); }
static void tvms_ldmatrix_transposed(unsigned* to, const char* row) { load_matrices(to, row, true); }
static float read_half(const Scratch& all, bool bf16, int lane, int word, int e) {
  unsigned short bits = all.words[lane][word] >> (16 * e);
  if (bf16) return __uint_as_float((unsigned)bits << 16);
  _Float16 half;
  memcpy(&half, &bits, 2);
  return half;
}
static void multiply(float* c, const unsigned* a, unsigned b0, unsigned b1, bool bf16) {
  unsigned words[6] = {a[0], a[1], a[2], a[3], b0, b1};
  const Scratch& all = exchange(words, 6);
  int lane = running % 32;
  for (int i = 0; i < 4; ++i) {
    int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    float sum = 0;
    for (int k = 0; k < 16; ++k)
      sum += read_half(all, bf16, row % 8 * 4 + k % 8 / 2, row / 8 + k / 8 * 2, k % 2) *
             read_half(all, bf16, column * 4 + k % 8 / 2, 4 + k / 8, k % 2);
    c[i] += sum;
  }
}
static void tvms_mma_f16(float* c, const unsigned* a, unsigned b0, unsigned b1) { multiply(c, a, b0, b1, false); }
static void tvms_mma_bf16(float* c, const unsigned* a, unsigned b0, unsigned b1) { multiply(c, a, b0, b1, true); }
#ifdef TVMS_WARPGROUP
// What a descriptor of wgmma names: groups of eight rows of 128 bytes; address bits 4 to 6 are xored with 7 to 9.
typedef unsigned long long Tile;
static Tile tvms_tile(const char* at, int across = 16) {
  return (Tile)(at - (const char*)shared_memory) >> 4 | (Tile)(across >> 4) << 16 | 64ull << 32;
}
static float read_tile(Tile tile, bool bf16, int row, int column) {
  unsigned at = (unsigned)(tile & 0x3fff) * 16 + row / 8 * (unsigned)(tile >> 32 & 0x3fff) * 16 + row % 8 * 128;
  at += column / 64 * (unsigned)(tile >> 16 & 0x3fff) * 16 + column % 64 * 2;
  at ^= at >> 3 & 0x70;
  unsigned short bits;
  memcpy(&bits, shared_memory + at, 2);
  if (bf16) return __uint_as_float((unsigned)bits << 16);
  _Float16 half;
  memcpy(&half, &bits, 2);
  return half;
}
template <int N, typename A> static void product(float (&c)[N][4], A a, Tile b, int add, bool bf16, bool turned) {
  const Scratch* all = nullptr;
  if constexpr (!std::is_same_v<A, Tile>) all = &exchange(a, 4);
  int lane = running % 32;
  for (int i = 0; i < 4 * N; ++i) {
    int row = lane / 4 + i % 4 / 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
    float sum = add ? c[i / 4][i % 4] : 0;
    for (int k = 0; k < 16; ++k) {
      float left;
      if constexpr (std::is_same_v<A, Tile>) left = read_tile(a, bf16, running / 32 % 4 * 16 + row, k);
      else left = read_half(*all, bf16, row % 8 * 4 + k % 8 / 2, row / 8 + k / 8 * 2, k % 2);
      sum += left * (turned ? read_tile(b, bf16, k, column) : read_tile(b, bf16, column, k));
    }
    c[i / 4][i % 4] = sum;
  }
}
template <int N> static void tvms_product_f16(float (&c)[N][4], const unsigned* a, Tile b, int add) {
  product(c, a, b, add, false, false);
}
template <int N> static void tvms_product_bf16(float (&c)[N][4], Tile a, Tile b, int add) {
  product(c, a, b, add, true, false);
}
template <int N> static void tvms_product_bf16_turned(float (&c)[N][4], const unsigned* a, Tile b, int add) {
  product(c, a, b, add, true, true);
}
static void tvms_products_begin() {}
static void tvms_products_sent() {}
template <int LATEST = 0> static void tvms_products_done() {}
template <int N> static void tvms_settled(float (&)[N][4]) {}
static void tvms_publish() {}
#endif
static unsigned tvms_pack_f16(float low, float high) {
  _Float16 both[2] = {(_Float16)low, (_Float16)high};
  unsigned word;
  memcpy(&word, both, 4);
  return word;
}
static unsigned rounded(float f) { unsigned u = __float_as_uint(f); return (u + 0x7fff + (u >> 16 & 1)) >> 16; }
static unsigned tvms_pack_bf16(float low, float high) { return rounded(low) | rounded(high) << 16; }
static void tvms_copy_async(char* to, const void* from, int bytes) {
  if ((uintptr_t)to % 16 || (uintptr_t)from % 16) abort();
  memset(to, 0, 16);
  memcpy(to, from, bytes);
}
static void tvms_copies_done() {}
"""

RUNNER = r"""
static void** given;
static void enter() {{
  void** args = given;
  {name}({passed});
  done[running] = true;
}}
extern "C" void run_{name}(void** args, int gx, int gy, int gz, int count) {{
  static std::vector<char> stacks(1024 << 16);
  given = args, threads = count;
  gridDim = {{(unsigned)gx, (unsigned)gy, (unsigned)gz}}, blockDim = {{(unsigned)count, 1, 1}};
  for (int z = 0; z < gz; ++z) for (int y = 0; y < gy; ++y) for (int x = 0; x < gx; ++x) {{
    memset(shared_memory, 0xff, sizeof shared_memory);
    for (int t = 0; t < count; ++t) {{
      getcontext(&fibers[t]);
      fibers[t].uc_stack.ss_sp = &stacks[(size_t)t << 16];
      fibers[t].uc_stack.ss_size = 1 << 16;
      fibers[t].uc_link = &scheduler;
      makecontext(&fibers[t], (void (*)())enter, 0);
      done[t] = false;
    }}
    for (int left = count; left;) for (int t = 0; t < count; ++t) if (!done[t]) {{
      running = t, threadIdx = {{(unsigned)t, 0, 0}}, blockIdx = {{(unsigned)x, (unsigned)y, (unsigned)z}};
      swapcontext(&scheduler, &fibers[t]);
      left -= done[t];
    }}
  }}
}}
"""


_PREAMBLE_ENDS = "#define ushort unsigned short\n#endif\n"


def generated(function: tvm.tirx.PrimFunc, name: str, folder: Path) -> str:
    """The CUDA source of one PrimFunc. Needs a CUDA toolkit, as every build does."""
    sources: list[str] = []
    former = cuda.compile_source
    cuda.compile_source = lambda toolkit, source, arches: sources.append(source) or 1 / 0
    try:
        with contextlib.suppress(Exception):
            mod = tvm.IRModule({name: function.with_attr("global_symbol", name)})
            cuda.build_cuda_library(mod, folder / "none.so", [MACHINES["h200"]])
    finally:
        cuda.compile_source = former
    return sources[0]


class Kernels:
    """The kernels of one PrimFunc, compiled for this machine."""

    def __init__(
        self, function: tvm.tirx.PrimFunc, name: str, folder: Path, warpgroup: bool = False, shim: str = ""
    ) -> None:
        """`warpgroup`: as an H200 compiles it, with products of four warps; `shim`: what else stands for PTX."""
        source = generated(function, name, folder)
        own = ["TVMS_WARPGROUP", *re.findall(r"!defined\((TVMS_PRODUCT_\w+)\)", source)] if warpgroup else []
        code = source[source.rindex(_PREAMBLE_ENDS) + len(_PREAMBLE_ENDS) :]
        code = re.sub(r"extern __shared__ __align__\(\d+\) (\w+) (\w+)\[\];", r"\1* \2 = (\1*)shared_memory;", code)
        kernels = re.findall(r'^extern "C" __global__ void __launch_bounds__\(\d+\) (\w+)\(([^()]*)\) \{', code, re.M)
        self.parameters: dict[str, list[str]] = {}
        runners = []
        for kernel, parameters in kernels:
            parts = [part.replace("__restrict__", "").strip() for part in parameters.split(", ")]
            kinds = [re.sub(r"\w+$", "", part).strip() for part in parts]
            self.parameters[kernel] = [re.search(r"\w+$", part).group(0).removesuffix("_ptr") for part in parts]
            passed = ", ".join(
                f"({kind})args[{i}]" if "*" in kind else f"*(const {kind}*)args[{i}]" for i, kind in enumerate(kinds)
            )
            runner = RUNNER.format(name=kernel, passed=passed)
            runners.append(f"namespace of_{kernel} {{ {runner} }}")
        written, library = folder / f"{name}.cc", folder / f"{name}.so"
        written.write_text(SHIM + shim + code + "\n".join(runners))
        asked = [
            *(f"-D{guard}" for guard in own),
            "-x",
            "c++",
            "-std=c++20",
            "-O1",
            "-w",
            "-shared",
            "-fPIC",
            "-o",
            library,
            written,
            "-lstdc++",
        ]
        subprocess.run([cuda_stub.c_compiler(), *map(str, asked)], check=True)
        self.library = ctypes.CDLL(str(library))

    def run(self, kernel: str, grid: tuple[int, ...], threads: int, values: Mapping[str, torch.Tensor | int]) -> None:
        """`values` by the names of the PrimFunc's buffers and symbolic dimensions."""
        held = {name: ctypes.c_int64(value) for name, value in values.items() if isinstance(value, int)}
        at = []
        for name in self.parameters[kernel]:
            value = values[name]
            at.append(ctypes.addressof(held[name]) if isinstance(value, int) else value.data_ptr())
        getattr(self.library, f"run_{kernel}")((ctypes.c_void_p * len(at))(*at), *grid, *[1] * (3 - len(grid)), threads)
