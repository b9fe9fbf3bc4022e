"""Softmax attention of many tokens over the caches, tiled on the tensor cores.

FlashAttention-2 (Dao 2023, arXiv:2307.08691): a CTA holds 128 queries of one head in shared memory and walks the keys
it may see by 64, the next keys and values on their way meanwhile. A warp owns 16 queries, their scores, their running
maximum and sum and their weighted values stay in its registers: scores, as sums of one product, become weights, the
operand of the next. Products are bfloat16 with float32 sums, as are the caches; the softmax is float32.

Shared memory: queries [128, D] | keys [64, D] twice | values [64, D] twice, each in panels of 64 columns with rows as
in tensor_core.py. On an H200 four warps multiply together (warpgroup.py), and the scores of the next keys are on their
way while weights are made of these. The tiles that see most keys come first, so that the short ones fill the end.
"""

from __future__ import annotations

import math

import tvm
from tvm.script import tirx as T

from tvm_sparse.schedules.cuda import tensor_core, warpgroup
from tvm_sparse.schedules.cuda.device_code import symbol, token_dim
from tvm_sparse.schedules.cuda.warpgroup import Product

QUERIES = 128  # a CTA's
KEYS = 64  # at a time
THREADS = QUERIES * 2
CTAS = 132  # that an H200 runs at once, one an SM: with fewer tokens than fill it, several share a query's keys

