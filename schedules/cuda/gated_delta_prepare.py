"""Device code of the delta rule's first kernel: a CTA a chunk of a value head, all of them at once.

See gated_delta_chunked.py for the formulas and for what is written where. A warp has 16 tokens; A is made by blocks of
16: each on the diagonal by substitution in float32, column by column, those below from the ones above them.
"""

from __future__ import annotations

SOURCE = r"""
#ifndef TVMS_DELTA_PREPARE
#define TVMS_DELTA_PREPARE
template <int KEY_HEADS, int VALUE_HEADS, int DK, int DV>
__device__ __forceinline__ void tvms_delta_prepare(
    const float* y, const void* mixed_bits, const float* a_log, const float* dt_bias, void* queries, void* keys,
    void* inside, void* across, float* gates, void* shared, long long n, long long row_length) {
  constexpr int GROUP = VALUE_HEADS / KEY_HEADS, VECTOR = DK / 32, BLOCK_ROW = 20;
  constexpr int CHANNELS = 2 * KEY_HEADS * DK + VALUE_HEADS * DV;
  const int thread = threadIdx.x, warp = thread >> 5, lane = thread & 31, g = lane >> 2, t = lane & 3;
  const long long chunk = blockIdx.x;
  const int head = blockIdx.y, key_head = head / GROUP;
  const int filled = (int)min(n - chunk * 64, 64ll);
  char* k_tile = (char*)shared;       // [64, DK] in panels of 64 columns
  char* q_tile = k_tile + 128 * DK;   // [64, DK]; later A^T, then A^T diag(exp(gamma_63 - gamma)), [64, 64]
  char* t_tile = q_tile + 16384;      // [64, 64]: tril(beta K K^T * D, -1), its blocks below the diagonal
  float* block = (float*)(t_tile + 64 * 128) + warp * 16 * BLOCK_ROW;  // the warp's one on it, column by column
  float* gamma = (float*)(t_tile + 64 * 128) + 64 * BLOCK_ROW;
  float* beta = gamma + 64;
  float* steps = beta + 64;
  float* fade = steps + 64;  // exp(gamma_63 - gamma)

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
      const long long tile = (chunk * KEY_HEADS + key_head) * (128 * DK);
#pragma unroll
      for (int v = 0; v < VECTOR; v += 2) {
        unsigned q_pair = tvms_pack_f16(q[i][v] * q_norm, q[i][v + 1] * q_norm);
        unsigned k_pair = tvms_pack_f16(k[i][v] * k_norm, k[i][v + 1] * k_norm);
        int column = lane * VECTOR + v;
        int at = column / 64 * 8192 + tvms_unit<8>(row, column % 64 / 8) + column % 8 * 2;
        *(unsigned*)(q_tile + at) = q_pair;
        *(unsigned*)(k_tile + at) = k_pair;
        if (head % GROUP == 0) {
          *(unsigned*)((char*)queries + tile + at) = q_pair;
          *(unsigned*)((char*)keys + tile + at) = k_pair;
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
    const int panel = step / 4 * 8192, unit = step % 4 * 2;
    tvms_rows<8>(k_rows, k_tile + panel, warp * 16, unit);
    tvms_rows<8>(q_rows, q_tile + panel, warp * 16, unit);
#pragma unroll
    for (int p = 0; p < 4; ++p)
      if (p <= warp) {
        tvms_rows<8>(columns, k_tile + panel, p * 16, unit);
        tvms_mma_f16(kk[2 * p], k_rows, columns[0], columns[2]);
        tvms_mma_f16(kk[2 * p + 1], k_rows, columns[1], columns[3]);
        tvms_mma_f16(qk[2 * p], q_rows, columns[0], columns[2]);
        tvms_mma_f16(qk[2 * p + 1], q_rows, columns[1], columns[3]);
      }
  }
  __syncthreads();  // gamma is there, q_tile is free
  if (lane < 16) fade[warp * 16 + lane] = expf(gamma[63] - gamma[warp * 16 + lane]);
#pragma unroll
  for (int tile = 0; tile < 8; ++tile)
    if (tile < 2 * warp + 2) {
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const int i = warp * 16 + g + 8 * row, j = tile * 8 + 2 * t;
        float decay[2], below[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          decay[e] = j + e <= i ? expf(gamma[i] - gamma[j + e]) : 0.f;
          below[e] = beta[i] * decay[e] * kk[tile][2 * row + e];
          qk[tile][2 * row + e] *= decay[e];
        }
        if (tile < 2 * warp) {
          *(unsigned*)(t_tile + tvms_unit<8>(i, tile) + 4 * t) = tvms_pack_f16(below[0], below[1]);
        } else {
          block[(j & 15) * BLOCK_ROW + (i & 15)] = below[0];
          block[(j & 15) * BLOCK_ROW + BLOCK_ROW + (i & 15)] = below[1];
        }
      }
    }
  __syncwarp();

  // A on the diagonal: lane j has column j; row by row, what is known is taken off all rows below.
  char* solved = q_tile;
  char* faded = q_tile + 64 * 128;
  if (lane < 16) {
    float a[16];
#pragma unroll
    for (int i = 0; i < 16; ++i) a[i] = i == lane ? 1.f : 0.f;
#pragma unroll
    for (int i = 0; i < 15; ++i)
#pragma unroll
      for (int r = (i + 1) / 4 * 4; r < 16; r += 4) {
        float4 below = *(const float4*)(block + i * BLOCK_ROW + r);
        if (r > i) a[r] -= below.x * a[i];
        if (r + 1 > i) a[r + 1] -= below.y * a[i];
        if (r + 2 > i) a[r + 2] -= below.z * a[i];
        a[r + 3] -= below.w * a[i];
      }
#pragma unroll
    for (int unit = 0; unit < 2; ++unit) {
      unsigned plain[4], scaled[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int m = unit * 8 + 2 * i;
        plain[i] = tvms_pack_f16(a[m], a[m + 1]);
        scaled[i] = tvms_pack_f16(a[m] * fade[warp * 16 + m], a[m + 1] * fade[warp * 16 + m + 1]);
      }
      const int at = tvms_unit<8>(warp * 16 + lane, 2 * warp + unit);
      *(uint4*)(solved + at) = make_uint4(plain[0], plain[1], plain[2], plain[3]);
      *(uint4*)(faded + at) = make_uint4(scaled[0], scaled[1], scaled[2], scaled[3]);
    }
  }
  __syncthreads();

  // A below the diagonal, a warp a column of blocks: A_ij^T = -(sum_k A_kj^T T_ik^T) A_ii^T for j <= k < i.
  unsigned known[4][4];
#pragma unroll
  for (int k = 0; k < 4; ++k)
    if (k == warp) tvms_rows<8>(known[k], solved, k * 16, 2 * k);
#pragma unroll
  for (int i = 1; i < 4; ++i)
    if (i > warp) {
      unsigned columns[4];
      float sum[2][4] = {{0.f, 0.f, 0.f, 0.f}, {0.f, 0.f, 0.f, 0.f}};
      float found[2][4] = {{0.f, 0.f, 0.f, 0.f}, {0.f, 0.f, 0.f, 0.f}};
#pragma unroll
      for (int k = 0; k < i; ++k)
        if (k >= warp) {
          tvms_rows<8>(columns, t_tile, i * 16, 2 * k);
          tvms_mma_f16(sum[0], known[k], columns[0], columns[2]);
          tvms_mma_f16(sum[1], known[k], columns[1], columns[3]);
        }
      unsigned rows[4] = {tvms_pack_f16(-sum[0][0], -sum[0][1]), tvms_pack_f16(-sum[0][2], -sum[0][3]),
                          tvms_pack_f16(-sum[1][0], -sum[1][1]), tvms_pack_f16(-sum[1][2], -sum[1][3])};
      tvms_columns<8>(columns, solved, i * 16, 2 * i);
      tvms_mma_f16(found[0], rows, columns[0], columns[1]);
      tvms_mma_f16(found[1], rows, columns[2], columns[3]);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int tile = e / 2, row = e % 2, m = i * 16 + tile * 8 + 2 * t;
        const int at = tvms_unit<8>(warp * 16 + g + 8 * row, 2 * i + tile) + 4 * t;
        const float *pair = found[tile] + 2 * row, *fading = fade + m;
        known[i][e] = tvms_pack_f16(pair[0], pair[1]);
        *(unsigned*)(solved + at) = known[i][e];
        *(unsigned*)(faded + at) = tvms_pack_f16(pair[0] * fading[0], pair[1] * fading[1]);
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
  char* to = (char*)inside + (chunk * VALUE_HEADS + head) * (64 * 128) + 4 * t;
#pragma unroll
  for (int tile = 0; tile < 8; ++tile)
#pragma unroll
    for (int row = 0; row < 2; ++row)
      *(unsigned*)(to + tvms_unit<8>(warp * 16 + g + 8 * row, tile)) =
          tvms_pack_f16(sums[tile][2 * row], sums[tile][2 * row + 1]);

  // Rows 16 m .. of B = K^T diag A, a warp every fourth.
  for (int m = warp; m < DK / 16; m += 4) {
#pragma unroll
    for (int i = 0; i < 8; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[i][e] = 0.f;
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      unsigned turned[4];
      tvms_columns<8>(turned, k_tile + m / 4 * 8192, step * 16, m % 4 * 2);
      unsigned rows[4] = {turned[0], turned[2], turned[1], turned[3]};
#pragma unroll
      for (int p = 0; p <= step; ++p) {
        unsigned columns[4];
        tvms_rows<8>(columns, faded, p * 16, 2 * step);
        tvms_mma_f16(sums[2 * p], rows, columns[0], columns[2]);
        tvms_mma_f16(sums[2 * p + 1], rows, columns[1], columns[3]);
      }
    }
    to = (char*)across + (chunk * VALUE_HEADS + head) * (128 * DK) + 4 * t;
#pragma unroll
    for (int tile = 0; tile < 8; ++tile)
#pragma unroll
      for (int row = 0; row < 2; ++row)
        *(unsigned*)(to + tvms_unit<8>(m * 16 + g + 8 * row, tile)) =
            tvms_pack_f16(sums[tile][2 * row], sums[tile][2 * row + 1]);
  }
}
#endif
"""
