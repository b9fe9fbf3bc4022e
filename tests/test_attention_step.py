"""Attention of a decode step as a GPU runs it, emulated here: fragments, shuffles and barriers, against float64."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import emulated_tensor_cores
import pytest
import torch

from tvm_sparse.schedules.ops import ModelOps

sys.path.insert(0, str(Path(__file__).parent / "gpu"))
import cases
import reference

PTX = r"""
#define __shared__ static
#define __align__(n) __attribute__((aligned(n)))
static float __shfl_sync(unsigned, float value, int lane) {
  return __uint_as_float(exchange((const unsigned*)&value, 1).words[lane][0]);
}
static float __fsqrt_rn(float x) { return sqrtf(x); }
static int tvms_held(const int* position) { return *position; }
static void tvms_mma(float* c, const unsigned* a, unsigned b0, unsigned b1) { multiply(c, a, b0, b1, true); }
static uint4 tvms_cache_load(const nv_bfloat16* from) { return *(const uint4*)from; }
static unsigned tvms_pack(float a, float b, unsigned* rest) {
  unsigned v = rounded(a) | rounded(b) << 16;
  *rest = rounded(a - __uint_as_float(v << 16)) | rounded(b - __uint_as_float(v & 0xffff0000u)) << 16;
  return v;
}
static unsigned tvms_transpose(unsigned v) {
  const Scratch& all = exchange(&v, 1);
  int lane = running % 32, row = lane / 4;
  unsigned low = all.words[lane % 4 * 8 + row / 2][0], high = all.words[lane % 4 * 8 + 4 + row / 2][0];
  return (low >> row % 2 * 16 & 0xffff) | (high >> row % 2 * 16 & 0xffff) << 16;
}
template <int D> static void tvms_row(const nv_bfloat16* from, float* x) {
  for (int e = 0; e < D / 32; ++e) x[e] = from[32 * e];
}
"""
BFLOAT16 = """struct nv_bfloat16 {
  unsigned short bits;
  nv_bfloat16() = default;
  nv_bfloat16(float f) { unsigned u; memcpy(&u, &f, 4); bits = (u + 0x7fff + (u >> 16 & 1)) >> 16; }
  operator float() const { unsigned u = bits << 16; float f; memcpy(&f, &u, 4); return f; }
};
"""
IN_PTX = "tvms_(held|mma|cache_load|pack|transpose|row)"
LOADS = {
    "ld.global.u16": r'asm volatile\("ld.global.u16 [^:]*: "=h"\((\w+)\) : "l"\(([^;]*)\)\);',
    "ld.global.v2.f32": r'asm volatile\("ld.global.v2.f32 [^:]*:\s*"=f"\((.*?)\), "=f"\((.*?)\) : "l"\(([^;]*)\)\);',
    "ld.global.f32": r'asm volatile\("ld.global.f32 [^:]*: "=f"\((\w+)\) : "l"\(([^;]*)\)\);',
}


def without_ptx(source: str) -> str:
    function = rf"^(template [^\n]*\n)?__device__ __forceinline__ [^\n]*?\b{IN_PTX}\(.*?^\}}$"
    source = re.sub(function, "", source, flags=re.S | re.M)
    source = re.sub(LOADS["ld.global.u16"], r"\1 = ((\2))->bits;", source)
    source = re.sub(LOADS["ld.global.v2.f32"], r"\1 = (\3)[0], \2 = (\3)[1];", source)
    source = re.sub(LOADS["ld.global.f32"], r"\1 = *(\2);", source)
    source = re.sub(r'asm volatile\("griddepcontrol[^;]*;"[^;]*;', "", source)
    line = r"^ *(__device__ __forceinline__ void )?tvm_builtin_ptx_\w+\([^;]*\);$"
    return re.sub(line, "", source, flags=re.M)


def compiled(function, name: str, folder: Path, monkeypatch) -> emulated_tensor_cores.Kernels:
    real, shim = emulated_tensor_cores.generated, emulated_tensor_cores.SHIM
    with monkeypatch.context() as patch:
        patch.setattr(emulated_tensor_cores, "generated", lambda *arguments: without_ptx(real(*arguments)))
        bare = "struct nv_bfloat16 { unsigned short bits; };"
        patch.setattr(emulated_tensor_cores, "SHIM", shim.replace(bare, BFLOAT16) + PTX)
        return emulated_tensor_cores.Kernels(function, name, folder)


SHAPES = {
    "six heads, two turns of a warp": cases.Shape("six", 2, 64, 64, 1, 1, 64, 64, 12, 2, 256, 128, 10, "bfloat16"),
    "eight heads, half a warp": cases.Shape("eight", 2, 64, 64, 1, 1, 64, 64, 8, 1, 64, 16, 10, "bfloat16"),
}


@pytest.mark.usefixtures("toolkit")
@pytest.mark.parametrize("name", SHAPES)
def test_attention_of_a_step_equals_float64(name, tmp_path, monkeypatch):
    s, ops = SHAPES[name], ModelOps("cuda")
    sizes = (s.heads, s.kv_heads, s.head_dim, s.rotary_dim)
    assert s.shares == ops.attention_shares(s.batch, *sizes, s.dtype)
    part = compiled(ops.attention_part(s.batch, *sizes, s.theta, s.eps, s.dtype), "part", tmp_path, monkeypatch)
    join = compiled(ops.attention_join(s.batch, *sizes, s.dtype), "join", tmp_path, monkeypatch)
    torch.manual_seed(0)
    for first, second in ((0, 1), (17, 200)):
        lengths, room = (first, second), second + 3
        qkv = torch.randn(s.batch, 2 * (s.heads + s.kv_heads) * s.head_dim).bfloat16()
        norms = {which: torch.randn(s.head_dim) for which in ("q_norm", "k_norm")}
        caches = {which: torch.randn(s.batch, s.kv_heads, room, s.head_dim).bfloat16() for which in ("k", "v")}
        for i, length in enumerate(lengths):
            for cache in caches.values():
                cache[i, :, length:] = float("nan")
        y = torch.zeros(s.batch, s.heads * s.head_dim, dtype=torch.bfloat16)
        at = torch.tensor(lengths, dtype=torch.int32)
        held: dict[str, torch.Tensor | int] = {
            "qkv": qkv,
            **norms,
            "position": at,
            "k_cache": caches["k"],
            "v_cache": caches["v"],
            "sums": torch.full((s.batch, s.heads, s.shares, s.head_dim), float("nan")),
            "marks": torch.full((s.batch, s.heads, s.shares, 2), float("nan")),
            "y": y,
            "row_length": qkv.shape[1],
            "context": room,
        }
        part.run("part_kernel", (s.shares, s.kv_heads, s.batch), 256, held)
        join.run("join_kernel", (s.heads, s.batch), s.head_dim, held)
        q, gate, k, v = reference.split_qkv(s, qkv)
        q = reference.rope(s, reference.rms_norm(q, norms["q_norm"], s.eps), at)
        k = reference.rope(s, reference.rms_norm(k, norms["k_norm"], s.eps), at)
        for i, length in enumerate(lengths):
            torch.testing.assert_close(caches["k"][i, :, length].double(), k[i], rtol=2**-8, atol=1e-6)
            assert torch.equal(caches["v"][i, :, length], v[i])
            one = slice(i, i + 1)
            wanted = reference.attention(s, q[one], gate[one], caches["k"][i], caches["v"][i], length)[0]
            error = (y[i].double() - wanted).norm() / wanted.norm()
            assert error < 4e-3, (lengths, i, float(error))