_SOURCE = r"""
#ifndef TVMS_ATTENTION_TILED
#define TVMS_ATTENTION_TILED
// 2^x to 2 units in the last place; weights below 2^-126 become zero.
__device__ __forceinline__ float tvms_exp2(float x) {
#ifdef __CUDA_ARCH__
  asm("ex2.approx.ftz.f32 %0, %0;" : "+f"(x));
  return x;
#else
  return exp2f(x);
#endif
}

// value sigmoid(gate) for two neighbours, in bfloat16; to 2^-21, as silu in device_code.py.
__device__ __forceinline__ unsigned tvms_gate(float low, float high, const unsigned short* gates, bool even) {
  unsigned both = even ? *(const unsigned*)gates : gates[0] | (unsigned)gates[1] << 16;
  low = __fdividef(low, 1.f + tvms_exp2(-1.4426950408889634f * __uint_as_float(both << 16)));
  high = __fdividef(high, 1.f + tvms_exp2(-1.4426950408889634f * __uint_as_float(both & 0xffff0000u)));
  return tvms_pack_bf16(low, high);
}

// Scores of 64 keys from `key` on -> weights, in powers of two; `values` so far are rescaled. `last`: the last key that
// the lane's query g sees, g + 8 sees 8 more. A query that sees none has -infinity as its largest and weights zero.
template <int D>
__device__ __forceinline__ void tvms_weigh(
    float (&weights)[8][4], float (&values)[D / 8][4], float* largest, float* total, int key, int last, float scale) {
  const int g = (threadIdx.x & 31) >> 2, t = threadIdx.x & 3;
  if (key + 63 > last - g) {
#pragma unroll
    for (int i = 0; i < 8; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        if (key + i * 8 + 2 * t + (e & 1) > last + 8 * (e >> 1)) weights[i][e] = -INFINITY;
  }
  float rescale[2];
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    float most = weights[0][2 * row];
#pragma unroll
    for (int i = 0; i < 8; ++i) most = fmaxf(most, fmaxf(weights[i][2 * row], weights[i][2 * row + 1]));
    most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
    most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
    most = fmaxf(largest[row], most * scale);
    const float level = most == -INFINITY ? 0.f : most;
    rescale[row] = tvms_exp2(largest[row] - level);
    largest[row] = most;
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < 8; ++i)
#pragma unroll
      for (int e = 2 * row; e < 2 * row + 2; ++e) {
        weights[i][e] = tvms_exp2(fmaf(weights[i][e], scale, -level));
        sum += weights[i][e];
      }
    total[row] = total[row] * rescale[row] + sum;
  }
  if (__any_sync(0xffffffffu, rescale[0] != 1.f || rescale[1] != 1.f)) {
#pragma unroll
    for (int i = 0; i < D / 8; ++i) {
      values[i][0] *= rescale[0], values[i][1] *= rescale[0];
      values[i][2] *= rescale[1], values[i][3] *= rescale[1];
    }
  }
}

// Columns 16 step .. of the weights as the left operand of a product.
__device__ __forceinline__ void tvms_left(unsigned* a, const float (&weights)[8][4], int step) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    a[2 * i] = tvms_pack_bf16(weights[2 * step + i][0], weights[2 * step + i][1]);
    a[2 * i + 1] = tvms_pack_bf16(weights[2 * step + i][2], weights[2 * step + i][3]);
  }
}

template <int HEADS, int KV_HEADS, int D>
__device__ __forceinline__ void tvms_attention(
    const float* q, const void* qkv_bits, const void* k_cache, const void* v_cache, void* y, float* sums, float* stats,
    void* shared, int position, float scale, long long n, long long row_length, long long context) {
  constexpr int UNITS = D / 8, TILE = 64 * D * 2, THREADS = 256;
  const int thread = threadIdx.x, warp = thread >> 5, lane = thread & 31, g = lane >> 2, t = lane & 3;
  const int head = blockIdx.x;
  const long long first = (long long)(gridDim.y - 1 - blockIdx.y) * 128;  // query of the CTA
  const int rows = (int)min(n - first, 128ll);
  // Keys 0 .. length - 1 are there for the CTA's last query.
  const int length = (int)min(position + first + rows, context);
  // The CTA's share of the keys, in tiles.
  const int splits = gridDim.z, split = blockIdx.z, all = (length + 63) / 64;
  const int begin = all * split / splits, end = all * (split + 1) / splits;
  char* q_tile = (char*)shared;
  char* k_tiles = q_tile + 2 * TILE;
  char* v_tiles = k_tiles + 2 * TILE;
  const long long own = head / (HEADS / KV_HEADS) * context * (2 * D);

  // A thread copies the same unit of rows `row` and `row` + 32 of every panel.
  const int row = thread / 8, column = thread % 8, place = tvms_unit<8>(row, column);
  const long long from = own + row * (2 * D) + column * 16;
  auto fetch = [&](char* tiles_of, const void* cache, int tile) {
    char* to = tiles_of + (tile & 1) * TILE + place;
    const char* at = (const char*)cache + from + (long long)tile * TILE;
    const int left = length - tile * 64 - row, first_half = left > 0 ? 16 : 0, second_half = left > 32 ? 16 : 0;
#pragma unroll
    for (int panel = 0; panel < D / 64; ++panel) {
      tvms_copy_async(to + panel * 8192, at + panel * 128, first_half);
      tvms_copy_async(to + panel * 8192 + 4096, at + panel * 128 + 32 * 2 * D, second_half);
    }
  };

  if (begin < end) {
    fetch(k_tiles, k_cache, begin);
    fetch(v_tiles, v_cache, begin);
  }
#pragma unroll 8
  for (int i = thread; i < 128 * UNITS; i += THREADS) {
    int row = i / UNITS, unit = i % UNITS;
    uint4 packed = make_uint4(0u, 0u, 0u, 0u);
    if (row < rows) {
      const float4* from = (const float4*)(q + ((first + row) * HEADS + head) * D + unit * 8);
      float4 a = from[0], b = from[1];
      packed = make_uint4(tvms_pack_bf16(a.x, a.y), tvms_pack_bf16(a.z, a.w), tvms_pack_bf16(b.x, b.y),
                          tvms_pack_bf16(b.z, b.w));
    }
    *(uint4*)(q_tile + (unit >> 3) * 16384 + tvms_unit<8>(row, unit & 7)) = packed;
  }

  float values[D / 8][4];
#pragma unroll
  for (int i = 0; i < D / 8; ++i)
#pragma unroll
    for (int e = 0; e < 4; ++e) values[i][e] = 0.f;
  float largest[2] = {-INFINITY, -INFINITY}, total[2] = {0.f, 0.f};
  const int last = position + (int)first + warp * 16 + g;
  float weights[8][4];

#ifdef TVMS_WARPGROUP
  // The next tile's scores are on their way while this one's are weighed.
  const unsigned long long own_queries = tvms_tile(q_tile + __shfl_sync(0xffffffffu, warp / 4, 0) * 8192);
  auto score = [&](float(&sums)[8][4], int tile) {
    const unsigned long long keys = tvms_tile(k_tiles + (tile & 1) * TILE);
    tvms_products_begin();
#pragma unroll
    for (int step = 0; step < D / 16; ++step)
      tvms_product_bf16(sums, own_queries + (step / 4 * 16384 + step % 4 * 32) / 16,
                        keys + (step / 4 * 8192 + step % 4 * 32) / 16, step > 0);
    tvms_products_sent();
  };
  if (begin + 1 < end) fetch(k_tiles, k_cache, begin + 1);
  tvms_copies_done();
  tvms_publish();
  __syncthreads();
  float next[8][4];
  if (begin < end) {
    score(next, begin);
    tvms_products_done();
    tvms_settled(next);
  }
  for (int tile = begin; tile < end; ++tile) {
#pragma unroll
    for (int i = 0; i < 8; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e) weights[i][e] = next[i][e];
    __syncthreads();  // all have seen the end of the products before, and of their copies
    if (tile + 1 < end) {
      score(next, tile + 1);
      fetch(v_tiles, v_cache, tile + 1);
      if (tile + 2 < end) fetch(k_tiles, k_cache, tile + 2);
    }
    tvms_weigh<D>(weights, values, largest, total, tile * 64, last, scale);
    unsigned a[4][4];
#pragma unroll
    for (int step = 0; step < 4; ++step) tvms_left(a[step], weights, step);
    const unsigned long long of_values = tvms_tile(v_tiles + (tile & 1) * TILE, 8192);
    tvms_products_begin();
#pragma unroll
    for (int step = 0; step < 4; ++step) tvms_product_bf16_turned(values, a[step], of_values + step * 2048 / 16, 1);
    tvms_products_sent();
    tvms_products_done();
    tvms_settled(next);
    tvms_settled(values);
    tvms_copies_done();
    tvms_publish();
  }
#else
  for (int tile = begin; tile < end; ++tile) {
    tvms_copies_done();
    __syncthreads();
    if (tile + 1 < end) {
      fetch(k_tiles, k_cache, tile + 1);
      fetch(v_tiles, v_cache, tile + 1);
    }
    const char* k_tile = k_tiles + (tile & 1) * TILE;
    const char* v_tile = v_tiles + (tile & 1) * TILE;
#pragma unroll
    for (int i = 0; i < 8; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e) weights[i][e] = 0.f;
#pragma unroll 4
    for (int step = 0; step < D / 16; ++step) {
      unsigned a[4], b[4];
      tvms_rows<8>(a, q_tile + step / 4 * 16384, warp * 16, step % 4 * 2);
#pragma unroll
      for (int p = 0; p < 4; ++p) {
        tvms_rows<8>(b, k_tile + step / 4 * 8192, p * 16, step % 4 * 2);
        tvms_mma_bf16(weights[2 * p], a, b[0], b[2]);
        tvms_mma_bf16(weights[2 * p + 1], a, b[1], b[3]);
      }
    }
    tvms_weigh<D>(weights, values, largest, total, tile * 64, last, scale);
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      unsigned a[4];
      tvms_left(a, weights, step);
#pragma unroll
      for (int p = 0; p < D / 16; ++p) {
        unsigned b[4];
        tvms_columns<8>(b, v_tile + p / 4 * 8192, step * 16, p % 4 * 2);
        tvms_mma_bf16(values[2 * p], a, b[0], b[1]);
        tvms_mma_bf16(values[2 * p + 1], a, b[2], b[3]);
      }
    }
  }
#endif

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float sum = total[half];
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    const float inverse = 1.f / sum;
    const long long token = first + warp * 16 + g + 8 * half;
    if (token < n && splits > 1) {
      const long long at = (split * n + token) * HEADS + head;
      float* to = sums + at * D + 2 * t;
#pragma unroll
      for (int i = 0; i < D / 8; ++i)
        *(float2*)(to + i * 8) = make_float2(values[i][2 * half], values[i][2 * half + 1]);
      if (t == 0) *(float2*)(stats + 2 * at) = make_float2(largest[half], sum);
    } else if (token < n) {
      const unsigned short* gate = (const unsigned short*)qkv_bits + token * row_length + (2 * head + 1) * D + 2 * t;
      const bool even = row_length % 2 == 0;
      unsigned* to = (unsigned*)y + (token * HEADS + head) * (D / 2) + t;
#pragma unroll
      for (int i = 0; i < D / 8; ++i)
        to[i * 4] = tvms_gate(values[i][2 * half] * inverse, values[i][2 * half + 1] * inverse, gate + i * 8, even);
    }
  }
}

// What the splits of a query found, joined in their order: a CTA a head of a token, a thread two columns.
template <int HEADS, int D>
__device__ __forceinline__ void tvms_attention_join(
    const float* sums, const float* stats, const void* qkv_bits, void* y, int splits, long long n,
    long long row_length) {
  if (splits == 1) return;
  const int head = blockIdx.x, thread = threadIdx.x;
  const long long token = blockIdx.y;
  float largest = -INFINITY, total = 0.f, x = 0.f, z = 0.f;
  for (int split = 0; split < splits; ++split)
    largest = fmaxf(largest, stats[((split * n + token) * HEADS + head) * 2]);
  for (int split = 0; split < splits; ++split) {
    const long long at = (split * n + token) * HEADS + head;
    float2 found = *(const float2*)(stats + 2 * at), pair = *(const float2*)(sums + at * D + 2 * thread);
    float weight = tvms_exp2(found.x - largest);
    total += weight * found.y;
    x += weight * pair.x;
    z += weight * pair.y;
  }
  const unsigned short* gate = (const unsigned short*)qkv_bits + token * row_length + (2 * head + 1) * D + 2 * thread;
  ((unsigned*)y)[(token * HEADS + head) * (D / 2) + thread] =
      tvms_gate(x / total, z / total, gate, row_length % 2 == 0);
}
#endif
"""


