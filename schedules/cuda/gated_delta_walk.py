"""Device code of the delta rule's second kernel: chunk after chunk, a CTA 64 columns of a head's state, a warp 16.

See gated_delta_chunked.py. Everything is transposed, rows are columns of the state: the state's sums are packed to be
the left operand of K S and Q S, and R, made of those, is the left operand of the other two products; no warp waits for
another but for the tiles, which are copied one chunk ahead. V and the state as it is kept are float32.
"""

from __future__ import annotations

SOURCE = r"""
#ifndef TVMS_DELTA_WALK
#define TVMS_DELTA_WALK
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
  constexpr int V_ROW = 68, GROUP = VALUE_HEADS / KEY_HEADS, PANELS = DK / 64;
  constexpr int CHANNELS = 2 * KEY_HEADS * DK + VALUE_HEADS * DV;
  // Panels of keys and queries, 64 columns of both; B; G; V; gates.
  constexpr int K_TILE = 128 * DK, V_AT = 3 * K_TILE + 64 * 128, STAGE = V_AT + 64 * V_ROW * 4 + 512 + 512;
  const int thread = threadIdx.x, warp = thread >> 5, lane = thread & 31, g = lane >> 2, t = lane & 3;
  const int head = blockIdx.y, key_head = head / GROUP, first = blockIdx.x * 64;
  const int column = warp * 16 + g;  // and column + 8, of the CTA's
  const int chunks = (int)((n + 63) / 64);

  auto copy = [&](char* to, const char* from, int bytes) {
#pragma unroll
    for (int at = thread * 16; at < bytes; at += 128 * 16) tvms_copy_async(to + at, from + at, 16);
  };
  auto fetch = [&](long long chunk) {
    char* tile = (char*)shared + (chunk & 1) * STAGE;
    long long own = chunk * VALUE_HEADS + head, of_key = (chunk * KEY_HEADS + key_head) * K_TILE;
    int filled = (int)min(n - chunk * 64, 64ll);
#pragma unroll
    for (int panel = 0; panel < PANELS; ++panel) {
      copy(tile + panel * 16384, (const char*)keys + of_key + panel * 8192, 8192);
      copy(tile + panel * 16384 + 8192, (const char*)queries + of_key + panel * 8192, 8192);
    }
    copy(tile + 2 * K_TILE, (const char*)across + own * K_TILE, K_TILE);
    copy(tile + 3 * K_TILE, (const char*)inside + own * 64 * 128, 64 * 128);
    tile += V_AT;
    const float* v = y + chunk * 64 * CHANNELS + 2 * KEY_HEADS * DK + head * DV + first + thread % 16 * 4;
#pragma unroll
    for (int block = 0; block < 64; block += 8)
      tvms_copy_async(tile + (block + thread / 16) * (V_ROW * 4) + thread % 16 * 16,
          v + (long long)(block + thread / 16) * CHANNELS, block + thread / 16 < filled ? 16 : 0);
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
#ifdef TVMS_WARPGROUP
    tvms_publish();
#endif
    __syncthreads();
    if (chunk + 1 < chunks) fetch(chunk + 1);
    const char* kq_tile = (const char*)shared + (chunk & 1) * STAGE;
    const char *b_tile = kq_tile + 2 * K_TILE, *g_tile = b_tile + K_TILE;
    const float* v_tile = (const float*)(kq_tile + V_AT);
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
    unsigned rows[DK / 16][4];
#pragma unroll
    for (int tile = 0; tile < DK / 8; ++tile) {
      rows[tile / 2][tile % 2 * 2] = tvms_pack_f16(s[tile][0] * s_top.x, s[tile][1] * s_top.x);
      rows[tile / 2][tile % 2 * 2 + 1] = tvms_pack_f16(s[tile][2] * s_low.x, s[tile][3] * s_low.x);
    }
#ifdef TVMS_WARPGROUP
    const unsigned long long kq = tvms_tile(kq_tile), of_b = tvms_tile(b_tile), of_g = tvms_tile(g_tile);
    tvms_products_begin();
#pragma unroll
    for (int step = 0; step < DK / 16; ++step) {
      const int at = (step / 4 * 16384 + step % 4 * 32) / 16;
      tvms_product_f16(r, rows[step], kq + at, step > 0);
      tvms_product_f16(out, rows[step], kq + at + 8192 / 16, step > 0);
    }
    tvms_products_sent();
    tvms_products_done();
    tvms_settled(r);
    tvms_settled(out);
#else
#pragma unroll
    for (int i = 0; i < 8; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e) r[i][e] = out[i][e] = 0.f;
#pragma unroll
    for (int step = 0; step < DK / 16; ++step)
#pragma unroll
      for (int p = 0; p < 4; ++p) {
        const char* at = kq_tile + step / 4 * 16384;
        unsigned columns[4];
        tvms_rows<8>(columns, at, p * 16, step % 4 * 2);
        tvms_mma_f16(r[2 * p], rows[step], columns[0], columns[2]);
        tvms_mma_f16(r[2 * p + 1], rows[step], columns[1], columns[3]);
        tvms_rows<8>(columns, at + 8192, p * 16, step % 4 * 2);
        tvms_mma_f16(out[2 * p], rows[step], columns[0], columns[2]);
        tvms_mma_f16(out[2 * p + 1], rows[step], columns[1], columns[3]);
      }
#endif
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
#pragma unroll
    for (int tile = 0; tile < 8; ++tile) {
      rows[tile / 2][tile % 2 * 2] = tvms_pack_f16(r[tile][0] * r_top.x, r[tile][1] * r_top.x);
      rows[tile / 2][tile % 2 * 2 + 1] = tvms_pack_f16(r[tile][2] * r_low.x, r[tile][3] * r_low.x);
      out[tile][0] *= r_top.x, out[tile][1] *= r_top.x;
      out[tile][2] *= r_low.x, out[tile][3] *= r_low.x;
    }
    const float d_top = decays[63] * r_top.x, d_low = decays[63] * r_low.x;
#pragma unroll
    for (int tile = 0; tile < DK / 8; ++tile) {
      s[tile][0] *= d_top, s[tile][1] *= d_top;
      s[tile][2] *= d_low, s[tile][3] *= d_low;
    }
    // + (G R)^T, + (B R)^T
#ifdef TVMS_WARPGROUP
    tvms_products_begin();
#pragma unroll
    for (int step = 0; step < 4; ++step) tvms_product_f16(out, rows[step], of_g + step * 2, 1);
    tvms_products_sent();
#pragma unroll
    for (int step = 0; step < 4; ++step) tvms_product_f16(s, rows[step], of_b + step * 2, 1);
    tvms_products_sent();
    tvms_products_done<1>();
    tvms_settled(out);
#else
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      unsigned columns[4];
#pragma unroll
      for (int p = step; p < 4; ++p) {  // G is lower triangular
        tvms_rows<8>(columns, g_tile, p * 16, 2 * step);
        tvms_mma_f16(out[2 * p], rows[step], columns[0], columns[2]);
        tvms_mma_f16(out[2 * p + 1], rows[step], columns[1], columns[3]);
      }
#pragma unroll
      for (int p = 0; p < DK / 16; ++p) {
        tvms_rows<8>(columns, b_tile, p * 16, 2 * step);
        tvms_mma_f16(s[2 * p], rows[step], columns[0], columns[2]);
        tvms_mma_f16(s[2 * p + 1], rows[step], columns[1], columns[3]);
      }
    }
#endif
    float* to = o + (long long)chunk * 64 * (VALUE_HEADS * DV) + head * DV + first + column;
#pragma unroll
    for (int tile = 0; tile < 8; ++tile)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        int token = tile * 8 + 2 * t + (e & 1);
        if ((long long)chunk * 64 + token < n)
          to[(long long)token * (VALUE_HEADS * DV) + 8 * (e >> 1)] = out[tile][e] * (e < 2 ? r_top.y : r_low.y);
      }

#ifdef TVMS_WARPGROUP
    tvms_products_done();
    tvms_settled(s);
#endif
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
