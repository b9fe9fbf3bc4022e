"""What the kernels that read tiles share: a warp's ring of shared memory, and the walk of its lanes along their words.

    ring       [64 registers][32 lanes] x 2 bfloat16      position p of a lane: register p / 2 % 64, half p % 2

A lane stores the values of its words (bank = lane, so no two lanes meet), 8 words a round; then the warp does as many
steps as all its lanes have passed. A step reads its registers' images back as fragments and leaves zeros.
"""

from __future__ import annotations

from tvm_sparse.formats.tiles import Cut

RING = 8192  # bytes a warp: formats.tile_words.WINDOW positions of 32 lanes


def ring_bytes(cut: Cut) -> int:
    """Shared memory of a CTA: its warps' rings, from the first multiple of RING on."""
    return RING * (cut.warps + 1)


SOURCE = r"""
#ifndef TVMS_TILES_DEVICE
#define TVMS_TILES_DEVICE
// Shared memory by its own 32-bit addresses: a store's address is put together with a few logical instructions.
__device__ __forceinline__ unsigned tvms_shared_address(const void* p) { return (unsigned)__cvta_generic_to_shared(p); }
__device__ __forceinline__ void tvms_put_half(unsigned at, unsigned value) {
  asm volatile("st.shared.u16 [%0], %1;" :: "r"(at), "h"((unsigned short)value) : "memory");
}
__device__ __forceinline__ void tvms_put_zeros(unsigned at) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" :: "r"(at), "r"(0) : "memory");
}
__device__ __forceinline__ void tvms_put_float(unsigned at, float value) {
  asm volatile("st.shared.f32 [%0], %1;" :: "r"(at), "f"(value) : "memory");
}
__device__ __forceinline__ float tvms_get_float(unsigned at) {
  float value;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(at) : "memory");
  return value;
}
__device__ __forceinline__ unsigned tvms_take_own(unsigned at) {
  // One access of shared memory to read and to clear.
  unsigned value;
  asm volatile("atom.shared.exch.b32 %0, [%1], 0;" : "=r"(value) : "r"(at) : "memory");
  return value;
}
__device__ __forceinline__ uint4 tvms_words(const uint4* from) {
  // Read once, past L1; volatile, or ptxas might move it below the wait for the kernel before.
  uint4 w;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(w.x), "=r"(w.y), "=r"(w.z), "=r"(w.w) : "l"(from));
  return w;
}
__device__ __forceinline__ uint4 tvms_quad(const void* from) {
  uint4 w;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(w.x), "=r"(w.y), "=r"(w.z), "=r"(w.w) : "l"(from) : "memory");
  return w;
}
__device__ __forceinline__ unsigned tvms_one(const void* from) {
  unsigned w;
  asm volatile("ld.global.u32 %0, [%1];" : "=r"(w) : "l"(from) : "memory");
  return w;
}
__device__ __forceinline__ unsigned tvms_half(const void* from) {
  unsigned short w;
  asm volatile("ld.global.u16 %0, [%1];" : "=h"(w) : "l"(from) : "memory");
  return w;
}
__device__ __forceinline__ unsigned tvms_scale_pair(unsigned pair) {
  // Two bfloat16 times 2^96; 2^32 and more would leave the range and is clamped below it.
  unsigned scaled;
  asm("{.reg .b32 t; min.NaN.bf16x2 t, %1, %2; max.NaN.bf16x2 t, t, %3; fma.rn.bf16x2 %0, t, %4, %5;}"
      : "=r"(scaled) : "r"(pair), "r"(0x4f7f4f7fu), "r"(0xcf7fcf7fu), "r"(0x6f806f80u), "r"(0x80008000u));
  return scaled;
}
__device__ __forceinline__ void tvms_leave(float* to, float value) { *to = value; }
__device__ __forceinline__ void tvms_leave(nv_bfloat16* to, float value) { *to = __float2bfloat16_rn(value); }
__device__ __forceinline__ void tvms_start_dependents() { asm volatile("griddepcontrol.launch_dependents;"); }
__device__ __forceinline__ void tvms_wait_for_inputs() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
#endif

#ifndef TVMS_TILES_RING
#define TVMS_TILES_RING
// A warp's ring and its stream of words, as a lane sees them.
template <int GAP_BITS, int WARPS, int DEPTH> struct tvms_ring {
  static const int RING = 8192;
  static const unsigned PAIR = 0x10001u;
  unsigned rings, ring;       // of the CTA, of the warp: shared memory addresses, multiples of RING
  unsigned base, position;    // positions in units of 64 bytes, twice: bits 7 to 12 are the register, bit 6 the half
  int rounds;
  const uint4* from;
  const unsigned* count;
  unsigned now, next;
  uint4 w[DEPTH];

  __device__ __forceinline__ void begin(const void* words, const unsigned* counts, const int* warps, void* memory) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    rings = (tvms_shared_address(memory) + (RING - 1)) & ~(unsigned)(RING - 1);
    // From another lane, so that the compiler keeps it and does not compute it again and again.
    ring = __shfl_sync(0xffffffffu, (int)(rings + warp * RING), 0);
    base = (lane * 4 | (ring & 0xffff)) * PAIR;
    position = 0;
    const uint4 own = tvms_quad(warps + (blockIdx.x * WARPS + warp) * 4);
    rounds = own.y;
    from = (const uint4*)words + (long long)(int)own.x * 32 + lane;
#pragma unroll
    for (int d = 0; d < DEPTH; ++d) {
      w[d] = make_uint4(0, 0, 0, 0);
      if (d < rounds) w[d] = tvms_words(from + 32 * d);
    }
    count = counts + own.z;
    now = tvms_one(count), next = tvms_one(count + 1);
#pragma unroll
    for (int i = 0; i < RING; i += 512) tvms_put_zeros(ring + i + lane * 16);
    __syncwarp();
  }

  __device__ __forceinline__ void store(uint4 chunk) {
    const unsigned pairs[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const unsigned gaps = (pairs[i] >> (9 - GAP_BITS)) & ((((1u << GAP_BITS) - 1) << 6) * PAIR);
      const unsigned both = gaps * PAIR + position;  // the first word's position, and above it the second's
      position = __byte_perm(both, 0, 0x3232);
      unsigned place = (both & ((RING - 128) * PAIR)) | base;
      place |= (both >> 5) & (2 * PAIR);
      const unsigned values = pairs[i] & ((0x8000u | ((1u << (15 - GAP_BITS)) - 1)) * PAIR);
      tvms_put_half(__byte_perm(place, ring, 0x7610), values);
      tvms_put_half(__byte_perm(place, ring, 0x7632), values >> 16);
    }
    position &= (RING - 64) * PAIR;
  }

  // All rounds; `step` is called for each step that all lanes have passed, by the whole warp.
  template <typename Step> __device__ __forceinline__ void walk(Step step) {
    for (int round = 0; round < rounds; round += 8) {
#pragma unroll
      for (int d = 0; d < 8; ++d) {
        if (round + d < rounds) {
          store(w[d % DEPTH]);
          if (round + d + DEPTH < rounds) w[d % DEPTH] = tvms_words(from + 32 * (d + DEPTH));
          __syncwarp();
#pragma unroll 1
          for (unsigned steps = now >> (4 * d) & 15; steps; --steps) step();
        }
      }
      from += 32 * 8;
      now = next, next = tvms_one(count + 2), ++count;
    }
  }
};
#endif
"""
