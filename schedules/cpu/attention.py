"""attention: softmax over the cache with a running maximum (Dao et al. 2022, algorithm 1), sixteen keys at a time."""

from __future__ import annotations

from tvm.script import tirx as T

from tvm_sparse.schedules.cpu.vector import count, exp, f32, lanes, sigmoid, symbolic, tree_max, tree_sum

KEYS = 16
LOWEST = -3.0e38


def attention(tokens: int | None, batch: int, heads: int, kv_heads: int, head_dim: int, dtype: str):
    n, P, context = count(tokens), symbolic("P"), symbolic("T")
    decode, width, group = tokens is not None, lanes(head_dim), heads // kv_heads
    blocks = head_dim // width

    @T.prim_func(s_tir=True)
    def kernel(
        q_: T.handle,
        qkv_: T.handle,
        slot_: T.handle,
        position_: T.handle,
        k_cache_: T.handle,
        v_cache_: T.handle,
        y_: T.handle,
    ):
        q = T.match_buffer(q_, (n, heads * head_dim), "float32")
        qkv = T.match_buffer(qkv_, (n, P), dtype)
        slot = T.match_buffer(slot_, (1,), "int32")
        position = T.match_buffer(position_, (batch,), "int32")
        k_cache = T.match_buffer(k_cache_, (batch, kv_heads, context, head_dim), dtype)
        v_cache = T.match_buffer(v_cache_, (batch, kv_heads, context, head_dim), dtype)
        y = T.match_buffer(y_, (n, heads * head_dim), dtype)
        for task in T.parallel(n * heads):
            out = T.alloc_buffer((head_dim,), "float32", scope="local")
            dot = T.alloc_buffer((width,), "float32", scope="local")
            score = T.alloc_buffer((KEYS,), "float32", scope="local")
            running = T.alloc_buffer((3,), "float32", scope="local")  # maximum, sum of weights, rescaling
            t: T.let[T.int64] = T.Cast("int64", task // heads)
            h: T.let[T.int32] = T.Cast("int32", task % heads)
            owner: T.let[T.int32] = T.Cast("int32", task // heads) if decode else slot[0]
            last: T.let[T.int64] = T.Cast("int64", position[owner]) + (0 if decode else t)
            running[0] = T.float32(LOWEST)
            running[1] = T.float32(0)
            for d in T.serial(blocks):
                for v in T.vectorized(width):
                    out[d * width + v] = T.float32(0)
            for tile in T.serial(last // KEYS + 1):
                for j in T.serial(KEYS):
                    for v in T.vectorized(width):
                        dot[v] = T.float32(0)
                    for d in T.serial(blocks):
                        for v in T.vectorized(width):
                            dot[v] += q[t, h * head_dim + d * width + v] * f32(
                                k_cache[owner, h // group, T.min(tile * KEYS + j, last), d * width + v]
                            )
                    score[j] = T.Select(
                        tile * KEYS + j <= last,
                        tree_sum(dot, width) * T.float32(head_dim**-0.5),
                        T.float32(LOWEST),
                    )
                running[2] = T.max(running[0], tree_max(score, KEYS))
                for j in T.vectorized(KEYS):
                    score[j] = T.Select(score[j] > T.float32(LOWEST), exp(score[j] - running[2]), T.float32(0))
                running[0] = exp(running[0] - running[2])
                running[1] = running[1] * running[0] + tree_sum(score, KEYS)
                for d in T.serial(blocks):
                    for v in T.vectorized(width):
                        dot[v] = out[d * width + v] * running[0]
                    for j in T.serial(KEYS):
                        for v in T.vectorized(width):
                            dot[v] += score[j] * f32(
                                v_cache[owner, h // group, T.min(tile * KEYS + j, last), d * width + v]
                            )
                    for v in T.vectorized(width):
                        out[d * width + v] = dot[v]
                running[0] = running[2]
            for d in T.serial(blocks):
                for v in T.vectorized(width):
                    y[t, h * head_dim + d * width + v] = T.Cast(
                        dtype,
                        out[d * width + v] / running[1] * sigmoid(f32(qkv[t, (2 * h + 1) * head_dim + d * width + v])),
                    )

    return kernel
