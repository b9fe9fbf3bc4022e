"""Runs a generated CUDA kernel on this machine, a thread for each of its threads: slow, for small launches.

The source that nvcc would get, with the few functions written in PTX replaced. What this cannot show is a race that
needs a GPU's timing; what it does show is every index, barrier and sum.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

from tvm_sparse.codegen import cuda_stub

SHIM = r"""
#include <algorithm>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>
#define __device__
#define __global__
#define __forceinline__ inline
#define __restrict__
#define __launch_bounds__(...)
#define __shared__
#define __align__(...)
typedef unsigned int uint; typedef unsigned short ushort;
struct uint4 { unsigned x, y, z, w; }; struct float2 { float x, y; }; struct float4 { float x, y, z, w; };
struct dim { unsigned x, y, z; };
static thread_local dim threadIdx, blockIdx;
static std::barrier<>* cta;
static void __syncthreads() { cta->arrive_and_wait(); }
static std::barrier<>* warp[32];
static float exchanged[1024];
static float __shfl_xor_sync(unsigned, float value, int lanes) {
  auto* here = warp[threadIdx.x / 32];
  exchanged[threadIdx.x] = value;
  here->arrive_and_wait();
  value = exchanged[threadIdx.x ^ lanes];
  here->arrive_and_wait();
  return value;
}
static float __uint_as_float(unsigned u) { float f; memcpy(&f, &u, 4); return f; }
static unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((unsigned long long)a * b >> 32); }
static unsigned __dp4a(unsigned a, unsigned b, unsigned c) {
  for (int byte = 0; byte < 32; byte += 8) c += (a >> byte & 255) * (b >> byte & 255);
  return c;
}
static unsigned __byte_perm(unsigned a, unsigned b, unsigned order) {
  unsigned long long all = (unsigned long long)b << 32 | a, out = 0;
  for (int byte = 0; byte < 4; ++byte) out |= (all >> 8 * (order >> 4 * byte & 7) & 255) << 8 * byte;
  return (unsigned)out;
}
static uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
static float2 make_float2(float x, float y) { return {x, y}; }
static float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
using std::min; using std::max;
static float rsqrtf(float x) { return 1 / sqrtf(x); }
struct nv_bfloat16 {
  unsigned short bits;
  nv_bfloat16() = default;
  nv_bfloat16(float f) { unsigned u; memcpy(&u, &f, 4); bits = (u + 0x7fff + (u >> 16 & 1)) >> 16; }
  operator float() const { return __uint_as_float((unsigned)bits << 16); }
};
alignas(64) static float shared_ptr[1 << 16];
static uint4 tvms_stream_load(const void* words, int step, int ahead) {
  return *(const uint4*)((const char*)words + 512ll * (step + ahead));
}
static void tvms_in_order() {}
static unsigned tvms_early_load(const void* from) { return *(const unsigned*)from; }
static uint4 tvms_read_8(const void* x) { return *(const uint4*)x; }
static float tvms_read_x(const nv_bfloat16* x) { return *x; }
static float tvms_read_x(const float* x) { return *x; }
static float2 tvms_read_pair(const float* from) { return {from[0], from[1]}; }
static int tvms_address(const void* p) { return (const char*)p - (const char*)shared_ptr; }
template <class T> static T& tvms_at(int at) { return *(T*)((char*)shared_ptr + at); }
static float tvms_get(int at) { return tvms_at<float>(at); }
static float2 tvms_get2(int at) { return tvms_at<float2>(at); }
static float4 tvms_get4(int at) { return tvms_at<float4>(at); }
static void tvms_put(int at, float value) { tvms_at<float>(at) = value; }
template <int tile> static void tvms_end(unsigned value, int first, int back, int* at, int* part, float* sum) {
  if (value != 0x80000000u) return;
  for (int i = 0; i < tile; ++i) tvms_put(*part + 4 * i, sum[i]), sum[i] = 0;
  *part += 4 * tile;
  *at = first - back;
}
template <class... T> static void tvms_end_t1(T... t) { tvms_end<1>(t...); }
template <class... T> static void tvms_end_t2(T... t) { tvms_end<2>(t...); }
template <class... T> static void tvms_end_t4(T... t) { tvms_end<4>(t...); }
template <class... T> static void tvms_end_t8(T... t) { tvms_end<8>(t...); }
static void copy_async(const void* to, const void* from) { memcpy((void*)to, from, 16); }
"""
_OWN = re.compile("tvms_(stream_load|in_order|early_load|read_8|read_x|read_pair|address|get[24]?|put|end_t[1248])")


def compile_kernel(source: str, name: str, folder: Path):
    """CUDA source -> the names of kernel `name`'s arguments, and a function (their addresses, grid, threads)."""
    helpers = [
        match.group(0)
        for match in re.finditer(r"^__device__ __forceinline__ [\w ]+? (tvms_\w+)\(.*?^\}$", source, re.S | re.M)
        if not _OWN.fullmatch(match.group(1))
    ]
    kernel = re.search(rf'^extern "C" __global__ void [^;]*?{name}_kernel\(([^()]*)\) \{{.*?^\}}$', source, re.S | re.M)
    body = re.sub(r"extern __shared__ __align__\(\d+\) float shared_ptr\w*\[\];", "", kernel.group(0))
    body = re.sub(r"\bshared_ptr_float\b", "shared_ptr", body)
    body = body.replace("alignas(64) ", "")  # nothing to spare behind an array that is too small
    body = re.sub(r"tvm_builtin_ptx_cp_async_\w*16\(tvm_builtin_cuda_cvta_generic_to_shared\(", "copy_async((", body)
    body = re.sub(r"^ *tvm_builtin_ptx_\w+\([^;]*\);$", "", body, flags=re.M)
    kinds = [part.rpartition(" ")[0].replace("__restrict__", "") for part in kernel.group(1).split(", ")]
    passed = ", ".join(
        f"({kind})args[{i}]" if "*" in kind else f"*(const {kind}*)args[{i}]" for i, kind in enumerate(kinds)
    )
    runner = f"""
extern "C" void run(void** args, int gx, int gy, int threads) {{
  for (int y = 0; y < gy; ++y) for (int x = 0; x < gx; ++x) {{
    std::fill(shared_ptr, shared_ptr + (1 << 16), NAN);
    std::barrier<> all(threads);
    cta = &all;
    std::vector<std::unique_ptr<std::barrier<>>> warps;
    for (int w = 0; w < threads / 32; ++w) warp[w] = warps.emplace_back(new std::barrier<>(32)).get();
    std::vector<std::thread> pool;
    for (int t = 0; t < threads; ++t) pool.emplace_back([=] {{
      threadIdx = {{(unsigned)t, 0, 0}}; blockIdx = {{(unsigned)x, (unsigned)y, 0}};
      {name}_kernel({passed});
    }});
    for (auto& thread : pool) thread.join();
  }}
}}
"""
    written = folder / f"{name}.cc"
    written.write_text(SHIM + "\n".join(helpers) + "\n" + body + runner)
    asked = ["-x", "c++", "-std=c++20", "-O1", "-w", "-pthread", "-shared", "-fPIC"]
    asked += ["-o", folder / f"{name}.so", written]
    subprocess.run([cuda_stub.c_compiler(), *map(str, asked), "-lstdc++"], check=True)
    library = ctypes.CDLL(str(folder / f"{name}.so"))

    def run(arguments: Sequence[int], grid: tuple[int, int], threads: int) -> None:
        library.run((ctypes.c_void_p * len(arguments))(*arguments), *grid, threads)

    names = [part.rpartition(" ")[2].removesuffix("_ptr") for part in kernel.group(1).split(", ")]
    return names, run
