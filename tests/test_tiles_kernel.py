"""The tiles kernel of a GPU, run on this machine: every cut, number of tokens and dtype against float64."""

import pytest
from packed_products import decodes, multiplies

from tvm_sparse.formats import FORMATS
from tvm_sparse.formats.tiles import cut_of
from tvm_sparse.schedules.spec import KernelSpec

pytestmark = pytest.mark.usefixtures("toolkit")

# What tensor_core's shim does not have: shared memory at 32-bit addresses, two bfloat16 at once.
SHIM = r"""
#define TVMS_TILES_DEVICE
static void tvms_need_shared_memory_at_once(const void* p) { if (p != shared_memory) abort(); }
static unsigned char* at_address(unsigned at, int align) {
  if (at % align || at >= sizeof shared_memory) abort();
  return shared_memory + at;
}
static unsigned long long __shfl_sync(unsigned all, unsigned long long value, int lane) {
  return (unsigned)__shfl_sync(all, (int)value, lane)
      | (unsigned long long)(unsigned)__shfl_sync(all, (int)(value >> 32), lane) << 32;
}
static void tvms_put_half(unsigned at, unsigned value) { memcpy(at_address(at, 2), &value, 2); }
static void tvms_put_zeros(unsigned at) { memset(at_address(at, 16), 0, 16); }
static void tvms_put_float(unsigned at, float value) { memcpy(at_address(at, 4), &value, 4); }
static float tvms_get_float(unsigned at) { float value; memcpy(&value, at_address(at, 4), 4); return value; }
static unsigned tvms_take_own(unsigned at) {
  unsigned value, zero = 0;
  memcpy(&value, at_address(at, 4), 4), memcpy(at_address(at, 4), &zero, 4);
  return value;
}
static void tvms_begin_copies(unsigned barrier) { memset(at_address(barrier, 8), 0, 8); }
static void tvms_copies_begun() {}
static void tvms_copy_words(unsigned to, const void* from, unsigned bytes, unsigned barrier) {
  if (running % 32) return;
  for (unsigned i = 0; i < bytes; i += 16) memcpy(at_address(to + i, 16), (const char*)from + i, 16);
  unsigned long long copies;
  memcpy(&copies, at_address(barrier, 8), 8), ++copies, memcpy(at_address(barrier, 8), &copies, 8);
}
static void tvms_wait_for_words(unsigned barrier, unsigned parity) {
  unsigned long long copies;
  memcpy(&copies, at_address(barrier, 8), 8);
  if (copies % 2 == parity) abort();  // there, or there again
}
static uint4 tvms_words(unsigned at) { uint4 w; memcpy(&w, at_address(at, 16), 16); return w; }
static uint4 tvms_quad(const void* from) { if ((uintptr_t)from % 16) abort(); return *(const uint4*)from; }
static unsigned tvms_one(const void* from) { return *(const unsigned*)from; }
static unsigned tvms_half(const void* from) { return *(const unsigned short*)from; }
static unsigned scaled(unsigned bits) {
  float x = __uint_as_float(bits << 16);
  x = std::min(std::max(x, -4278190080.f), 4278190080.f);
  return __float_as_uint(x * 79228162514264337593543950336.f) >> 16;
}
static unsigned tvms_scale_pair(unsigned pair) { return scaled(pair & 0xffff) | scaled(pair >> 16) << 16; }
static void tvms_start_dependents() {}
static void tvms_wait_for_inputs() {}
static void tvms_leave(float* to, float value) { *to = value; }
static void tvms_leave(nv_bfloat16* to, float value) { to->bits = rounded(value); }
"""

# gap bits, bins, parts, sets, tiles; N, K; tokens, declared tokens; dtypes of x and y; decisions
CASES = {
    "8-tokens": ((4, 2, 2, 2, 4), (100, 200), 8, 8, "bfloat16", "float32", {}),
    "odd-tiles": ((4, 3, 3, 1, 5), (90, 136), 3, 3, "bfloat16", "bfloat16", {}),
    "one-tile": ((5, 2, 4, 1, 1), (13, 264), 2, 2, "bfloat16", "float32", {}),
    "16-tokens": ((5, 1, 2, 2, 7), (100, 328), 16, 16, "bfloat16", "float32", {}),
    "ragged-columns": ((4, 2, 2, 1, 3), (40, 99), 11, 11, "bfloat16", "float32", {}),
    "float32": ((4, 1, 1, 3, 2), (33, 44), 5, 5, "float32", "float32", {}),
    "float32-ragged": ((5, 2, 2, 1, 3), (33, 71), 9, 9, "float32", "bfloat16", {}),
    "many-tokens": ((4, 1, 2, 1, 4), (30, 96), 19, None, "bfloat16", "float32", {}),
    "many-rounds": ((4, 1, 1, 1, 11), (88, 2304), 1, 1, "bfloat16", "float32", {}),
    "one-column": ((4, 2, 2, 1, 1), (9, 1), 4, 4, "bfloat16", "float32", {}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_kernel_equals_float64(case, tmp_path):
    options, shape, tokens, declared, x_dtype, out_dtype, decisions = CASES[case]
    spec = KernelSpec(FORMATS["tiles"].choice(*options), *shape, declared, x_dtype, out_dtype, "sm_90a")
    cut = cut_of(shape, spec.choice)
    assert multiplies(spec, decisions, tokens, cut.bins, cut.warps, tmp_path, SHIM)


@pytest.mark.parametrize("case", ["8-tokens", "odd-tiles", "one-tile", "16-tokens"])
def test_decoding_gives_the_matrix_back(case, tmp_path):
    options, shape, *_ = CASES[case]
    spec = KernelSpec(FORMATS["tiles"].choice(*options), *shape, None, "bfloat16", "bfloat16", "sm_90a")
    cut = cut_of(shape, spec.choice)
    assert decodes(spec, cut.bins, cut.warps, tmp_path, SHIM)
