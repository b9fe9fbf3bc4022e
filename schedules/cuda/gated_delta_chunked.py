"""The gated delta rule for many tokens, by chunks of 64 on the tensor cores.

The WY form of "Gated Delta Networks" (Yang et al. 2024, arXiv:2412.06464), with what does not depend on the state
multiplied out beforehand. In a chunk of one value head, with keys K and queries Q [64, Dk], gamma = cumsum(g),
D_ij = exp(gamma_i - gamma_j) for i >= j, S the state [Dk, Dv] before the chunk:

  A = (I + tril(beta K K^T * D, -1))^-1        G = tril(Q K^T * D) A        B = K^T diag(exp(gamma_63 - gamma)) A
  R = beta (V - exp(gamma) K S)                O = exp(gamma) Q S + G R     S = exp(gamma_63) S + B R

The first line is done for all chunks at once, the second walks the chunks; it does not mix columns of the state, of
which each warp owns 16: they stay in its registers, as sums of one product and operand of the next. K, Q, G and B are
products of contractions with unit vectors, all within [-1, 1]: float16 holds them to 11 bits. R and S have no such
bound; each of their columns takes its own power of two on the way into a product. Sums, gates, A and the state are
float32, and S enters R only as a correction of the exact V.

  queries, keys  [chunk, Kh, 64, Dk] float16     gates  [chunk, Vh, 2, 64] float32: exp(gamma), beta
  inside (G)     [chunk, Vh, 64, 64] float16     across (B)  [chunk, Vh, Dk, 64] float16
"""

from __future__ import annotations

import tvm
from tvm.script import tirx as T

from tvm_sparse.schedules.cuda import tensor_core
from tvm_sparse.schedules.cuda.device_code import symbol, token_dim

CHUNK = 64  # tokens
COLUMNS = 64  # of the state a CTA of the second kernel walks
THREADS = 128

