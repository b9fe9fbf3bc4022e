"""One token through convolution, gated delta rule and gated norm, on a GPU: one kernel, the state in registers.

A CTA owns `columns` of one value head's state: thread (part, place) holds `rows` neighbouring rows of `run`
neighbouring columns. State, taps and the window of the convolution are on their way before the kernel before is done.
Both products are taken with the old state, so that one exchange through shared memory is enough:

    S' = g S + k d^T,  d = beta (v - g S^T k),  o = S'^T q = g S^T q + (k . q) d

The CTAs that share a key head form a cluster. Each does the convolution of that head for itself; the first writes its
new window once all have read the old one. The columns of a head exchange their sums of squares through the cluster.
"""

from __future__ import annotations

import math

import tvm
from tvm.script import tirx as T

from tvm_sparse.schedules.cuda.dependent_launch import dependent, read, read_quad, start_dependents, wait_for_inputs
from tvm_sparse.schedules.cuda.device_code import WARP, silu, softplus, symbol

_MOST_CLUSTER = 8  # CTAs, what every machine can place
_MOST_PARTS = 16
_COLUMNS = 64  # a CTA, where a head can be cut so

_CLUSTER = """
#ifndef TVMS_CLUSTER
#define TVMS_CLUSTER
__device__ __forceinline__ void tvms_cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
}
__device__ __forceinline__ void tvms_cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
}
__device__ __forceinline__ void tvms_cluster_store(float* mine, int rank, float value) {
  // into the same place of another CTA's shared memory
  unsigned at = (unsigned)__cvta_generic_to_shared(mine), there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(at), "r"(rank));
  asm volatile("st.shared::cluster.f32 [%0], %1;" :: "r"(there), "f"(value) : "memory");
}
#endif
"""


def splits_of(key_heads: int, value_heads: int, value_dim: int) -> int:
    """CTAs a head: 0 where a key head has more value heads than a cluster has CTAs."""
    group = value_heads // key_heads
    if group > _MOST_CLUSTER:
        return 0
    wanted = value_dim // _COLUMNS if value_dim % _COLUMNS == 0 else 1
    while wanted * group > _MOST_CLUSTER or value_dim % wanted:
        wanted -= 1
    return wanted


