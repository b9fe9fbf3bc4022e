"""The gated delta rule for many tokens, by chunks of 64 on the tensor cores.

The WY form of "Gated Delta Networks" (Yang et al. 2024, arXiv:2412.06464), with what does not depend on the state
multiplied out beforehand. In a chunk of one value head, with keys K and queries Q [64, Dk], gamma = cumsum(g),
D_ij = exp(gamma_i - gamma_j) for i >= j, S the state [Dk, Dv] before the chunk:

  A = (I + tril(beta K K^T * D, -1))^-1        G = tril(Q K^T * D) A        B = K^T diag(exp(gamma_63 - gamma)) A
  R = beta (V - exp(gamma) K S)                O = exp(gamma) Q S + G R     S = exp(gamma_63) S + B R

The first line is done for all chunks at once, the second walks the chunks; it does not mix columns of the state, of
which each warp owns 16: they stay in its registers, as sums of one product and operand of the next. K, Q, G and B are
products of contractions with unit vectors, all within [-1, 1]: float16 holds them to 11 bits. R and S have no such
bound; each of their columns takes its own power of two on the way into a product. Sums, gates and the state are
float32, and S enters R only as a correction of the exact V.

  keys, queries  [chunk, Kh, Dk / 64, 64, 64] float16     gates  [chunk, Vh, 2, 64] float32: exp(gamma), beta
  inside (G)     [chunk, Vh, 64, 64] float16              across (B)  [chunk, Vh, Dk, 64] float16
Rows of 64 float16 lie as shared memory wants them (tensor_core.py): a tile is copied as it is.
"""

from __future__ import annotations

import tvm
from tvm.script import tirx as T

from tvm_sparse.schedules.cuda import gated_delta_prepare, gated_delta_walk, tensor_core, warpgroup
from tvm_sparse.schedules.cuda.device_code import symbol, token_dim
from tvm_sparse.schedules.cuda.warpgroup import Product

CHUNK = 64  # tokens
COLUMNS = 64  # of the state a CTA of the second kernel walks
THREADS = 128


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
    square = CHUNK * CHUNK * 2
    prepared = tile + 3 * square + CHUNK * 20 * 4 + 4 * CHUNK * 4
    staged = 2 * (3 * tile + square + CHUNK * 68 * 4 + 1024)
    products = warpgroup.source(Product("f16", CHUNK), Product("f16", key_dim))
    code = tensor_core.SOURCE + products + gated_delta_prepare.SOURCE + gated_delta_walk.SOURCE

    def call(name, buffers, *more):
        pointers = [buffer.data for buffer in buffers]  # address_of would make TVM shrink them to one element
        return T.evaluate(T.cuda.func_call(name + sizes, *pointers, *more, source_code=code))

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
