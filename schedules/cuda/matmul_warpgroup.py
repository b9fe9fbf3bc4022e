"""matmul_mma's product of many tokens by `wgmma`, on an H200.

A CTA is two groups of four warps and takes 128 tokens x 256 features, each group 64 of the tokens. Stages of 64 columns
come by cp.async, x's rows before W's in matmul_mma's order. A thread copies the same 16 bytes of every 32nd row, so
that all its addresses of a step lie at fixed distances from two pointers, and sends its copies after the step's
products, which need nothing else of it.

    step s    copies of s are there; products of s are sent; copies of s + STAGES - 2 are sent, into the stage of s - 2,
              which both groups have left; products of s - 1 are waited for
"""

from __future__ import annotations

from tvm_sparse.schedules.cuda.warpgroup import Product, source

SOURCE = source(Product("bf16", 256, from_tile=True)) + r"""
#if defined(TVMS_WARPGROUP) && !defined(TVMS_MATMUL_GROUPS)
#define TVMS_MATMUL_GROUPS
// The feature that a row of W's tile holds.
__device__ __forceinline__ constexpr int tvms_feature(int row) {
  return (row & ~31) + (row & 6) * 4 + (row >> 3 & 3) * 2 + (row & 1);
}
template <int STAGES, int N, int K, class Out>
__device__ __forceinline__ void tvms_matmul_groups(
    const void* x_bits, const void* w_bits, void* y_bits, void* shared_bytes, long long m) {
  constexpr int TOKENS = 128, FEATURES = 256, ROWS = 32, STAGE = (TOKENS + FEATURES) * 128;
  constexpr int STEPS = (K + 63) / 64, AHEAD = STAGES - 2;
  char* shared = (char*)shared_bytes;
  const int row = threadIdx.x / 8, unit = threadIdx.x & 7, feature = tvms_feature(row);
  const long long token0 = (long long)blockIdx.x * TOKENS;
  const int feature0 = blockIdx.y * FEATURES;
  const int tokens_left = (int)min(m - token0, (long long)TOKENS) - row, features_left = N - feature0 - feature;
  const char* x = (const char*)x_bits + ((token0 + row) * K + unit * 8) * 2;
  const char* w = (const char*)w_bits + ((long long)(feature0 + feature) * K + unit * 8) * 2;
  char* to = shared + tvms_unit<8>(row, unit);

  auto load = [&](int step) {
    char* stage = to + step % STAGES * STAGE;
    const bool inside = K % 64 == 0 || step * 64 + unit * 8 < K;
    const char *from_x = x + step * 128, *from_w = w + step * 128;
#pragma unroll
    for (int i = 0; i < TOKENS; i += ROWS)
      tvms_copy_async(stage + i * 128, from_x + (long long)i * K * 2, inside && i < tokens_left ? 16 : 0);
#pragma unroll
    for (int i = 0; i < FEATURES; i += ROWS)
      tvms_copy_async(stage + (TOKENS + i) * 128, from_w + (long long)tvms_feature(i) * K * 2,
                      inside && tvms_feature(i) < features_left ? 16 : 0);
  };

  float sums[FEATURES / 8][4];
#pragma unroll
  for (int i = 0; i < FEATURES / 2; ++i) (&sums[0][0])[i] = 0.f;
#pragma unroll
  for (int step = 0; step < AHEAD; ++step) {
    if (step < STEPS) load(step);
    tvms_commit();
  }
  const int group = __shfl_sync(0xffffffff, threadIdx.x / 128, 0);
  for (int step = 0; step < STEPS; ++step) {
    tvms_wait<AHEAD - 1>();
    tvms_publish();
    __syncthreads();
    const char* stage = shared + step % STAGES * STAGE;
    tvms_products_begin();
#pragma unroll
    for (int part = 0; part < 4; ++part)
      tvms_product_bf16(sums, tvms_tile(stage + group * 64 * 128 + part * 32),
                        tvms_tile(stage + TOKENS * 128 + part * 32), 1);
    tvms_products_sent();
    if (step + AHEAD < STEPS) load(step + AHEAD);
    tvms_commit();
    tvms_products_done<1>();
  }
  tvms_products_done<0>();
  tvms_settled(sums);

  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const long long token = token0 + threadIdx.x / 32 * 16 + 8 * half + lane / 4;
    if (token >= m) continue;
#pragma unroll
    for (int q = 0; q < FEATURES / 32; ++q) {
      const int at = feature0 + 32 * q + 8 * (lane & 3);
      float values[8];
#pragma unroll
      for (int j = 0; j < 4; ++j)
        values[2 * j] = sums[4 * q + j][2 * half], values[2 * j + 1] = sums[4 * q + j][2 * half + 1];
      tvms_store_row<N>((Out*)y_bits + token * N + at, values, N - at);
    }
  }
}
#endif
"""