def delta_step(
    tokens: int,
    key_heads: int,
    value_heads: int,
    key_dim: int,
    value_dim: int,
    eps: float,
    dtype: str,
) -> tvm.tirx.PrimFunc:
    """See schedules/ops.py."""
    row_length = symbol("row_length")
    channels = 2 * key_heads * key_dim + value_heads * value_dim
    key_columns = key_heads * key_dim
    group = value_heads // key_heads
    splits = splits_of(key_heads, value_heads, value_dim)
    columns = value_dim // splits
    run = math.gcd(columns, 4)
    across = columns // run
    parts = max(p for p in range(1, _MOST_PARTS + 1) if key_dim % p == 0)
    rows = key_dim // parts
    threads = -(-max(parts * across, columns) // WARP) * WARP
    own = 2 * key_dim + columns  # channels of the convolution: q, k, the CTA's part of v
    turns = -(-own // threads)
    last = -(-columns // WARP)  # warps that finish the CTA's columns
    loads = -(-key_dim // WARP)
    gate_column = channels + value_heads * value_dim
    query_scale = 1.0 / math.sqrt(key_dim)

    def cluster(name, *arguments):
        return T.evaluate(T.cuda.func_call(f"tvms_cluster_{name}", *arguments, source_code=_CLUSTER))

    @T.prim_func(s_tir=True)
    def delta_step(
        mixed: T.Buffer((tokens, row_length), dtype),
        taps: T.Buffer((channels, 4), "float32"),
        a_log: T.Buffer((value_heads,), "float32"),
        dt_bias: T.Buffer((value_heads,), "float32"),
        w: T.Buffer((value_dim,), "float32"),
        conv_state: T.Buffer((tokens, 3, channels), "float32"),
        state: T.Buffer((tokens, value_heads, key_dim, value_dim), "float32"),
        y: T.Buffer((tokens, value_heads * value_dim), dtype),
    ):
        token = T.launch_thread("blockIdx.y", tokens)
        block = T.launch_thread("blockIdx.x", value_heads * splits)
        rank = T.launch_thread("clusterCtaIdx.x", group * splits)
        thread = T.launch_thread("threadIdx.x", threads)
        head: T.let[T.int32] = block // splits
        first: T.let[T.int32] = block % splits * columns  # of the head's columns
        part: T.let[T.int32] = thread // across
        place: T.let[T.int32] = thread % across * run
        lane: T.let[T.int32] = thread % WARP
        warp: T.let[T.int32] = thread // WARP
        s = T.alloc_buffer((rows * run,), "float32", scope="local")
        filters = T.alloc_buffer((turns * 4,), "float32", scope="local")
        window = T.alloc_buffer((turns * 4,), "float32", scope="local")
        channel = T.alloc_buffer((turns,), "int32", scope="local")
        scale = T.alloc_buffer((2,), "float32", scope="local")  # exp(A_log), dt_bias
        decay = T.alloc_buffer((2,), "float32", scope="local")  # g, beta
        sums = T.alloc_buffer((2 * run,), "float32", scope="local")
        dots = T.alloc_buffer((3,), "float32", scope="local")  # q.q, k.k, k.q
        gate = T.alloc_buffer((2,), "float32", scope="local")  # z, w
        out = T.alloc_buffer((3,), "float32", scope="local")  # S^T k, S^T q, o
        change = T.alloc_buffer((1,), "float32", scope="local")
        inputs = T.alloc_buffer((own,), "float32", scope="shared")  # q, k, v
        partial = T.alloc_buffer((2, parts, columns), "float32", scope="shared")
        delta = T.alloc_buffer((columns + 1,), "float32", scope="shared")  # and 1 / |k|
        squares = T.alloc_buffer((splits * last,), "float32", scope="shared")

        start_dependents()
        cluster("arrive")  # all CTAs have begun: their shared memory can be written
        for r in T.unroll(rows):
            if thread < parts * across:
                if T.bool(run == 4):
                    read_quad(state[token, head, part * rows + r, first + place], s[r * run])
                else:
                    for v in T.unroll(run):
                        s[r * run + v] = read(state[token, head, part * rows + r, first + place + v])
        for i in T.unroll(turns):
            if i * threads + thread < own:
                channel[i] = i * threads + thread
                if channel[i] < key_dim:
                    channel[i] = channel[i] + head // group * key_dim
                else:
                    if channel[i] < 2 * key_dim:
                        channel[i] = channel[i] + (key_columns - key_dim + head // group * key_dim)
                    else:
                        channel[i] = channel[i] + (
                            2 * (key_columns - key_dim) + head * value_dim + first
                        )
                read_quad(taps[channel[i], 0], filters[i * 4])
                for j in T.unroll(3):
                    window[i * 4 + j] = read(conv_state[token, j, channel[i]])
        scale[0] = T.exp(read(a_log[head]))
        scale[1] = read(dt_bias[head])
        gate[1] = T.float32(0)
        if thread < columns:
            gate[1] = read(w[first + thread])

        wait_for_inputs()
        for i in T.unroll(turns):
            if i * threads + thread < own:
                window[i * 4 + 3] = read(mixed[token, channel[i]])
        decay[1] = read(mixed[token, gate_column + head])
        decay[0] = read(mixed[token, gate_column + value_heads + head])
        gate[0] = T.float32(0)
        if thread < columns:
            gate[0] = read(mixed[token, channels + head * value_dim + first + thread])
        for i in T.unroll(turns):
            if i * threads + thread < own:
                inputs[i * threads + thread] = silu(
                    window[i * 4] * filters[i * 4]
                    + window[i * 4 + 1] * filters[i * 4 + 1]
                    + window[i * 4 + 2] * filters[i * 4 + 2]
                    + window[i * 4 + 3] * filters[i * 4 + 3]
                )
        decay[0] = T.exp(-scale[0] * softplus(decay[0] + scale[1]))
        decay[1] = T.sigmoid(decay[1])
        T.tvm_storage_sync("shared")

        if thread < parts * across:
            for v in T.unroll(2 * run):
                sums[v] = T.float32(0)
            for r in T.unroll(rows):
                for v in T.unroll(run):
                    sums[v] += s[r * run + v] * inputs[key_dim + part * rows + r]
                    sums[run + v] += s[r * run + v] * inputs[part * rows + r]
            for v in T.vectorized(run):
                partial[0, part, place + v] = sums[v]
            for v in T.vectorized(run):
                partial[1, part, place + v] = sums[run + v]
        if warp < last:
            for i in T.unroll(3):
                dots[i] = T.float32(0)
            for i in T.unroll(loads):
                if i * WARP + lane < key_dim:
                    dots[0] += inputs[i * WARP + lane] * inputs[i * WARP + lane]
                    dots[1] += inputs[key_dim + i * WARP + lane] * inputs[key_dim + i * WARP + lane]
                    dots[2] += inputs[key_dim + i * WARP + lane] * inputs[i * WARP + lane]
            for i in T.unroll(3):
                dots[i] = T.cuda.warp_sum(dots[i])
            dots[0] = T.rsqrt(dots[0] + T.float32(1e-6)) * T.float32(query_scale)
            dots[1] = T.rsqrt(dots[1] + T.float32(1e-6))
            dots[2] = dots[2] * dots[0] * dots[1]
        cluster("wait")
        T.tvm_storage_sync("shared")

        out[2] = T.float32(0)
        if warp < last:
            if thread < columns:
                out[0] = T.float32(0)
                out[1] = T.float32(0)
                for p in T.unroll(parts):
                    out[0] += partial[0, p, thread]
                    out[1] += partial[1, p, thread]
                change[0] = (
                    inputs[2 * key_dim + thread] - decay[0] * (out[0] * dots[1])
                ) * decay[1]
                delta[thread] = change[0]
                out[2] = decay[0] * (out[1] * dots[0]) + dots[2] * change[0]
                if thread == 0:
                    delta[columns] = dots[1]
            change[0] = T.cuda.warp_sum(out[2] * out[2])
            if lane < splits:
                cluster(
                    "store",
                    T.address_of(squares[first // columns * last + warp]),
                    rank // splits * splits + lane,
                    change[0],
                )
        cluster("arrive")
        T.tvm_storage_sync("shared")

        if thread < parts * across:
            for r in T.unroll(rows):
                change[0] = inputs[key_dim + part * rows + r] * delta[columns]
                for v in T.unroll(run):
                    s[r * run + v] = s[r * run + v] * decay[0] + change[0] * delta[place + v]
                for v in T.vectorized(run):
                    state[token, head, part * rows + r, first + place + v] = s[r * run + v]
        cluster("wait")
        if thread < columns:
            change[0] = T.float32(0)
            for i in T.unroll(splits * last):
                change[0] += squares[i]
            change[0] = T.rsqrt(change[0] / T.float32(value_dim) + T.float32(eps))
            y[token, head * value_dim + first + thread] = T.cast(
                gate[1] * out[2] * change[0] * silu(gate[0]), dtype
            )
        for i in T.unroll(turns):
            if i * threads + thread < own and (i * threads + thread >= 2 * key_dim or rank == 0):
                for j in T.unroll(3):
                    conv_state[token, j, channel[i]] = window[i * 4 + j + 1]

    return dependent(delta_step)
