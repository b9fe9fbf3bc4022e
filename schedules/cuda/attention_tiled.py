"""Softmax attention of many tokens over the caches, tiled on the tensor cores.

FlashAttention-2 (Dao 2023, arXiv:2307.08691): a CTA holds 128 queries of one head in shared memory and walks the keys
it may see by 64, the next keys and values on their way meanwhile. A warp owns 16 queries, their scores, their running
maximum and sum and their weighted values stay in its registers: scores, as sums of one product, become weights, the
operand of the next. Products are bfloat16 with float32 sums, as are the caches; the softmax is float32.

Shared memory: queries [128, D] | keys [64, D], values [64, D] | the same again, rows as in tensor_core.py.
The tiles that see most keys come first, so that the short ones fill the end.
"""

from __future__ import annotations

import math

import tvm
from tvm.script import tirx as T

from tvm_sparse.schedules.cuda import tensor_core
from tvm_sparse.schedules.cuda.device_code import symbol, token_dim

QUERIES = 128  # a CTA's
KEYS = 64  # at a time
THREADS = QUERIES * 2

_SOURCE = r"""
#ifndef TVMS_ATTENTION_TILED
#define TVMS_ATTENTION_TILED
template <int HEADS, int KV_HEADS, int D>
__device__ __forceinline__ void tvms_attention(
    const float* q, const void* qkv_bits, const void* k_cache, const void* v_cache, void* y, void* shared,
    int position, float scale, long long n, long long row_length, long long context) {
  constexpr int UNITS = D / 8, TILE = 64 * D * 2, THREADS = 256;
  const int thread = threadIdx.x, warp = thread >> 5, lane = thread & 31, g = lane >> 2, t = lane & 3;
  const int head = blockIdx.x;
  const long long first = (long long)(gridDim.y - 1 - blockIdx.y) * 128;  // query of the CTA
  const int rows = (int)min(n - first, 128ll);
  // Keys 0 .. length - 1 are there for the CTA's last query.
  const int length = (int)min(position + first + rows, context);
  const int tiles = (length + 63) / 64;
  char* q_tile = (char*)shared;
  char* stages = q_tile + 2 * TILE;
  const char* own_keys = (const char*)k_cache + head / (HEADS / KV_HEADS) * context * (2 * D);
  const char* own_values = (const char*)v_cache + head / (HEADS / KV_HEADS) * context * (2 * D);

  auto fetch = [&](int tile) {
    char* to = stages + (tile & 1) * 2 * TILE;
    long long from = (long long)tile * TILE;
    tvms_copy_tile<64, UNITS, THREADS>(to, own_keys + from, 2 * D, length - tile * 64);
    tvms_copy_tile<64, UNITS, THREADS>(to + TILE, own_values + from, 2 * D, length - tile * 64);
  };

  fetch(0);
#pragma unroll 4
  for (int i = thread; i < 128 * UNITS; i += THREADS) {
    int row = i / UNITS, unit = i % UNITS;
    uint4 packed = make_uint4(0u, 0u, 0u, 0u);
    if (row < rows) {
      const float4* from = (const float4*)(q + ((first + row) * HEADS + head) * D + unit * 8);
      float4 a = from[0], b = from[1];
      packed = make_uint4(tvms_pack_bf16(a.x, a.y), tvms_pack_bf16(a.z, a.w), tvms_pack_bf16(b.x, b.y),
                          tvms_pack_bf16(b.z, b.w));
    }
    *(uint4*)(q_tile + tvms_unit<UNITS>(row, unit)) = packed;
  }

  float values[D / 8][4];
#pragma unroll
  for (int i = 0; i < D / 8; ++i)
#pragma unroll
    for (int e = 0; e < 4; ++e) values[i][e] = 0.f;
  float largest[2] = {-INFINITY, -INFINITY}, total[2] = {0.f, 0.f};
  // The last key that the lane's queries g and g + 8 of the warp see.
  const int last = position + (int)first + warp * 16 + g;

  for (int tile = 0; tile < tiles; ++tile) {
    tvms_copies_done();
    __syncthreads();
    if (tile + 1 < tiles) fetch(tile + 1);
    const char* k_tile = stages + (tile & 1) * 2 * TILE;
    const char* v_tile = k_tile + TILE;

    float weights[8][4];
#pragma unroll
    for (int i = 0; i < 8; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e) weights[i][e] = 0.f;
#pragma unroll 4
    for (int step = 0; step < D / 16; ++step) {
      unsigned a[4], b[4];
      tvms_rows<UNITS>(a, q_tile, warp * 16, 2 * step);
#pragma unroll
      for (int p = 0; p < 4; ++p) {
        tvms_rows<UNITS>(b, k_tile, p * 16, 2 * step);
        tvms_mma_bf16(weights[2 * p], a, b[0], b[2]);
        tvms_mma_bf16(weights[2 * p + 1], a, b[1], b[3]);
      }
    }
    if (tile * 64 + 63 > last - g) {
#pragma unroll
      for (int i = 0; i < 8; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          if (tile * 64 + i * 8 + 2 * t + (e & 1) > last + 8 * (e >> 1)) weights[i][e] = -INFINITY;
    }

    // Online softmax in powers of two; key 0 is seen by all, so that no row stays without a maximum.
    float rescale[2];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float most = weights[0][2 * row];
#pragma unroll
      for (int i = 0; i < 8; ++i) most = fmaxf(most, fmaxf(weights[i][2 * row], weights[i][2 * row + 1]));
      most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
      most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
      most = fmaxf(largest[row], most * scale);
      rescale[row] = exp2f(largest[row] - most);
      largest[row] = most;
      float sum = 0.f;
#pragma unroll
      for (int i = 0; i < 8; ++i)
#pragma unroll
        for (int e = 2 * row; e < 2 * row + 2; ++e) {
          weights[i][e] = exp2f(fmaf(weights[i][e], scale, -most));
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
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      unsigned a[4] = {tvms_pack_bf16(weights[2 * step][0], weights[2 * step][1]),
                       tvms_pack_bf16(weights[2 * step][2], weights[2 * step][3]),
                       tvms_pack_bf16(weights[2 * step + 1][0], weights[2 * step + 1][1]),
                       tvms_pack_bf16(weights[2 * step + 1][2], weights[2 * step + 1][3])};
#pragma unroll
      for (int p = 0; p < D / 16; ++p) {
        unsigned b[4];
        tvms_columns<UNITS>(b, v_tile, step * 16, 2 * p);
        tvms_mma_bf16(values[2 * p], a, b[0], b[1]);
        tvms_mma_bf16(values[2 * p + 1], a, b[2], b[3]);
      }
    }
  }

#pragma unroll
  for (int row = 0; row < 2; ++row) {
    float sum = total[row];
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    const float inverse = 1.f / sum;
    const long long token = first + warp * 16 + g + 8 * row;
    if (token < n) {
      const unsigned short* gate = (const unsigned short*)qkv_bits + token * row_length + (2 * head + 1) * D + 2 * t;
      unsigned* to = (unsigned*)y + (token * HEADS + head) * (D / 2) + t;
#pragma unroll
      for (int i = 0; i < D / 8; ++i)
        to[i * 4] = tvms_pack_bf16(values[i][2 * row] * inverse / (1.f + expf(-tvms_wide(gate[i * 8]))),
                                   values[i][2 * row + 1] * inverse / (1.f + expf(-tvms_wide(gate[i * 8 + 1]))));
    }
  }
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
    name = f"tvms_attention<{heads}, {kv_heads}, {head_dim}>"

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
        head = T.launch_thread("blockIdx.x", heads)
        tile = T.launch_thread("blockIdx.y", (n + QUERIES - 1) // QUERIES)
        thread = T.launch_thread("threadIdx.x", THREADS)
        tiles = T.alloc_buffer((size,), "uint8", scope="shared.dyn")
        T.evaluate(
            T.cuda.func_call(
                name,
                q.data,
                qkv.data,
                T.address_of(k_cache[slot[0], 0, 0, 0]),
                T.address_of(v_cache[slot[0], 0, 0, 0]),
                y.data,
                tiles.data,  # address_of would make TVM shrink it to one element
                position[slot[0]],
                T.float32(scale),
                n,
                row_length,
                context,
                source_code=tensor_core.SOURCE + _SOURCE,
            )
        )

    return attention
