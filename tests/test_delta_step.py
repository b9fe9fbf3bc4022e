"""The decode step of the delta rule as a GPU runs it, emulated here: clusters, shared memory and barriers, in float64's
sight. The source that nvcc would get is compiled for this machine, a thread for each of its threads."""

from __future__ import annotations

import contextlib
import ctypes
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import tvm

from tvm_sparse.codegen import cuda, cuda_stub
from tvm_sparse.schedules.ops import ModelOps
from tvm_sparse.targets import MACHINES

sys.path.insert(0, str(Path(__file__).parent / "gpu"))
import cases
import reference

SHIM = r"""
#include <algorithm>
#include <barrier>
#include <cmath>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>
typedef unsigned int uint;
struct float4 { float x, y, z, w; }; struct uint4 { unsigned x, y, z, w; };
struct dim { unsigned x, y, z; };
struct nv_bfloat16 {
  unsigned short bits;
  nv_bfloat16(float f) { unsigned u; memcpy(&u, &f, 4); bits = (u + 0x7fff + (u >> 16 & 1)) >> 16; }
  operator float() const { unsigned u = bits << 16; float f; memcpy(&f, &u, 4); return f; }
};
struct Block {  // one CTA: its barriers, what its warps exchange, its shared memory
  std::barrier<> all;
  std::vector<std::unique_ptr<std::barrier<>>> warps;
  float passed[1024];
  Shared* shared;
};
static Shared arena[8];
static thread_local dim threadIdx, blockIdx;
static thread_local int cluster_rank;
static thread_local Block* block;
static std::barrier<>* cluster;
static float rsqrtf(float x) { return 1.f / std::sqrt(x); }
static float tvms_silu(float x) { return x / (1.f + std::exp(-x)); }
static void __syncthreads() { block->all.arrive_and_wait(); }
static float tvm_builtin_cuda_warp_reduce_sum_32(float v) {
  auto& here = *block->warps[threadIdx.x / 32];
  for (int step = 16; step > 0; step >>= 1) {
    block->passed[threadIdx.x] = v;
    here.arrive_and_wait();
    v += block->passed[threadIdx.x ^ step];
    here.arrive_and_wait();
  }
  return v;
}
static thread_local std::unique_ptr<std::barrier<>::arrival_token> arrived;
static void tvms_cluster_arrive() { arrived.reset(new std::barrier<>::arrival_token(cluster->arrive())); }
static void tvms_cluster_wait() { cluster->wait(std::move(*arrived)); }
static void tvms_cluster_store(float* mine, int rank, float value) {
  *(float*)((char*)mine - (char*)&arena[cluster_rank] + (char*)&arena[rank]) = value;
}
static int tvm_builtin_cluster_ctaid_x() { return cluster_rank; }
static void tvm_builtin_ptx_griddepcontrol_wait() {}
static void tvm_builtin_ptx_griddepcontrol_launch_dependents() {}
static float tvms_read(const float* from) { return *from; }
static float tvms_read(const nv_bfloat16* from) { return *from; }
static void tvms_read_quad(const void* from, void* to) { memcpy(to, from, 16); }
using std::max; using std::min;
"""
RUN = r"""
extern "C" void run(void** args, int gx, int gy, int size, int threads) {
  for (int y = 0; y < gy; ++y) for (int first = 0; first < gx; first += size) {
    std::barrier<> whole(size * threads);
    cluster = &whole;
    memset(arena, 0xff, sizeof(arena));
    std::vector<std::unique_ptr<Block>> blocks;
    std::vector<std::thread> pool;
    for (int r = 0; r < size; ++r) {
      blocks.emplace_back(new Block{std::barrier<>(threads), {}, {}, &arena[r]});
      for (int w = 0; w < threads / 32; ++w) blocks.back()->warps.emplace_back(new std::barrier<>(32));
      for (int t = 0; t < threads; ++t) pool.emplace_back([=, here = blocks.back().get()] {
        threadIdx = {(unsigned)t, 0, 0}; blockIdx = {(unsigned)(first + r), (unsigned)y, 0};
        cluster_rank = r; block = here;
        KERNEL;
      });
    }
    for (auto& thread : pool) thread.join();
  }
}
"""


