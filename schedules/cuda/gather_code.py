"""The CUDA of the gather kernel: x of 8 tokens column by column, 32 lanes' columns as fragments, a row's pieces added.

    shared memory   x [tile / 8][class columns][8 units][8 tokens] bfloat16
                    sums [tile / 8 x pieces][8 tokens][8 rows] float32
                    what other spans send [spans - 1][results] float32
                    the bin's tables: first pieces, rows, their slots, where their residual begins and ends, int32

One ldmatrix brings 32 lanes' columns of one row of W, four matrices [8 lanes, 8 tokens], as they are the first operand
of mma.m16n8k16: the first and third as products with rows 0 to 7 of it, the others with 8 to 15, k being 16 lanes each.
Columns 2 a and 2 a + 1 of the second operand hold the values of rows a and 4 + a of the group, in two pairs of
registers, for the one half of the lanes and the other. So of a product of row a, lane 4 t + a has token t's two sums as
its first and its last number. All others are products of what does not belong together, and never looked at.
"""

from __future__ import annotations

SOURCE = r"""
#ifndef TVMS_GATHER_DEVICE
#define TVMS_GATHER_DEVICE
__device__ __forceinline__ int tvms_gather_address(const void* shared) { return (int)__cvta_generic_to_shared(shared); }
template <int OFFSET> __device__ __forceinline__ void tvms_gather_columns(unsigned* to, int at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4 + %5];"
      : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(at), "n"(OFFSET));
}
__device__ __forceinline__ void tvms_gather_words(uint4& w, const uint4* from, bool there) {
  // Read once. Volatile, or ptxas might move it below the wait for the kernel before. No branch.
  asm volatile("{.reg .pred p; setp.ne.s32 p, %5, 0; @p ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];}"
      : "+r"(w.x), "+r"(w.y), "+r"(w.z), "+r"(w.w) : "l"(from), "r"((int)there));
}
// x is another kernel's work: volatile, so that no read of it moves before the wait for that kernel.
__device__ __forceinline__ unsigned tvms_gather_one(const void* from) {
  unsigned w;
  asm volatile("ld.global.u32 %0, [%1];" : "=r"(w) : "l"(from) : "memory");
  return w;
}
__device__ __forceinline__ unsigned tvms_gather_half(const void* from) {
  unsigned short w;
  asm volatile("ld.global.u16 %0, [%1];" : "=h"(w) : "l"(from) : "memory");
  return w;
}
__device__ __forceinline__ void tvms_gather_copy(int* to, const int* from) {
  int at = (int)__cvta_generic_to_shared(to);
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" :: "r"(at), "l"(from) : "memory");
}
__device__ __forceinline__ void tvms_gather_copied() { asm volatile("cp.async.wait_all;" ::: "memory"); }
__device__ __forceinline__ unsigned tvms_gather_scaled(unsigned pair) {
  // Two values times 2^96: a code's exponent would leave products with x below float32. Zeros stay.
  unsigned scaled;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(scaled) : "r"(pair), "r"(0x6f806f80u), "r"(0x80008000u));
  return scaled;
}
__device__ __forceinline__ void tvms_gather_leave(float* to, float value) { *to = value; }
__device__ __forceinline__ void tvms_gather_leave(nv_bfloat16* to, float value) { *to = __float2bfloat16_rn(value); }
__device__ __forceinline__ void tvms_gather_send(float* mine, int rank, float value) {
  // Into the same place of another CTA of the cluster.
  unsigned at = (unsigned)__cvta_generic_to_shared(mine), there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(at), "r"(rank));
  asm volatile("st.shared::cluster.f32 [%0], %1;" :: "r"(there), "f"(value) : "memory");
}
__device__ __forceinline__ float tvms_gather_received(const float* mine) { return *mine; }
__device__ __forceinline__ void tvms_gather_arrive() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }
__device__ __forceinline__ void tvms_gather_meet() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }
__device__ __forceinline__ void tvms_gather_early() { asm volatile("griddepcontrol.launch_dependents;"); }
__device__ __forceinline__ void tvms_gather_wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
#endif

#ifndef TVMS_GATHER
#define TVMS_GATHER
// Two columns of a token as a pair of bfloat16; a float32 is the sum of three of them, exactly.
__device__ __forceinline__ float tvms_gather_x(const nv_bfloat16* x) {
  return __uint_as_float(tvms_gather_half(x) << 16);
}
__device__ __forceinline__ float tvms_gather_x(const float* x) { return __uint_as_float(tvms_gather_one(x)); }
template <int K> __device__ __forceinline__ unsigned tvms_gather_pair(const nv_bfloat16* x, int left, int) {
  if (K % 2 == 0) return tvms_gather_one(x);
  return tvms_gather_half(x) | (left > 1 ? tvms_gather_half(x + 1) << 16 : 0);
}
template <int K> __device__ __forceinline__ unsigned tvms_gather_pair(const float* x, int left, int part) {
  float low = tvms_gather_x(x), high = left > 1 ? tvms_gather_x(x + 1) : 0.f;
  unsigned pair = 0;
  for (int i = 0; i <= part; ++i) {
    pair = __float_as_uint(low) >> 16 | (__float_as_uint(high) & 0xffff0000u);
    low -= __uint_as_float(pair << 16), high -= __uint_as_float(pair & 0xffff0000u);
  }
  return pair;
}

// Columns [first, first + COLUMNS) of 8 tokens, of which `tokens` are there; CLASSES to a class column, 8 / CLASSES
// times.
template <int CLASSES, int COLUMNS, int K, int THREADS, typename X>
__device__ __forceinline__ void tvms_gather_stage(const X* x, int first, int tokens, int part, uint4* to) {
  const int TURNS = (COLUMNS / 2 + THREADS - 1) / THREADS, BLOCKS = (TURNS + 6) / 7;
  const int TOGETHER = (TURNS + BLOCKS - 1) / BLOCKS;
#pragma unroll 1
  for (int block = 0; block < TURNS; block += TOGETHER) {
    unsigned u[TOGETHER][8];
#pragma unroll
    for (int turn = 0; turn < TOGETHER; ++turn) {
      const int pair = (block + turn) * THREADS + threadIdx.x, left = pair < COLUMNS / 2 ? K - first - 2 * pair : 0;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        u[turn][i] = 0;
        if (i < tokens && left > 0)
          u[turn][i] = tvms_gather_pair<K>(x + (long long)i * K + first + 2 * pair, left, part);
      }
    }
#pragma unroll
    for (int turn = 0; turn < TOGETHER; ++turn) {
      const int pair = (block + turn) * THREADS + threadIdx.x;
      const unsigned* v = u[turn];
      if (pair >= COLUMNS / 2) continue;
      const uint4 even = make_uint4(__byte_perm(v[0], v[1], 0x5410), __byte_perm(v[2], v[3], 0x5410),
                                    __byte_perm(v[4], v[5], 0x5410), __byte_perm(v[6], v[7], 0x5410));
      const uint4 odd = make_uint4(__byte_perm(v[0], v[1], 0x7632), __byte_perm(v[2], v[3], 0x7632),
                                   __byte_perm(v[4], v[5], 0x7632), __byte_perm(v[6], v[7], 0x7632));
      // Neighbouring lanes begin with different units: what 8 of them store at a time lies on different banks.
      const int order = CLASSES > 1 ? pair / (CLASSES / 2) : pair;
#pragma unroll
      for (int s = 0; s < 16 / CLASSES; ++s) {
        const int store = s ^ (order & (16 / CLASSES - 1)), second = store & 1, copy = store >> 1;
        const int column = 2 * pair + second;
        to[column / CLASSES * 8 + copy * CLASSES + column % CLASSES] = second ? odd : even;
      }
    }
  }
}

template <int GAP_BITS, int PLANE, int HALVES>
__device__ __forceinline__ void tvms_gather_chunk(uint4 words, int* at, float (*sums)[8][4]) {
  const unsigned FIELD = (1u << GAP_BITS) - 1, VALUE = 0x80008000u | ((1u << (15 - GAP_BITS)) - 1) * 0x10001u;
  const unsigned pairs[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const unsigned low = tvms_gather_scaled(pairs[2 * h] & VALUE), high = tvms_gather_scaled(pairs[2 * h + 1] & VALUE);
    unsigned columns[4][HALVES][4];
#pragma unroll
    for (int a = 0; a < 4; ++a) {
      // A class column is 128 bytes: the field's shift and the addition are one instruction, as half of a product.
      const int row = 4 * h + a, begin = row % 2 * 16 + 15 - GAP_BITS;
      at[row] += __umulhi(pairs[row / 2] & FIELD << begin, 1u << (32 - (begin - 7)));
      tvms_gather_columns<0>(columns[a][0], at[row]);
      if (HALVES == 2) tvms_gather_columns<HALVES == 2 ? PLANE : 0>(columns[a][HALVES - 1], at[row]);
    }
#pragma unroll
    for (int a = 0; a < 4; ++a)
#pragma unroll
      for (int half = 0; half < HALVES; ++half)
        tvms_mma_bf16(sums[half][4 * h + a], columns[a][half], low, high);
  }
}

__device__ __forceinline__ float tvms_gather_pick(float a, float b, float c, float d, int which) {
  const float low = which & 1 ? b : a, high = which & 1 ? d : c;
  return which & 2 ? high : low;
}

template <int GAP_BITS, int WARPS, int CLASSES, int SPANS, int GROUPS, int TILE, int DEPTH, int N, int K, typename X,
          typename Y>
__device__ __forceinline__ void tvms_gather(
    const X* x, const void* words, const int* warps, const int* groups, const int* rows, const int* row_ends,
    const int* row_slots, const int* scale, const int* res_col, const nv_bfloat16* res_val, Y* y, void* memory, int bin,
    int span, int tokens) {
  const int COLUMNS = (K + 8 * SPANS - 1) / (8 * SPANS) * 8, PLANE = COLUMNS / CLASSES * 128, THREADS = WARPS * 32;
  const int PIECES = GROUPS + WARPS - 1, PARTS = sizeof(X) == 4 ? 3 : 1, HALVES = TILE / 8;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int FIRSTS = GROUPS + 1, SLOTS = GROUPS * 8;
  float *sums_of = (float*)((char*)memory + HALVES * PLANE), *of_others = sums_of + HALVES * PIECES * 64;
  int *firsts = (int*)(of_others + (SPANS - 1) * SLOTS * TILE), *row_of = firsts + FIRSTS;
  int *slot_of = row_of + SLOTS, *res_of = slot_of + SLOTS;
  // Lane l's unit of the class column before the first: heads count from 1.
  const int origin = tvms_gather_address(memory) + (lane & 7) * 16 - 128;
  tvms_gather_early();
  if (SPANS > 1) tvms_gather_arrive();
  const float by = __uint_as_float((unsigned)((int)tvms_gather_one(scale) + (127 - 96)) << 23);  // 2^(base - 96)
  const int slots = bin * SLOTS, cta = bin * SPANS + span;
  const int *own_warp = warps + 2 * (cta * WARPS + warp);
  const int begin = (int)tvms_gather_one(own_warp), end = (int)tvms_gather_one(own_warp + 2);
  const int first_piece = (int)tvms_gather_one(own_warp + 1);
  // What the end needs is fetched at the beginning.
#pragma unroll 1
  for (int i = threadIdx.x; i < FIRSTS; i += THREADS) tvms_gather_copy(firsts + i, groups + cta * FIRSTS + i);
#pragma unroll 1
  for (int i = threadIdx.x; i < SLOTS; i += THREADS) {
    tvms_gather_copy(row_of + i, rows + slots + i);
    tvms_gather_copy(slot_of + i, row_slots + slots + i);
    tvms_gather_copy(res_of + i + 1, row_ends + slots + i);
  }
  if (threadIdx.x == 0) {
    if (slots) tvms_gather_copy(res_of, row_ends + slots - 1);
    else res_of[0] = 0;
  }
  for (int part = 0; part < PARTS; ++part) {
    int step = begin, piece = first_piece;
    const uint4* from = (const uint4*)words + (long long)step * 32 + lane;
    uint4 ring[DEPTH];
#pragma unroll
    for (int d = 0; d < DEPTH; ++d) tvms_gather_words(ring[d], from + 32 * d, step + d < end);
    if (part == 0) tvms_gather_wait();
    else __syncthreads();
    for (int half = 0; half < HALVES; ++half)
      tvms_gather_stage<CLASSES, COLUMNS, K, THREADS>(x + 8 * half * K, span * COLUMNS, tokens - 8 * half, part,
                                                      (uint4*)memory + half * (PLANE / 16));
    tvms_gather_copied();
    __syncthreads();

    int at[8], left = 0;  // chunks of the piece to come
    bool begun = false;
    float sums[HALVES][8][4];
    auto leave = [&]() {
      float* to = sums_of + piece * 64 + lane / 4 * 8 + lane % 4;
#pragma unroll
      for (int i = 0; i < 2 * HALVES; ++i) {
        float(*own)[4] = sums[i / 2] + i % 2 * 4, *at = to + i / 2 * PIECES * 64 + i % 2 * 4;
        float sum = tvms_gather_pick(own[0][0] + own[0][3], own[1][0] + own[1][3], own[2][0] + own[2][3],
                                     own[3][0] + own[3][3], lane % 4);
        *at = part ? *at + sum : sum;
      }
      ++piece;
    };
    for (bool more = true; more; step += DEPTH, from += 32 * DEPTH) {
#pragma unroll
      for (int d = 0; d < DEPTH; ++d) {
        if (left > 0) {
          tvms_gather_chunk<GAP_BITS, PLANE, HALVES>(ring[d], at, sums);
          --left;
        } else {
          if (begun) leave();
          more = begun = step + d < end;
          if (!more) break;
          const unsigned head[4] = {ring[d].x, ring[d].y, ring[d].z, ring[d].w};
          left = (int)(head[0] >> 12 & 15 | head[0] >> 28 << 4 | (head[1] >> 12 & 15) << 8);
          left = __shfl_sync(0xffffffffu, left, 0);
#pragma unroll
          for (int row = 0; row < 8; ++row) {
            at[row] = origin + (int)(head[row / 2] >> (row % 2 * 16) & 0xfff) * 128;
#pragma unroll
            for (int i = 0; i < 4 * HALVES; ++i) sums[i / 4][row][i % 4] = 0.f;
          }
        }
        tvms_gather_words(ring[d], from + 32 * (d + DEPTH), step + d + DEPTH < end);
      }
    }
  }
  // What a result needs besides its pieces is fetched before the last warp is through. Eight neighbouring rows of one
  // token lie side by side in y.
  const int RESULTS = SLOTS * TILE, TURNS = (RESULTS + THREADS - 1) / THREADS, TOGETHER = TURNS < 4 ? TURNS : 4;
#pragma unroll 1
  for (int round = 0; round < TURNS; round += TOGETHER) {
    int begins[TOGETHER], pieces[TOGETHER], targets[TOGETHER];
    float outside[TOGETHER], totals[TOGETHER];
#pragma unroll
    for (int turn = 0; turn < TOGETHER; ++turn) {
      const int i = (round + turn) * THREADS + threadIdx.x, token = i / 8 % TILE;
      const bool there = i < RESULTS;
      const int place = there ? i / (TILE * 8) * 8 + i % 8 : 0, slot = slot_of[place];
      pieces[turn] = there ? firsts[slot / 8 + 1] - firsts[slot / 8] : 0;
      begins[turn] = (firsts[slot / 8] + token / 8 * PIECES) * 64 + token % 8 * 8 + slot % 8;
      targets[turn] = there && token < tokens ? row_of[place] : -1;
      outside[turn] = 0.f;
      if (span < SPANS - 1 || targets[turn] < 0) continue;
#pragma unroll 1
      for (int r = res_of[place]; r < res_of[place + 1]; ++r)
        outside[turn] += __uint_as_float(tvms_gather_half(res_val + r) << 16) *
                         tvms_gather_x(x + (long long)token * K + tvms_gather_one(res_col + r));
    }
    if (round == 0) {
      __syncthreads();
      if (SPANS > 1) tvms_gather_meet();  // all CTAs of the cluster have begun, long ago
    }
#pragma unroll
    for (int turn = 0; turn < TOGETHER; ++turn) {
      totals[turn] = pieces[turn] > 0 ? sums_of[begins[turn]] : 0.f;
      if (pieces[turn] > 1) totals[turn] += sums_of[begins[turn] + 64];
    }
#pragma unroll
    for (int turn = 0; turn < TOGETHER; ++turn) {
#pragma unroll 1
      for (int piece = 2; piece < pieces[turn]; ++piece) totals[turn] += sums_of[begins[turn] + piece * 64];
      const int i = (round + turn) * THREADS + threadIdx.x;
      if (span < SPANS - 1 && i < RESULTS) tvms_gather_send(of_others + span * RESULTS + i, SPANS - 1, totals[turn]);
    }
    if (SPANS > 1) tvms_gather_arrive(), tvms_gather_meet();
    if (span < SPANS - 1) continue;
#pragma unroll
    for (int turn = 0; turn < TOGETHER; ++turn) {
      const int i = (round + turn) * THREADS + threadIdx.x;
      if (targets[turn] < 0) continue;
#pragma unroll
      for (int other = 0; other < SPANS - 1; ++other)
        totals[turn] += tvms_gather_received(of_others + other * RESULTS + i);
      tvms_gather_leave(y + (long long)(i / 8 % TILE) * N + targets[turn], outside[turn] + totals[turn] * by);
    }
  }
}
#endif
"""