def fits(head_dim: int, dtype: str) -> bool:
    """Whether the tensor cores serve these heads; float32 models keep to float32 products."""
    return dtype == "bfloat16" and head_dim in (64, 128, 192, 256)


def attention(batch: int, heads: int, kv_heads: int, head_dim: int, dtype: str) -> tvm.tirx.PrimFunc:
    """Prefill and score; see schedules/ops.py."""
    n = token_dim(None)
    row_length, context = symbol("row_length"), symbol("context")
    scale = math.log2(math.e) / math.sqrt(head_dim)
    size = (QUERIES + 4 * KEYS) * head_dim * 2
    products = Product("bf16", KEYS, from_tile=True), Product("bf16", head_dim, turned=True)
    code = tensor_core.SOURCE + warpgroup.source(*products) + _SOURCE
    sizes = f"{heads}, {kv_heads}, {head_dim}"
    tiles = (n + QUERIES - 1) // QUERIES
    most = QUERIES * (CTAS // (2 * heads))  # tokens whose keys are split
    splits = tvm.tirx.max(CTAS // (heads * tiles), 1)
    split_rows = tvm.tirx.Select(n <= most, n, tvm.tirx.IntImm("int64", 1))
    joined = tvm.tirx.max(tvm.tirx.min(n, most), 1)

    @T.prim_func(s_tir=True)
    def attention(
        q: T.Buffer((n, heads * head_dim), "float32"),
        qkv: T.Buffer((n, row_length), dtype),
        slot: T.Buffer((1,), "int32"),
        position: T.Buffer((batch,), "int32"),
        k_cache: T.Buffer((batch, kv_heads, context, head_dim), dtype),
        v_cache: T.Buffer((batch, kv_heads, context, head_dim), dtype),
        y: T.Buffer((n, heads * head_dim), dtype),
    ):
        sums = T.alloc_buffer((splits, split_rows, heads, head_dim), "float32", scope="global")
        stats = T.alloc_buffer((splits, split_rows, heads, 2), "float32", scope="global")
        with (
            T.launch_thread("blockIdx.x", heads) as head,
            T.launch_thread("blockIdx.y", tiles) as tile,
            T.launch_thread("blockIdx.z", splits) as split,
            T.launch_thread("threadIdx.x", THREADS) as thread,
        ):
            shared = T.alloc_buffer((size,), "uint8", scope="shared.dyn")
            T.evaluate(
                T.cuda.func_call(
                    f"tvms_attention<{sizes}>",
                    q.data,
                    qkv.data,
                    T.address_of(k_cache[slot[0], 0, 0, 0]),
                    T.address_of(v_cache[slot[0], 0, 0, 0]),
                    y.data,
                    sums.data,
                    stats.data,
                    shared.data,  # address_of would make TVM shrink it to one element
                    position[slot[0]],
                    T.float32(scale),
                    n,
                    row_length,
                    context,
                    source_code=code,
                )
            )
        with (
            T.launch_thread("blockIdx.x", heads) as head,
            T.launch_thread("blockIdx.y", joined) as token,
            T.launch_thread("threadIdx.x", head_dim // 2) as thread,
        ):
            T.evaluate(
                T.cuda.func_call(
                    f"tvms_attention_join<{heads}, {head_dim}>",
                    sums.data,
                    stats.data,
                    qkv.data,
                    y.data,
                    T.cast(splits, "int32"),
                    n,
                    row_length,
                    source_code=code,
                )
            )

    return attention
