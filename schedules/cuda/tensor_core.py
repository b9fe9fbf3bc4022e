"""Device code for the tensor cores that an H200 and a B200 share: 16-bit products with float32 sums, a warp at a time.

Fragments of `mma.m16n8k16` (PTX ISA, "Matrix Fragments for mma.m16n8k16"), lane = 4 g + t:
  A [16, 16]  a0 (g, 2t..), a1 (g + 8, 2t..), a2 (g, 2t + 8..), a3 (g + 8, 2t + 8..), two neighbours in k a register
  B [16, 8]   b0 (k = 2t.., g), b1 (k = 2t + 8.., g)
  C [16, 8]   c0, c1 (g, 2t..), c2, c3 (g + 8, 2t..), float32
so that the sums of one product, packed in pairs, are the A of the next one.

Tiles in shared memory are rows of 16-byte units (8 numbers), unit u of row r at u ^ (r & 7): eight rows' same unit lie
on different banks, which is what `ldmatrix` reads. One address serves A and B:
  tvms_rows     [16 rows, 16 columns] at (row, unit): A, or B of two neighbours in n as (0, 2) and (1, 3)
  tvms_columns  the same square transposed: B of two neighbours in n as (0, 1) and (2, 3); A with 1 and 2 exchanged
"""

from __future__ import annotations

SOURCE = r"""
#ifndef TVMS_TENSOR_CORE
#define TVMS_TENSOR_CORE
__device__ __forceinline__ void tvms_ldmatrix(unsigned* to, const char* row) {
  unsigned at = (unsigned)__cvta_generic_to_shared(row);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
      : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(at) : "memory");
}
__device__ __forceinline__ void tvms_ldmatrix_transposed(unsigned* to, const char* row) {
  unsigned at = (unsigned)__cvta_generic_to_shared(row);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
      : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(at) : "memory");
}
__device__ __forceinline__ void tvms_mma_f16(float* c, const unsigned* a, unsigned b0, unsigned b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void tvms_mma_bf16(float* c, const unsigned* a, unsigned b0, unsigned b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ unsigned tvms_pack_f16(float low, float high) {
  unsigned both;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}
__device__ __forceinline__ unsigned tvms_pack_bf16(float low, float high) {
  unsigned both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}
// 16 bytes to shared memory, of which only the first `bytes` are read and the others become zero.
__device__ __forceinline__ void tvms_copy_async(char* to, const void* from, int bytes) {
  unsigned at = (unsigned)__cvta_generic_to_shared(to);
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" :: "r"(at), "l"(from), "r"(bytes) : "memory");
}
__device__ __forceinline__ void tvms_copies_done() {
  asm volatile("cp.async.wait_all;" ::: "memory");
}
#endif

#ifndef TVMS_TILES
#define TVMS_TILES
// Where unit `unit` of row `row` lies; UNITS a multiple of 8.
template <int UNITS> __device__ __forceinline__ int tvms_unit(int row, int unit) {
  return (row * UNITS + (unit ^ (row & 7))) * 16;
}
template <int UNITS> __device__ __forceinline__ void tvms_rows(unsigned* to, const char* tile, int row, int unit) {
  int lane = threadIdx.x & 31;
  tvms_ldmatrix(to, tile + tvms_unit<UNITS>(row + (lane & 15), unit + (lane >> 4)));
}
template <int UNITS> __device__ __forceinline__ void tvms_columns(unsigned* to, const char* tile, int row, int unit) {
  int lane = threadIdx.x & 31;
  tvms_ldmatrix_transposed(to, tile + tvms_unit<UNITS>(row + (lane & 15), unit + (lane >> 4)));
}
// ROWS rows of UNITS units, `stride` bytes apart in memory; from row `filled` on they become zero and are not read.
template <int ROWS, int UNITS, int THREADS>
__device__ __forceinline__ void tvms_copy_tile(char* tile, const char* from, long long stride, int filled) {
  for (int i = threadIdx.x; i < ROWS * UNITS; i += THREADS) {
    int row = i / UNITS, unit = i % UNITS;
    bool there = row < filled;
    tvms_copy_async(tile + tvms_unit<UNITS>(row, unit), there ? from + row * stride + unit * 16 : from, there ? 16 : 0);
  }
}
__device__ __forceinline__ float tvms_wide(unsigned short bits) { return __uint_as_float((unsigned)bits << 16); }
#endif
"""
