"""The gather kernel of a GPU, run on this machine: every cut, number of tokens and dtype against float64."""

import emulated_tensor_cores
import pytest
import torch

from tvm_sparse.codegen import cuda_toolkit
from tvm_sparse.errors import Refusal
from tvm_sparse.formats import FORMATS, pack
from tvm_sparse.formats.gather import cut_of
from tvm_sparse.schedules.spec import KernelSpec
from tvm_sparse.schedules.table import decoder, instantiate

# What tensor_core's shim does not have: shared memory at 32-bit addresses, two bfloat16 at once.
SHIM = r"""
#define TVMS_GATHER_DEVICE
static int tvms_gather_address(const void* p) { return (int)((unsigned char*)p - shared_memory); }
template <int OFFSET> static void tvms_gather_columns(unsigned* to, int at) {
  if (at < 0 || at + OFFSET >= (int)sizeof shared_memory) abort();
  tvms_ldmatrix_transposed(to, (const char*)shared_memory + at + OFFSET);
}
static void tvms_gather_words(uint4& w, const uint4* from, bool there) { if (there) w = *from; }
static unsigned tvms_gather_one(const void* from) { if ((uintptr_t)from % 4) abort(); return *(const unsigned*)from; }
static unsigned tvms_gather_half(const void* from) { return *(const unsigned short*)from; }
static void tvms_gather_copy(int* to, const int* from) { *to = *from; }
static void tvms_gather_copied() {}
static unsigned scaled(unsigned bits) {
  return __float_as_uint(__uint_as_float(bits << 16) * 79228162514264337593543950336.f) >> 16;
}
static unsigned tvms_gather_scaled(unsigned pair) { return scaled(pair & 0xffff) | scaled(pair >> 16) << 16; }
// CTAs of a cluster run one after the other, the one that receives last; what is sent outlasts the others' memory.
static float sent[1 << 14];
static float& sent_to(const float* mine) { return sent[mine - (const float*)shared_memory]; }
static void tvms_gather_send(float* mine, int, float value) { sent_to(mine) = value; }
static float tvms_gather_received(const float* mine) { return sent_to(mine); }
static void tvms_gather_arrive() {}
static void tvms_gather_meet() { __syncthreads(); }
static void tvms_gather_early() {}
static void tvms_gather_wait() {}
static void tvms_gather_leave(float* to, float value) { *to = value; }
static void tvms_gather_leave(nv_bfloat16* to, float value) { to->bits = rounded(value); }
static unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((unsigned long long)a * b >> 32); }
"""

# gap bits, bins, warps, classes, spans; N, K; tokens, declared tokens; dtypes of x and y; decisions
CASES = {
    "8-tokens": ((4, 2, 3, 8, 1), (100, 200), 8, 8, "bfloat16", "float32", {}),
    "two-copies": ((4, 3, 4, 4, 1), (90, 136), 5, 5, "bfloat16", "bfloat16", {"depth": 2}),
    "spans": ((5, 2, 4, 8, 3), (40, 264), 3, 3, "bfloat16", "float32", {"depth": 3}),
    "16-tokens": ((5, 1, 2, 8, 1), (100, 328), 16, 16, "bfloat16", "float32", {}),
    "two-copies-of-16": ((3, 2, 3, 4, 2), (33, 100), 13, 13, "bfloat16", "bfloat16", {}),
    "ragged-columns": ((6, 2, 2, 2, 1), (40, 99), 11, 11, "bfloat16", "float32", {}),
    "one-class": ((4, 1, 5, 1, 1), (33, 44), 7, 7, "bfloat16", "float32", {}),
    "float32": ((4, 1, 3, 8, 2), (33, 71), 5, 5, "float32", "float32", {}),
    "many-tokens": ((4, 1, 2, 8, 1), (30, 96), 19, None, "bfloat16", "float32", {}),
    "one-column": ((4, 2, 2, 4, 1), (9, 1), 4, 4, "bfloat16", "float32", {}),
}


def matrix(n: int, k: int) -> torch.Tensor:
    """A full row beside empty ones, rows of very different density, values outside the window."""
    generator = torch.Generator().manual_seed(n * k)
    weight = torch.randn(n, k, generator=generator) * 0.02
    weight *= torch.rand(n, k, generator=generator) < torch.rand(n, 1, generator=generator) * 0.6
    weight[0], weight[n // 3], weight[n // 2] = 0, 0, torch.randn(k, generator=generator)
    weight.view(-1)[:: n * k // 5 + 1] = 1e-20
    return weight.bfloat16()


@pytest.fixture(autouse=True)
def _toolkit(monkeypatch):
    try:
        cuda_toolkit.find_toolkit()
    except Refusal as missing:
        pytest.skip(str(missing))
    monkeypatch.setattr(emulated_tensor_cores, "SHIM", emulated_tensor_cores.SHIM + SHIM)


@pytest.mark.parametrize("case", CASES)
def test_the_kernel_equals_float64(case, tmp_path):
    cut, (n, k), tokens, declared, x_dtype, out_dtype, decisions = CASES[case]
    spec = KernelSpec(FORMATS["gather"].choice(*cut), n, k, declared, x_dtype, out_dtype, "sm_90a")
    kernels = emulated_tensor_cores.Kernels(instantiate(spec, decisions), "kernel", tmp_path)
    weight = matrix(n, k)
    x = torch.randn(tokens, k, generator=torch.Generator().manual_seed(1)).to(getattr(torch, x_dtype))
    y = torch.full((tokens, n), float("nan"), dtype=getattr(torch, out_dtype))
    packed = pack(weight, spec.choice)
    tile = 8 if declared is not None and declared <= 8 else 16
    values = {"x": x, "y": y, **packed.buffers, "n": tokens}
    kernels.run("kernel_kernel", (cut[1] * cut[4], -(-tokens // tile)), 32 * cut[2], values)

    want = x.double() @ weight.double().T
    rounding = 2**-8 if out_dtype == "bfloat16" else 2**-23
    allowed = want.abs() * rounding + (x.double().abs() @ weight.double().abs().T) * 2**-20
    assert bool(((y.double() - want).abs() <= allowed).all())


@pytest.mark.parametrize("case", ["8-tokens", "two-copies", "spans", "16-tokens"])
def test_decoding_gives_the_matrix_back(case, tmp_path):
    cut, (n, k), *_ = CASES[case]
    spec = KernelSpec(FORMATS["gather"].choice(*cut), n, k, None, "bfloat16", "bfloat16", "sm_90a")
    kernels = emulated_tensor_cores.Kernels(decoder(spec), "kernel", tmp_path)
    threads = 32 * min(24, (200 << 10) // (2 * cut_of((n, k), spec.choice).columns))
    weight = matrix(n, k)
    dense = torch.full((n, k), float("nan"), dtype=torch.bfloat16)
    kernels.run("kernel_kernel", (cut[1] * cut[4],), threads, {"w": dense, **pack(weight, spec.choice).buffers})
    assert torch.equal(dense.view(torch.int16), weight.view(torch.int16).masked_fill(weight == 0, 0))
