"""The CUDA of a decode step's attention (attention_step.py): its tensor core products and its table of frequencies."""

from __future__ import annotations

import struct

SOURCE = """
#ifndef TVMS_ATTENTION
#define TVMS_ATTENTION
__device__ __forceinline__ float tvms_sum_lanes(float v) {
  for (int step = 16; step > 0; step >>= 1) v += __shfl_xor_sync(0xffffffffu, v, step);
  return v;
}
__device__ __forceinline__ int tvms_held(const int* position) {
  int v;
  asm volatile("ld.global.s32 %0, [%1];" : "=r"(v) : "l"(position));
  return v;
}
// Shares that have something to do: one for each 64 positions before the token's own, at least one.
__device__ __forceinline__ int tvms_shares(int held, int most) {
  return min(most, max(1, (held + 63) / 64));
}
__device__ __forceinline__ void tvms_mma(float* c, const unsigned* a, unsigned b0, unsigned b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};" : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ uint4 tvms_cache_load(const nv_bfloat16* from) {
  uint4 v;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from));
  return v;
}
// Two float32 as two bfloat16 in a register, the first below; what is lost goes into `rest`.
__device__ __forceinline__ unsigned tvms_pack(float a, float b, unsigned* rest) {
  unsigned v, w;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(b), "f"(a));
  a -= __uint_as_float(v << 16);
  b -= __uint_as_float(v & 0xffff0000u);
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(w) : "f"(b), "f"(a));
  *rest = w;
  return v;
}
__device__ __forceinline__ unsigned tvms_transpose(unsigned v) {
  unsigned r;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(v));
  return r;
}

// A warp's row of D numbers stands in its lanes as D / 32 registers: dimension lane + 32 e in register e.
template <int D>
__device__ __forceinline__ void tvms_row(const nv_bfloat16* from, float* x) {
#pragma unroll
  for (int e = 0; e < D / 32; ++e) {
    unsigned short bits;
    asm volatile("ld.global.u16 %0, [%1];" : "=h"(bits) : "l"(from + 32 * e));
    x[e] = __uint_as_float((unsigned)bits << 16);
  }
}

// Code is fetched anew in every layer, so little of it stands on the way of a short context: all eight warps norm one
// row each, four walk the cache, and each adds up one query head at the end.
template <int D, int G, int ROTARY, class Inverse>
__device__ __forceinline__ void tvms_attention_part(
    const nv_bfloat16* qkv, const float* q_norm, const float* k_norm, const int* position, nv_bfloat16* keys,
    nv_bfloat16* values, float* sums, float* marks, int key_head, int kv_heads, int share, int most, int context,
    float eps) {
  constexpr int WARPS = 8, READERS = 4, E = D / 32, HALF = ROTARY / 2, ROW = D + 32;
  constexpr bool INSIDE = HALF % 32 == 0;  // both numbers that a rotation mixes are one lane's
  constexpr int TURNS = INSIDE ? HALF / 32 : 1;
  __shared__ __align__(16) nv_bfloat16 query[2][8][ROW];  // rows from G on make columns that nobody reads
  __shared__ float fresh[2][D];
  __shared__ __align__(16) float parts[READERS][8][D + 4];
  __shared__ float mark[READERS][8][2];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  const int held = min(tvms_held(position), context - 1);
  const int shares = tvms_shares(held, most);
  if (share && share >= shares) return;
  float norm[E];
  auto load_norm = [&](int job) {
    const float* from = (job < G ? q_norm : k_norm) + lane;
#pragma unroll
    for (int e = 0; e < E; ++e) norm[e] = from[32 * e];
  };
  load_norm(warp);

  asm volatile("griddepcontrol.wait;" ::: "memory");
  const int jobs = share ? G : G + 2;  // query heads, then the token's key and value
  float x[E], own[E];
  auto load_row = [&](int job) {
    const int row = job < G ? (key_head * G + job) * 2 : 2 * G * kv_heads + (job - G) * kv_heads + key_head;
    tvms_row<D>(qkv + row * D + lane, x);
  };
  if (warp < jobs) load_row(warp);

  const int tiles = (held + 15) / 16, begin = tiles * share / shares, end = tiles * (share + 1) / shares;
  int tile = warp < READERS ? begin + warp : end;
  uint4 k[D / 32][2], v[D / 64][4];
  auto load_keys = [&](int at) {
#pragma unroll
    for (int row = 0; row < 2; ++row)
#pragma unroll
      for (int j = 0; j < D / 32; ++j)
        k[j][row] = tvms_cache_load(keys + (long long)min(at * 16 + g + 8 * row, held - 1) * D + 32 * j + 8 * t);
  };
  auto load_values = [&](int at) {
#pragma unroll
    for (int row = 0; row < 4; ++row)
#pragma unroll
      for (int j = 0; j < D / 64; ++j)
        v[j][row] = tvms_cache_load(
            values + (long long)min(at * 16 + 2 * t + (row & 1) + 4 * (row & 2), held - 1) * D + 64 * j + 8 * g);
  };
  if (tile < end) {
    load_keys(tile);
    load_values(tile);
  }
  float cosine[TURNS], sine[TURNS];
#pragma unroll
  for (int i = 0; i < TURNS; ++i)
    sincosf((float)held * Inverse::at(INSIDE ? lane + 32 * i : lane % HALF), &sine[i], &cosine[i]);

#pragma unroll 1
  for (int job = warp; job < jobs; job += WARPS) {
    if (job >= WARPS) {
      load_norm(job);
      load_row(job);
    }
    if (job <= G) {
      float squares = 0.f;
#pragma unroll
      for (int e = 0; e < E; ++e) squares += x[e] * x[e];
      const float scale = rsqrtf(tvms_sum_lanes(squares) / D + eps);
#pragma unroll
      for (int e = 0; e < E; ++e) x[e] *= scale * norm[e];
      if constexpr (INSIDE) {
#pragma unroll
        for (int i = 0; i < TURNS; ++i) {
          const float first = x[i], second = x[i + TURNS];
          x[i] = first * cosine[i] - second * sine[i];
          x[i + TURNS] = second * cosine[i] + first * sine[i];
        }
      } else {
        const float other = __shfl_sync(0xffffffffu, x[0], (lane < HALF ? lane + HALF : lane - HALF) & 31);
        if (lane < ROTARY) x[0] = x[0] * cosine[0] + (lane < HALF ? -other : other) * sine[0];
      }
    }
    if (job < G) {
#pragma unroll
      for (int e = 0; e < E; ++e) {
        own[e] = x[e] * (float)(1.4426950408889634 / D * __fsqrt_rn((float)D));
        const nv_bfloat16 high = nv_bfloat16(own[e]);
        query[0][job][lane + 32 * e] = high;
        query[1][job][lane + 32 * e] = nv_bfloat16(own[e] - (float)high);
      }
    } else {
      nv_bfloat16* to = (job == G ? keys : values) + (long long)held * D + lane;
#pragma unroll
      for (int e = 0; e < E; ++e) {
        const nv_bfloat16 kept = nv_bfloat16(x[e]);
        fresh[job - G][lane + 32 * e] = (float)kept;
        to[32 * e] = kept;
      }
    }
  }
  __syncthreads();
  float dot = -INFINITY;  // of the warp's query and the token's own key
  if (share == 0 && warp < G) {
    dot = 0.f;
#pragma unroll
    for (int e = 0; e < E; ++e) dot += own[e] * fresh[0][lane + 32 * e];
    dot = tvms_sum_lanes(dot);
  }

  if (tile < end) {
    float out[D / 16][4] = {}, most_seen[2] = {-INFINITY, -INFINITY}, total[2] = {};
#pragma unroll 1
    for (; tile < end; tile += READERS) {
      float score[4][4] = {};
#pragma unroll
      for (int j = 0; j < D / 32; ++j) {
        const uint4 high = *(const uint4*)&query[0][g][32 * j + 8 * t];
        const uint4 low = *(const uint4*)&query[1][g][32 * j + 8 * t];
        const unsigned first[4] = {k[j][0].x, k[j][1].x, k[j][0].y, k[j][1].y};
        const unsigned second[4] = {k[j][0].z, k[j][1].z, k[j][0].w, k[j][1].w};
        tvms_mma(score[0], first, high.x, high.y);
        tvms_mma(score[1], first, low.x, low.y);
        tvms_mma(score[2], second, high.z, high.w);
        tvms_mma(score[3], second, low.z, low.w);
      }
      if (tile + READERS < end) load_keys(tile + READERS);
      float p[4], shrink[2];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        p[i] = (score[0][i] + score[2][i]) + (score[1][i] + score[3][i]);
        if (tile * 16 + g + 4 * (i & 2) >= held) p[i] = -INFINITY;
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float largest = fmaxf(p[i], p[i + 2]);
        for (int step = 4; step < 32; step <<= 1)
          largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, step));
        largest = fmaxf(largest, most_seen[i]);
        shrink[i] = exp2f(most_seen[i] - largest);
        most_seen[i] = largest;
        p[i] = exp2f(p[i] - largest);
        p[i + 2] = exp2f(p[i + 2] - largest);
        total[i] = total[i] * shrink[i] + (p[i] + p[i + 2]);
      }
      unsigned b[2][2];
      b[0][0] = tvms_transpose(tvms_pack(p[0], p[1], &b[1][0]));
      b[0][1] = tvms_transpose(tvms_pack(p[2], p[3], &b[1][1]));
      b[1][0] = tvms_transpose(b[1][0]);
      b[1][1] = tvms_transpose(b[1][1]);
#pragma unroll
      for (int j = 0; j < D / 64; ++j)
#pragma unroll
        for (int m = 0; m < 4; ++m) {
          const unsigned row[4] = {(&v[j][0].x)[m], (&v[j][1].x)[m], (&v[j][2].x)[m], (&v[j][3].x)[m]};
          const unsigned a[4] = {__byte_perm(row[0], row[1], 0x5410), __byte_perm(row[0], row[1], 0x7632),
                                 __byte_perm(row[2], row[3], 0x5410), __byte_perm(row[2], row[3], 0x7632)};
          float* c = out[4 * j + m];
#pragma unroll
          for (int i = 0; i < 4; ++i) c[i] *= shrink[i & 1];
          tvms_mma(c, a, b[0][0], b[0][1]);
          tvms_mma(c, a, b[1][0], b[1][1]);
        }
      if (tile + READERS < end) load_values(tile + READERS);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      for (int step = 4; step < 32; step <<= 1) total[i] += __shfl_xor_sync(0xffffffffu, total[i], step);
      if (g == 0) {
        mark[warp][2 * t + i][0] = most_seen[i];
        mark[warp][2 * t + i][1] = total[i];
      }
#pragma unroll
      for (int j = 0; j < D / 64; ++j)
#pragma unroll
        for (int m = 0; m < 4; ++m) {
          const float* c = out[4 * j + m];
          *(float2*)&parts[warp][2 * t + i][64 * j + 8 * g + 2 * m] = make_float2(c[i], c[i + 2]);
        }
    }
  }
  __syncthreads();
  if (warp >= G) return;
  const int readers = min(READERS, end - begin);
  float largest = dot;
#pragma unroll 1
  for (int r = 0; r < readers; ++r) largest = fmaxf(largest, mark[r][warp][0]);
  float all = exp2f(dot - largest), sum[E];
#pragma unroll
  for (int e = 0; e < E; ++e) sum[e] = share ? 0.f : all * fresh[1][lane + 32 * e];
#pragma unroll 1
  for (int r = 0; r < readers; ++r) {
    const float weight = exp2f(mark[r][warp][0] - largest);
    all += weight * mark[r][warp][1];
#pragma unroll
    for (int e = 0; e < E; ++e) sum[e] += weight * parts[r][warp][lane + 32 * e];
  }
#pragma unroll
  for (int e = 0; e < E; ++e) sums[(long long)warp * most * D + lane + 32 * e] = sum[e];
  if (lane == 0) {
    marks[warp * most * 2] = largest;
    marks[warp * most * 2 + 1] = all;
  }
}

template <int D, int MOST>
__device__ __forceinline__ float tvms_attention_join(
    const float* sums, const float* marks, const nv_bfloat16* gate, const int* position, int context) {
  // One thread a dimension; `sums` and `marks` of one head.
  __shared__ float weights[MOST];
  const int lane = threadIdx.x & 31;
  const int shares = tvms_shares(min(tvms_held(position), context - 1), MOST);
  asm volatile("griddepcontrol.wait;" ::: "memory");
  unsigned short bits;
  asm volatile("ld.global.u16 %0, [%1];" : "=h"(bits) : "l"(gate + threadIdx.x));
  float mark[(MOST + 31) / 32][2], largest = -INFINITY, all = 0.f;
#pragma unroll
  for (int i = 0; i < (MOST + 31) / 32; ++i) {
    mark[i][0] = -INFINITY;
    mark[i][1] = 0.f;
    if (i * 32 + lane < shares)
      asm volatile("ld.global.v2.f32 {%0, %1}, [%2];"
          : "=f"(mark[i][0]), "=f"(mark[i][1]) : "l"(marks + 2 * (i * 32 + lane)));
    largest = fmaxf(largest, mark[i][0]);
  }
  for (int step = 16; step > 0; step >>= 1) largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, step));
#pragma unroll
  for (int i = 0; i < (MOST + 31) / 32; ++i) {
    const float weight = exp2f(mark[i][0] - largest);
    all += weight * mark[i][1];
    if (threadIdx.x < 32 && i * 32 + lane < MOST) weights[i * 32 + lane] = weight;
  }
  all = tvms_sum_lanes(all);
  __syncthreads();
  float sum = 0.f;
#pragma unroll 8
  for (int s = 0; s < shares; ++s) {
    float part;
    asm volatile("ld.global.f32 %0, [%1];" : "=f"(part) : "l"(sums + s * D + threadIdx.x));
    sum += weights[s] * part;
  }
  return sum / all / (1.f + expf(-__uint_as_float((unsigned)bits << 16)));
}
#endif
"""


def inverse_frequencies(rotary_dim: int, theta: float) -> tuple[str, str]:
    """Name and source of the inverse frequencies: computed in float64, rounded to the model's float32."""
    name = f"tvms_Inverse_{rotary_dim}_{theta:g}".replace("+", "").replace(".", "_")
    exact = (theta ** (-2.0 * i / rotary_dim) for i in range(rotary_dim // 2))
    table = ", ".join(f"{struct.unpack('f', struct.pack('f', number))[0]!r}f" for number in exact)
    return name, f"""
#ifndef {name.upper()}
#define {name.upper()}
struct {name} {{
  static __device__ __forceinline__ float at(int i) {{
    static const float table[] = {{{table}}};
    return table[i];
  }}
}};
#endif
"""
