"""The gather kernel of a GPU, run on this machine: every cut, number of tokens and dtype against float64."""

import pytest
from packed_products import decodes, multiplies

from tvm_sparse.formats import FORMATS
from tvm_sparse.formats.gather import cut_of
from tvm_sparse.schedules.spec import KernelSpec

pytestmark = pytest.mark.usefixtures("toolkit")

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
    "spans": ((5, 2, 4, 8, 3), (150, 264), 3, 3, "bfloat16", "float32", {"depth": 3}),
    "16-tokens": ((5, 1, 2, 8, 1), (100, 328), 16, 16, "bfloat16", "float32", {}),
    "two-copies-of-16": ((3, 2, 3, 4, 2), (33, 100), 13, 13, "bfloat16", "bfloat16", {}),
    "ragged-columns": ((6, 2, 2, 2, 1), (40, 99), 11, 11, "bfloat16", "float32", {}),
    "one-class": ((4, 1, 5, 1, 1), (33, 44), 7, 7, "bfloat16", "float32", {}),
    "float32": ((4, 1, 3, 8, 2), (33, 71), 5, 5, "float32", "float32", {}),
    "many-tokens": ((4, 1, 2, 8, 1), (30, 96), 19, None, "bfloat16", "float32", {}),
    "one-column": ((4, 2, 2, 4, 1), (9, 1), 4, 4, "bfloat16", "float32", {}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_kernel_equals_float64(case, tmp_path):
    cut, shape, tokens, declared, x_dtype, out_dtype, decisions = CASES[case]
    spec = KernelSpec(FORMATS["gather"].choice(*cut), *shape, declared, x_dtype, out_dtype, "sm_90a")
    assert multiplies(spec, decisions, tokens, cut[1] * cut[4], cut[2], tmp_path, SHIM)


@pytest.mark.parametrize("case", ["8-tokens", "two-copies", "spans", "16-tokens"])
def test_decoding_gives_the_matrix_back(case, tmp_path):
    cut, shape, *_ = CASES[case]
    spec = KernelSpec(FORMATS["gather"].choice(*cut), *shape, None, "bfloat16", "bfloat16", "sm_90a")
    warps = min(24, (200 << 10) // (2 * cut_of(shape, spec.choice).columns))
    assert decodes(spec, cut[1] * cut[4], warps, tmp_path, SHIM)
