"""What the kernels that read tiles share: a warp's ring of shared memory, and the walk of its lanes along their words.

    rings      [groups of 8 warps][64 registers][8 warps][32 lanes] x 2 bfloat16
    stocks     [warps][4 slots][2 rounds][32 lanes] x 16 bytes       words on their way, bulk copies
    barriers   [warps][4 slots] x 8 bytes                            one for each slot

A register's place, 0 to 63, stands in bits 10 to 15 of an address, so that a position wraps by itself, and the gap's
field of a word adds to it almost where it stands. A lane stores the values of its words (bank = lane, so no two lanes
meet), 8 words a round; then the warp does as many steps as all its lanes have passed. A step reads its registers'
images back as fragments and leaves zeros. No lane reads what another has stored.
"""

from __future__ import annotations

from tvm_sparse.formats.tiles import Cut

GROUP = 8  # warps whose rings lie side by side
RING = 8192  # bytes a warp
STOCK = 4096  # of words on their way


def ring_bytes(cut: Cut) -> int:
    """Shared memory of a CTA: rings, stocks, barriers."""
    return RING * GROUP * -(-cut.warps // GROUP) + (STOCK + 32) * cut.warps


SOURCE = r"""
#ifndef TVMS_TILES_DEVICE
#define TVMS_TILES_DEVICE
// Shared memory by its own 32-bit addresses, without the 1024 bytes that CUDA reserves below every CTA's own: a store's
// address is then two bytes of a position and two that stay.
__device__ __forceinline__ void tvms_need_shared_memory_at_once(const void* p) {
  if ((unsigned)__cvta_generic_to_shared(p) != 1024) __trap();
}
__device__ __forceinline__ void tvms_put_half(unsigned at, unsigned value) {
  asm volatile("st.shared.u16 [%0 + 1024], %1;" :: "r"(at), "h"((unsigned short)value) : "memory");
}
__device__ __forceinline__ void tvms_put_zeros(unsigned at) {
  asm volatile("st.shared.v4.u32 [%0 + 1024], {%1, %1, %1, %1};" :: "r"(at), "r"(0) : "memory");
}
__device__ __forceinline__ void tvms_put_float(unsigned at, float value) {
  asm volatile("st.shared.f32 [%0 + 1024], %1;" :: "r"(at), "f"(value) : "memory");
}
__device__ __forceinline__ float tvms_get_float(unsigned at) {
  float value;
  asm volatile("ld.shared.f32 %0, [%1 + 1024];" : "=f"(value) : "r"(at) : "memory");
  return value;
}
__device__ __forceinline__ unsigned tvms_take_own(unsigned at) {
  // One access of shared memory to read and to clear.
  unsigned value;
  asm volatile("atom.shared.exch.b32 %0, [%1 + 1024], 0;" : "=r"(value) : "r"(at) : "memory");
  return value;
}
// A warp's words come by bulk copies, which no load of x has to wait for: ptxas has six scoreboards for all loads.
__device__ __forceinline__ void tvms_begin_copies(unsigned barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" :: "r"(barrier + 1024) : "memory");
}
__device__ __forceinline__ void tvms_copies_begun() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ __forceinline__ void tvms_copy_words(unsigned to, const void* from, unsigned bytes, unsigned barrier) {
  // By one lane; all have the same arguments, so that they are uniform registers.
  asm volatile("{.reg .pred one; elect.sync _|one, 0xffffffff;"
      "@one mbarrier.arrive.expect_tx.shared::cta.b64 _, [%3], %2;"
      "@one cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];}"
      :: "r"(to + 1024), "l"(from), "r"(bytes), "r"(barrier + 1024) : "memory");
}
__device__ __forceinline__ void tvms_wait_for_words(unsigned barrier, unsigned parity) {
  asm volatile("{.reg .pred done; again%=:"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1; @!done bra again%=;}"
      :: "r"(barrier + 1024), "r"(parity) : "memory");
}
__device__ __forceinline__ uint4 tvms_words(unsigned at) {
  uint4 w;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4 + 1024];"
      : "=r"(w.x), "=r"(w.y), "=r"(w.z), "=r"(w.w) : "r"(at) : "memory");
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
  asm("{.reg .b32 t; min.NaN.xorsign.abs.bf16x2 t, %1, %2; fma.rn.bf16x2 %0, t, %3, %4;}"
      : "=r"(scaled) : "r"(pair), "r"(0x4f7f4f7fu), "r"(0x6f806f80u), "r"(0x80008000u));
  return scaled;
}
__device__ __forceinline__ void tvms_leave(float* to, float value) { *to = value; }
__device__ __forceinline__ void tvms_leave(nv_bfloat16* to, float value) { *to = __float2bfloat16_rn(value); }
__device__ __forceinline__ void tvms_start_dependents() { asm volatile("griddepcontrol.launch_dependents;"); }
__device__ __forceinline__ void tvms_wait_for_inputs() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
#endif

#ifndef TVMS_TILES_RING
#define TVMS_TILES_RING
// A warp's ring and its stream of words, as a lane sees them; a step takes REGISTERS registers.
template <int GAP_BITS, int WARPS, int REGISTERS> struct tvms_ring {
  static const int ROW = 1024, GROUP = 64 * ROW;            // bytes of a register of 8 warps, of their rings
  static const int LAP = 64 / REGISTERS * REGISTERS * ROW;  // whole steps once round the ring
  static const int ROUND = 512, SLOT = 2 * ROUND, SLOTS = 4;
  static const int STOCK = (WARPS + 7) / 8 * GROUP, BARRIERS = STOCK + WARPS * SLOTS * SLOT;
  static const unsigned PAIR = 0x10001u;
  unsigned mine, reader;    // addresses: of the lane in its ring, from there of the next step
  unsigned position, base;  // the halves' own: bits 10 to 15 the place; an address's lowest bytes and its upper half
  unsigned stock, barriers;  // of words: SLOTS times 2 rounds, and a barrier for each
  unsigned chunks;           // in the stock, of the lane
  int rounds;
  unsigned long long from;
  const unsigned* count;
  unsigned steps_of;  // 8 rounds, of 256 the lane's

  __device__ __forceinline__ void begin(const void* words, const unsigned* counts, const int* warps, void* memory) {
    tvms_need_shared_memory_at_once(memory);
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    // From another lane, or from itself, so that the compiler keeps it and does not compute it again and again.
    mine = __shfl_sync(0xffffffffu, warp / 8 * GROUP + warp % 8 * 128, 0) + lane * 4;
    reader = 0;
    position = (mine & 0xffff) * PAIR;
    const unsigned lowest = mine & 255;
    base = __shfl_sync(0xffffffffu, (int)(lowest | (lowest + 2) << 8 | (mine & 0xffff0000u)), lane);
    const uint4 own = tvms_quad(warps + (blockIdx.x * WARPS + warp) * 4);
    rounds = __shfl_sync(0xffffffffu, (int)own.y, 0);
    from = __shfl_sync(0xffffffffu, (unsigned long long)words + (long long)(int)own.x * ROUND, 0);
    const int at = __shfl_sync(0xffffffffu, warp, 0);
    stock = STOCK + at * SLOTS * SLOT, barriers = BARRIERS + at * SLOTS * 8;
    chunks = __shfl_sync(0xffffffffu, (int)(stock + lane * 16), lane);
    if (lane == 0) {
      for (int i = 0; i < SLOTS; ++i) tvms_begin_copies(barriers + 8 * i);
      tvms_copies_begun();
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < SLOTS; ++i) fill(i, 2 * i);
    count = counts + own.z + lane;
    fetch_counts(0);
#pragma unroll
    for (int i = 0; i < 16; ++i) tvms_put_zeros(mine - lane * 4 + (4 * i + lane / 8) * ROW + lane % 8 * 16);
    __syncwarp();
  }

  // Two rounds from `round` on.
  __device__ __forceinline__ void fill(int slot, int round) {
    if (round < rounds)
      tvms_copy_words(stock + slot * SLOT, (const void*)(from + round * ROUND), SLOT, barriers + 8 * slot);
  }

  // Those of 256 rounds at once, a word a lane: loaded one by one in the walk, each would be waited for.
  __device__ __forceinline__ void fetch_counts(int round) {
    steps_of = round + (int)(threadIdx.x & 31) * 8 < rounds ? tvms_one(count + round / 8) : 0;
  }

  __device__ __forceinline__ void store(uint4 chunk) {
    const unsigned pairs[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      // What the lower position carries into the upper one's lowest byte, no address takes from there.
      position += (pairs[i] >> (5 - GAP_BITS)) & ((((1u << GAP_BITS) - 1) << 10) * PAIR);
      const unsigned values = pairs[i] & ((0x8000u | ((1u << (15 - GAP_BITS)) - 1)) * PAIR);
      tvms_put_half(__byte_perm(position, base, 0x7614), values);
      tvms_put_half(__byte_perm(position, base, 0x7635), values >> 16);
    }
    position &= 0xff00ffffu;
  }

  // The next step's registers, the i-th to where `order` says.
  template <typename Order> __device__ __forceinline__ void take(unsigned* to, Order order) {
#pragma unroll
    for (int i = 0; i < REGISTERS; ++i) to[order(i)] = tvms_take_own(mine + reader + i * ROW);
    reader = reader + REGISTERS * ROW == LAP ? 0 : reader + REGISTERS * ROW;
  }

  // All rounds; after each, `multiply` is called by the whole warp with the number of steps that all lanes have passed.
  template <typename Multiply> __device__ __forceinline__ void walk(Multiply multiply) {
    if (rounds == 0) return;
    tvms_wait_for_words(barriers, 0);
    uint4 even = tvms_words(chunks), odd = tvms_words(chunks + ROUND);
    for (int round = 0, lap = 0; round < rounds; round += 8, lap ^= 1) {
      const unsigned steps = __shfl_sync(0xffffffffu, (int)steps_of, round / 8 % 32);
#pragma unroll
      for (int slot = 0; slot < SLOTS; ++slot) {
        if (round + 2 * slot < rounds) {
          const bool more = round + 2 * slot + 2 < rounds;
          const int after = (slot + 1) % SLOTS;
          store(even);
          if (more) {
            tvms_wait_for_words(barriers + after * 8, slot + 1 == SLOTS ? lap ^ 1 : lap);
            even = tvms_words(chunks + after * SLOT);
          }
          multiply(steps >> (8 * slot) & 15);
          store(odd);
          __syncwarp();  // all lanes have read this slot
          fill(slot, round + 2 * slot + 8);
          if (more) odd = tvms_words(chunks + after * SLOT + ROUND);
          multiply(steps >> (8 * slot + 4) & 15);
        }
      }
      if (round % 256 == 248) fetch_counts(round + 8);
    }
  }
};
#endif
"""