_SOURCE = r"""
#ifndef TVMS_DELTA_CHUNKS
#define TVMS_DELTA_CHUNKS
template <int KEY_HEADS, int VALUE_HEADS, int DK, int DV>
__device__ __forceinline__ void tvms_delta_prepare(
    const float* y, const void* mixed_bits, const float* a_log, const float* dt_bias, void* queries, void* keys,
    void* inside, void* across, float* gates, void* shared, long long n, long long row_length) {
  constexpr int GROUP = VALUE_HEADS / KEY_HEADS, UNITS = DK / 8, VECTOR = DK / 32, T_ROW = 68;
  constexpr int CHANNELS = 2 * KEY_HEADS * DK + VALUE_HEADS * DV;
  const int thread = threadIdx.x, warp = thread >> 5, lane = thread & 31, g = lane >> 2, t = lane & 3;
  const long long chunk = blockIdx.x;
  const int head = blockIdx.y, key_head = head / GROUP;
  const int filled = (int)min(n - chunk * 64, 64ll);
  char* k_tile = (char*)shared;                 // [64, DK]
  char* q_tile = k_tile + 128 * DK;             // [64, DK]; later A^T, then A^T diag(exp(gamma_63 - gamma))
  float* t_columns = (float*)(q_tile + 16384);  // [64][T_ROW]: I + tril(..), column by column
  float* gamma = t_columns + 64 * T_ROW;
  float* beta = gamma + 64;
  float* steps = beta + 64;

  if (thread < 64) {
    float b = 0.f, step = 0.f;
    if (thread < filled) {
      const unsigned short* row =
          (const unsigned short*)mixed_bits + (chunk * 64 + thread) * row_length + CHANNELS + VALUE_HEADS * DV;
      float a = tvms_wide(row[VALUE_HEADS + head]) + dt_bias[head];
      step = -expf(a_log[head]) * (fmaxf(a, 0.f) + log1pf(expf(-fabsf(a))));
      b = 1.f / (1.f + expf(-tvms_wide(row[head])));
    }
    steps[thread] = step;
    beta[thread] = b;
  }

  // Unit keys and scaled unit queries of 16 tokens a warp, four at a time.
  for (int block = 0; block < 4; ++block) {
    float q[4][VECTOR], k[4][VECTOR];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      int row = warp * 16 + block * 4 + i;
      const float* from = y + (chunk * 64 + row) * CHANNELS + key_head * DK + lane * VECTOR;
#pragma unroll
      for (int v = 0; v < VECTOR; ++v) q[i][v] = k[i][v] = 0.f;
      if (row < filled) {
#pragma unroll
        for (int v = 0; v < VECTOR; v += 2) {
          float2 pair = *(const float2*)(from + v);
          q[i][v] = pair.x, q[i][v + 1] = pair.y;
          pair = *(const float2*)(from + KEY_HEADS * DK + v);
          k[i][v] = pair.x, k[i][v + 1] = pair.y;
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      int row = warp * 16 + block * 4 + i;
      float q_norm = 0.f, k_norm = 0.f;
#pragma unroll
      for (int v = 0; v < VECTOR; ++v) q_norm += q[i][v] * q[i][v], k_norm += k[i][v] * k[i][v];
#pragma unroll
      for (int step = 16; step > 0; step >>= 1) {
        q_norm += __shfl_xor_sync(0xffffffffu, q_norm, step);
        k_norm += __shfl_xor_sync(0xffffffffu, k_norm, step);
      }
      q_norm = rsqrtf(q_norm + 1e-6f) * rsqrtf((float)DK);
      k_norm = rsqrtf(k_norm + 1e-6f);
      long long out = ((chunk * KEY_HEADS + key_head) * 64 + row) * (DK / 2) + lane * (VECTOR / 2);
#pragma unroll
      for (int v = 0; v < VECTOR; v += 2) {
        unsigned q_pair = tvms_pack_f16(q[i][v] * q_norm, q[i][v + 1] * q_norm);
        unsigned k_pair = tvms_pack_f16(k[i][v] * k_norm, k[i][v + 1] * k_norm);
        int column = lane * VECTOR + v, at = tvms_unit<UNITS>(row, column >> 3) + (column & 7) * 2;
        *(unsigned*)(q_tile + at) = q_pair;
        *(unsigned*)(k_tile + at) = k_pair;
        if (head % GROUP == 0) {
          ((unsigned*)queries)[out + v / 2] = q_pair;
          ((unsigned*)keys)[out + v / 2] = k_pair;
        }
      }
    }
  }
  __syncthreads();
  if (thread < 64) {
    float sum = 0.f;
    for (int i = 0; i <= thread; ++i) sum += steps[i];
    gamma[thread] = sum;
    float* to = gates + (chunk * VALUE_HEADS + head) * 128 + thread;
    to[0] = expf(sum);
    to[64] = beta[thread];
  }

  // Rows 16 warp .. of K K^T and Q K^T, the columns up to the diagonal.
  float kk[8][4], qk[8][4];
#pragma unroll
  for (int i = 0; i < 8; ++i)
#pragma unroll
    for (int e = 0; e < 4; ++e) kk[i][e] = qk[i][e] = 0.f;
#pragma unroll
  for (int step = 0; step < DK / 16; ++step) {
    unsigned k_rows[4], q_rows[4], columns[4];
    tvms_rows<UNITS>(k_rows, k_tile, warp * 16, 2 * step);
    tvms_rows<UNITS>(q_rows, q_tile, warp * 16, 2 * step);
#pragma unroll
    for (int p = 0; p < 4; ++p)
      if (p <= warp) {
        tvms_rows<UNITS>(columns, k_tile, p * 16, 2 * step);
        tvms_mma_f16(kk[2 * p], k_rows, columns[0], columns[2]);
        tvms_mma_f16(kk[2 * p + 1], k_rows, columns[1], columns[3]);
        tvms_mma_f16(qk[2 * p], q_rows, columns[0], columns[2]);
        tvms_mma_f16(qk[2 * p + 1], q_rows, columns[1], columns[3]);
      }
  }
  __syncthreads();  // gamma is there, q_tile is free
#pragma unroll
  for (int tile = 0; tile < 8; ++tile)
    if (tile < 2 * warp + 2) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        int i = warp * 16 + g + 8 * (e >> 1), j = tile * 8 + 2 * t + (e & 1);
        float decay = j <= i ? expf(gamma[i] - gamma[j]) : 0.f;
        t_columns[j * T_ROW + i] = beta[i] * decay * kk[tile][e];
        qk[tile][e] *= decay;
      }
    }
  __syncthreads();

  // Thread j solves for column j of A; row by row, what is known is taken off all rows below.
  char* solved = q_tile;
  char* decayed = q_tile + 64 * 128;
  if (thread < 64) {
    float a[64];
#pragma unroll
    for (int i = 0; i < 64; ++i) a[i] = i == thread ? 1.f : 0.f;
#pragma unroll
    for (int half = 0; half < 2; ++half)
      if (half == 1 || warp == 0) {
#pragma unroll
        for (int i = 32 * half; i < 32 * half + 32; ++i) {
#pragma unroll
          for (int r = (i + 1) / 4 * 4; r < 64; r += 4) {
            float4 below = *(const float4*)(t_columns + i * T_ROW + r);
            if (r > i) a[r] -= below.x * a[i];
            if (r + 1 > i) a[r + 1] -= below.y * a[i];
            if (r + 2 > i) a[r + 2] -= below.z * a[i];
            if (r + 3 > i) a[r + 3] -= below.w * a[i];
          }
        }
      }
#pragma unroll
    for (int unit = 0; unit < 8; ++unit) {
      unsigned plain[4], scaled[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        int m = unit * 8 + 2 * i;
        plain[i] = tvms_pack_f16(a[m], a[m + 1]);
        scaled[i] = tvms_pack_f16(a[m] * expf(gamma[63] - gamma[m]), a[m + 1] * expf(gamma[63] - gamma[m + 1]));
      }
      *(uint4*)(solved + tvms_unit<8>(thread, unit)) = make_uint4(plain[0], plain[1], plain[2], plain[3]);
      *(uint4*)(decayed + tvms_unit<8>(thread, unit)) = make_uint4(scaled[0], scaled[1], scaled[2], scaled[3]);
    }
  }
  __syncthreads();

  float sums[8][4];
#pragma unroll
  for (int i = 0; i < 8; ++i)
#pragma unroll
    for (int e = 0; e < 4; ++e) sums[i][e] = 0.f;
#pragma unroll
  for (int step = 0; step < 4; ++step)
    if (step <= warp) {
      unsigned rows[4] = {tvms_pack_f16(qk[2 * step][0], qk[2 * step][1]),
                          tvms_pack_f16(qk[2 * step][2], qk[2 * step][3]),
                          tvms_pack_f16(qk[2 * step + 1][0], qk[2 * step + 1][1]),
                          tvms_pack_f16(qk[2 * step + 1][2], qk[2 * step + 1][3])};
#pragma unroll
      for (int p = 0; p <= step; ++p) {
        unsigned columns[4];
        tvms_rows<8>(columns, solved, p * 16, 2 * step);
        tvms_mma_f16(sums[2 * p], rows, columns[0], columns[2]);
        tvms_mma_f16(sums[2 * p + 1], rows, columns[1], columns[3]);
      }
    }
  unsigned* to = (unsigned*)inside + ((chunk * VALUE_HEADS + head) * 64 + warp * 16 + g) * 32 + t;
#pragma unroll
  for (int tile = 0; tile < 8; ++tile) {
    to[tile * 4] = tvms_pack_f16(sums[tile][0], sums[tile][1]);
    to[tile * 4 + 8 * 32] = tvms_pack_f16(sums[tile][2], sums[tile][3]);
  }

  // Rows 16 m .. of B = K^T diag A, a warp every fourth.
  for (int m = warp; m < DK / 16; m += 4) {
#pragma unroll
    for (int i = 0; i < 8; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[i][e] = 0.f;
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      unsigned turned[4];
      tvms_columns<UNITS>(turned, k_tile, step * 16, 2 * m);
      unsigned rows[4] = {turned[0], turned[2], turned[1], turned[3]};
#pragma unroll
      for (int p = 0; p <= step; ++p) {
        unsigned columns[4];
        tvms_rows<8>(columns, decayed, p * 16, 2 * step);
        tvms_mma_f16(sums[2 * p], rows, columns[0], columns[2]);
        tvms_mma_f16(sums[2 * p + 1], rows, columns[1], columns[3]);
      }
    }
    to = (unsigned*)across + ((chunk * VALUE_HEADS + head) * DK + m * 16 + g) * 32 + t;
#pragma unroll
    for (int tile = 0; tile < 8; ++tile) {
      to[tile * 4] = tvms_pack_f16(sums[tile][0], sums[tile][1]);
      to[tile * 4 + 8 * 32] = tvms_pack_f16(sums[tile][2], sums[tile][3]);
    }
  }
}

// The power of two (and its inverse) that brings the row's largest number to 2^12 .. 2^13.
__device__ __forceinline__ float2 tvms_delta_scale(float largest) {
  largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 1));
  largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 2));
  int exponent = min(max((int)(__float_as_uint(largest) >> 23), 127 - 50), 127 + 50) - 12;
  return make_float2(__uint_as_float((unsigned)(254 - exponent) << 23), __uint_as_float((unsigned)exponent << 23));
}

template <int KEY_HEADS, int VALUE_HEADS, int DK, int DV>
__device__ __forceinline__ void tvms_delta_walk(
    const float* y, const void* queries, const void* keys, const void* inside, const void* across, const float* gates,
    float* o, void* shared, float* state, long long n) {
  constexpr int UNITS = DK / 8, V_ROW = 68, GROUP = VALUE_HEADS / KEY_HEADS;
  constexpr int CHANNELS = 2 * KEY_HEADS * DK + VALUE_HEADS * DV;
  constexpr int K_TILE = 128 * DK, STAGE = 3 * K_TILE + 64 * 128 + 64 * V_ROW * 4 + 512;
  const int thread = threadIdx.x, warp = thread >> 5, lane = thread & 31, g = lane >> 2, t = lane & 3;
  const int head = blockIdx.y, key_head = head / GROUP, first = blockIdx.x * 64;
  const int column = warp * 16 + g;  // and column + 8, of the CTA's
  const int chunks = (int)((n + 63) / 64);

  auto fetch = [&](long long chunk) {
    char* tile = (char*)shared + (chunk & 1) * STAGE;
    long long own = chunk * VALUE_HEADS + head, of_key = (chunk * KEY_HEADS + key_head) * K_TILE;
    int filled = (int)min(n - chunk * 64, 64ll);
    tvms_copy_tile<64, UNITS, 128>(tile, (const char*)keys + of_key, 2 * DK, 64);
    tvms_copy_tile<64, UNITS, 128>(tile + K_TILE, (const char*)queries + of_key, 2 * DK, 64);
    tvms_copy_tile<DK, 8, 128>(tile + 2 * K_TILE, (const char*)across + own * K_TILE, 128, DK);
    tvms_copy_tile<64, 8, 128>(tile + 3 * K_TILE, (const char*)inside + own * 64 * 128, 128, 64);
    tile += 3 * K_TILE + 64 * 128;
    const float* v = y + chunk * 64 * CHANNELS + 2 * KEY_HEADS * DK + head * DV + first;
    for (int i = thread; i < 64 * 16; i += 128) {
      bool there = i / 16 < filled;
      tvms_copy_async(tile + i / 16 * (V_ROW * 4) + i % 16 * 16,
          there ? v + (long long)(i / 16) * CHANNELS + i % 16 * 4 : v, there ? 16 : 0);
    }
    if (thread < 32) tvms_copy_async(tile + 64 * V_ROW * 4 + thread * 16, gates + own * 128 + thread * 4, 16);
  };

  fetch(0);
  // S^T: rows are the warp's columns of the state, [dim / 8][as C].
  float s[DK / 8][4];
  float* mine = state + (long long)head * DK * DV + first + column;
#pragma unroll
  for (int tile = 0; tile < DK / 8; ++tile)
#pragma unroll
    for (int e = 0; e < 4; ++e) s[tile][e] = mine[(tile * 8 + 2 * t + (e & 1)) * DV + 8 * (e >> 1)];

  for (int chunk = 0; chunk < chunks; ++chunk) {
    tvms_copies_done();
    __syncthreads();
    if (chunk + 1 < chunks) fetch(chunk + 1);
    const char* k_tile = (const char*)shared + (chunk & 1) * STAGE;
    const char *q_tile = k_tile + K_TILE, *b_tile = q_tile + K_TILE, *g_tile = b_tile + K_TILE;
    const float* v_tile = (const float*)(g_tile + 64 * 128);
    const float* decays = v_tile + 64 * V_ROW;
    const float* beta = decays + 64;

    float top = 0.f, low = 0.f;
#pragma unroll
    for (int tile = 0; tile < DK / 8; ++tile) {
      top = fmaxf(top, fmaxf(fabsf(s[tile][0]), fabsf(s[tile][1])));
      low = fmaxf(low, fmaxf(fabsf(s[tile][2]), fabsf(s[tile][3])));
    }
    float2 s_top = tvms_delta_scale(top), s_low = tvms_delta_scale(low);

    // (K S)^T and (Q S)^T, [token / 8][as C].
    float r[8][4], out[8][4];
#pragma unroll
    for (int i = 0; i < 8; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e) r[i][e] = out[i][e] = 0.f;
#pragma unroll
    for (int step = 0; step < DK / 16; ++step) {
      unsigned rows[4], columns[4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        rows[2 * i] = tvms_pack_f16(s[2 * step + i][0] * s_top.x, s[2 * step + i][1] * s_top.x);
        rows[2 * i + 1] = tvms_pack_f16(s[2 * step + i][2] * s_low.x, s[2 * step + i][3] * s_low.x);
      }
#pragma unroll
      for (int p = 0; p < 4; ++p) {
        tvms_rows<UNITS>(columns, k_tile, p * 16, 2 * step);
        tvms_mma_f16(r[2 * p], rows, columns[0], columns[2]);
        tvms_mma_f16(r[2 * p + 1], rows, columns[1], columns[3]);
        tvms_rows<UNITS>(columns, q_tile, p * 16, 2 * step);
        tvms_mma_f16(out[2 * p], rows, columns[0], columns[2]);
        tvms_mma_f16(out[2 * p + 1], rows, columns[1], columns[3]);
      }
    }
    top = low = 0.f;
#pragma unroll
    for (int tile = 0; tile < 8; ++tile)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        int token = tile * 8 + 2 * t + (e & 1);
        float inverse = e < 2 ? s_top.y : s_low.y, v = v_tile[token * V_ROW + column + 8 * (e >> 1)];
        r[tile][e] = beta[token] * (v - decays[token] * (r[tile][e] * inverse));
        out[tile][e] = decays[token] * (out[tile][e] * inverse);
        if (e < 2) top = fmaxf(top, fabsf(r[tile][e]));
        else low = fmaxf(low, fabsf(r[tile][e]));
      }
    float2 r_top = tvms_delta_scale(top), r_low = tvms_delta_scale(low);
    unsigned rows[4][4];
#pragma unroll
    for (int tile = 0; tile < 8; ++tile) {
      rows[tile / 2][tile % 2 * 2] = tvms_pack_f16(r[tile][0] * r_top.x, r[tile][1] * r_top.x);
      rows[tile / 2][tile % 2 * 2 + 1] = tvms_pack_f16(r[tile][2] * r_low.x, r[tile][3] * r_low.x);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        out[tile][e] *= e < 2 ? r_top.x : r_low.x;
      }
    }
    // + (G R)^T, whose G is lower triangular.
#pragma unroll
    for (int step = 0; step < 4; ++step)
#pragma unroll
      for (int p = step; p < 4; ++p) {
        unsigned columns[4];
        tvms_rows<8>(columns, g_tile, p * 16, 2 * step);
        tvms_mma_f16(out[2 * p], rows[step], columns[0], columns[2]);
        tvms_mma_f16(out[2 * p + 1], rows[step], columns[1], columns[3]);
      }
    float* to = o + (long long)chunk * 64 * (VALUE_HEADS * DV) + head * DV + first + column;
#pragma unroll
    for (int tile = 0; tile < 8; ++tile)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        int token = tile * 8 + 2 * t + (e & 1);
        if ((long long)chunk * 64 + token < n)
          to[(long long)token * (VALUE_HEADS * DV) + 8 * (e >> 1)] = out[tile][e] * (e < 2 ? r_top.y : r_low.y);
      }

    float d_top = decays[63] * r_top.x, d_low = decays[63] * r_low.x;
#pragma unroll
    for (int tile = 0; tile < DK / 8; ++tile) {
      s[tile][0] *= d_top, s[tile][1] *= d_top;
      s[tile][2] *= d_low, s[tile][3] *= d_low;
    }
#pragma unroll
    for (int step = 0; step < 4; ++step)
#pragma unroll
      for (int p = 0; p < DK / 16; ++p) {
        unsigned columns[4];
        tvms_rows<8>(columns, b_tile, p * 16, 2 * step);
        tvms_mma_f16(s[2 * p], rows[step], columns[0], columns[2]);
        tvms_mma_f16(s[2 * p + 1], rows[step], columns[1], columns[3]);
      }
#pragma unroll
    for (int tile = 0; tile < DK / 8; ++tile) {
      s[tile][0] *= r_top.y, s[tile][1] *= r_top.y;
      s[tile][2] *= r_low.y, s[tile][3] *= r_low.y;
    }
  }
#pragma unroll
  for (int tile = 0; tile < DK / 8; ++tile)
#pragma unroll
    for (int e = 0; e < 4; ++e) mine[(tile * 8 + 2 * t + (e & 1)) * DV + 8 * (e >> 1)] = s[tile][e];
}
#endif
"""