def emulate(source: str, folder: Path):
    """CUDA source of one kernel -> its arguments' names, its threads, and run(addresses, grid x, y, cluster)."""
    kernel = re.search(r'^extern "C" __global__ void __launch_bounds__\((\d+)\) \w+\(([^()]*)\) \{(.*?)^\}$',
                       source, re.S | re.M)  # fmt: skip
    threads, parameters, body = int(kernel.group(1)), kernel.group(2).replace("__restrict__", ""), kernel.group(3)
    held = re.findall(r"__shared__ alignas\(64\) (\w+) (\w+)\[(\d+)\];", body)
    members = "".join(f"  alignas(64) {kind} {name}[{size}];\n" for kind, name, size in held)
    body = re.sub(r"__shared__ alignas\(64\) (\w+) (\w+)\[\d+\];", r"\1* \2 = block->shared->\2;", body)
    kinds = [part.rpartition(" ")[0] for part in parameters.split(", ")]
    passed = ", ".join(
        f"({kind})args[{i}]" if "*" in kind else f"*(const {kind}*)args[{i}]" for i, kind in enumerate(kinds)
    )
    (folder / "kernel.cc").write_text(
        SHIM.replace("struct Block", f"struct Shared {{\n{members}}};\nstruct Block", 1)
        + f"static void kernel({parameters}) {{{body}}}\n"
        + RUN.replace("KERNEL", f"kernel({passed})")
    )
    asked = ["-x", "c++", "-std=c++20", "-O1", "-w", "-pthread", "-shared", "-fPIC", "-o", folder / "kernel.so"]
    subprocess.run([cuda_stub.c_compiler(), *map(str, asked), str(folder / "kernel.cc"), "-lstdc++"], check=True)
    names = [part.rpartition(" ")[2].removesuffix("_ptr") for part in parameters.split(", ")]
    return names, threads, ctypes.CDLL(str(folder / "kernel.so")).run


def shape(name: str, batch: int, key_heads: int, value_heads: int, key_dim: int, value_dim: int, dtype: str):
    return cases.Shape(name, batch, 64, 64, key_heads, value_heads, key_dim, value_dim, 4, 2, 32, 8, 64, dtype)


SHAPES = [
    shape("three-heads-share-a-key", 2, 2, 6, 16, 16, "float32"),
    shape("split-columns", 1, 1, 2, 16, 128, "bfloat16"),
    shape("odd", 2, 3, 3, 24, 40, "bfloat16"),
]


@pytest.mark.usefixtures("toolkit")
@pytest.mark.parametrize("s", SHAPES, ids=lambda s: s.name)
def test_one_kernel_is_convolution_delta_rule_and_norm(s, tmp_path, monkeypatch):
    function = ModelOps("cuda").delta_step(
        s.batch, s.key_heads, s.value_heads, s.key_dim, s.value_dim, s.eps, s.dtype
    )
    sources: list[str] = []
    monkeypatch.setattr(cuda, "compile_source", lambda toolkit, source, arches: sources.append(source) or 1 / 0)
    with contextlib.suppress(Exception):
        mod = tvm.IRModule({"kernel": function.with_attr("global_symbol", "kernel")})
        cuda.build_cuda_library(mod, tmp_path / "none.so", [MACHINES["h200"]])
    names, threads, run = emulate(sources[0], tmp_path)

    generator = torch.Generator().manual_seed(5)
    n, width, dtype = s.batch, s.value_heads * s.value_dim, getattr(torch, s.dtype)

    def drawn(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator)

    tensors = {
        "mixed": drawn(n, s.channels + width + 2 * s.value_heads).to(dtype),
        "taps": drawn(s.channels, 4),
        "a_log": drawn(s.value_heads),
        "dt_bias": drawn(s.value_heads),
        "w": drawn(s.value_dim),
        "conv_state": drawn(n, 3, s.channels),
        "state": drawn(n, s.value_heads, s.key_dim, s.value_dim),
        "y": torch.full((n, width), float("nan")).to(dtype),
    }
    wanted = []
    for i in range(n):
        part = tensors["mixed"][i : i + 1]
        conv, window = reference.causal_conv(s, part, tensors["taps"], tensors["conv_state"][i])
        out, state = reference.gated_delta(
            s, conv, part, tensors["a_log"], tensors["dt_bias"], tensors["state"][i]
        )
        wanted.append((reference.gated_norm(s, out, part, tensors["w"])[0], window, state))
    row_length = ctypes.c_int64(tensors["mixed"].shape[1])
    at = [tensors[name].data_ptr() if name in tensors else ctypes.addressof(row_length) for name in names]
    splits = 2 if s.value_dim == 128 else 1
    run((ctypes.c_void_p * len(at))(*at), s.value_heads * splits, n, s.value_heads // s.key_heads * splits, threads)

    for name, values in zip(("y", "conv_state", "state"), zip(*wanted, strict=True), strict=True):
        error = (tensors[name].double() - torch.stack(values)).norm() / torch.stack(values).norm()
        assert error < (4e-3 if name == "y" and s.dtype == "bfloat16" else 2e-6), name