def fits(key_dim: int, value_dim: int, dtype: str) -> bool:
    """Whether the chunked form serves these heads; float32 models keep to float32 products, token by token."""
    return dtype == "bfloat16" and key_dim in (64, 128) and value_dim % COLUMNS == 0


def gated_delta(
    batch: int, key_heads: int, value_heads: int, key_dim: int, value_dim: int, dtype: str
) -> tvm.tirx.PrimFunc:
    """Prefill and score; see schedules/ops.py."""
    n, row_length = token_dim(None), symbol("row_length")
    channels = 2 * key_heads * key_dim + value_heads * value_dim
    chunks = (n + CHUNK - 1) // CHUNK
    sizes = f"<{key_heads}, {value_heads}, {key_dim}, {value_dim}>"
    tile = CHUNK * key_dim * 2
    prepared = tile + 4 * CHUNK * CHUNK + CHUNK * 68 * 4 + 3 * CHUNK * 4
    staged = 2 * (3 * tile + CHUNK * CHUNK * 2 + CHUNK * 68 * 4 + 2 * CHUNK * 4)

    def call(name, buffers, *more):
        pointers = [buffer.data for buffer in buffers]  # address_of would make TVM shrink them to one element
        return T.evaluate(T.cuda.func_call(name + sizes, *pointers, *more, source_code=tensor_core.SOURCE + _SOURCE))

    @T.prim_func(s_tir=True)
    def gated_delta(
        y: T.Buffer((n, channels), "float32"),
        mixed: T.Buffer((n, row_length), dtype),
        a_log: T.Buffer((value_heads,), "float32"),
        dt_bias: T.Buffer((value_heads,), "float32"),
        slot: T.Buffer((1,), "int32"),
        state: T.Buffer((batch, value_heads, key_dim, value_dim), "float32"),
        o: T.Buffer((n, value_heads * value_dim), "float32"),
    ):
        queries = T.alloc_buffer((chunks, key_heads, CHUNK, key_dim), "float16", scope="global")
        keys = T.alloc_buffer((chunks, key_heads, CHUNK, key_dim), "float16", scope="global")
        inside = T.alloc_buffer((chunks, value_heads, CHUNK, CHUNK), "float16", scope="global")
        across = T.alloc_buffer((chunks, value_heads, key_dim, CHUNK), "float16", scope="global")
        gates = T.alloc_buffer((chunks, value_heads, 2, CHUNK), "float32", scope="global")
        with (
            T.launch_thread("blockIdx.x", chunks) as chunk,
            T.launch_thread("blockIdx.y", value_heads) as head,
            T.launch_thread("threadIdx.x", THREADS) as thread,
        ):
            tiles = T.alloc_buffer((prepared,), "uint8", scope="shared.dyn")
            call(
                "tvms_delta_prepare",
                (y, mixed, a_log, dt_bias, queries, keys, inside, across, gates, tiles),
                n,
                row_length,
            )
        with (
            T.launch_thread("blockIdx.x", value_dim // COLUMNS) as block,
            T.launch_thread("blockIdx.y", value_heads) as head,
            T.launch_thread("threadIdx.x", THREADS) as thread,
        ):
            stages = T.alloc_buffer((staged,), "uint8", scope="shared.dyn")
            call(
                "tvms_delta_walk",
                (y, queries, keys, inside, across, gates, o, stages),
                T.address_of(state[slot[0], 0, 0, 0]),
                n,
            )

    return gated_delta
