"""rope_append: norm and rotate q and k of each token, and put k and v into the caches."""

from __future__ import annotations

from tvm.script import tirx as T

from tvm_sparse.schedules.cpu.vector import count, f32, lanes, over_tokens, symbolic, tree_sum


def rope_append(
    tokens: int | None,
    batch: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    rotary_dim: int,
    theta: float,
    eps: float,
    dtype: str,
):
    n, P, context = count(tokens), symbolic("P"), symbolic("T")
    decode, each_token = tokens is not None, over_tokens(tokens)
    width, half = lanes(head_dim), rotary_dim // 2
    k_columns = 2 * heads * head_dim
    v_columns = k_columns + kv_heads * head_dim

    @T.prim_func(s_tir=True)
    def kernel(
        qkv_: T.handle,
        q_norm_: T.handle,
        k_norm_: T.handle,
        slot_: T.handle,
        position_: T.handle,
        k_cache_: T.handle,
        v_cache_: T.handle,
        q_: T.handle,
    ):
        qkv = T.match_buffer(qkv_, (n, P), dtype)
        q_norm = T.match_buffer(q_norm_, (head_dim,), "float32")
        k_norm = T.match_buffer(k_norm_, (head_dim,), "float32")
        slot = T.match_buffer(slot_, (1,), "int32")
        position = T.match_buffer(position_, (batch,), "int32")
        k_cache = T.match_buffer(k_cache_, (batch, kv_heads, context, head_dim), dtype)
        v_cache = T.match_buffer(v_cache_, (batch, kv_heads, context, head_dim), dtype)
        q = T.match_buffer(q_, (n, heads * head_dim), "float32")
        for t in each_token(n):
            turn = T.alloc_buffer((2, half), "float32", scope="local")  # cos, sin
            row = T.alloc_buffer((head_dim,), "float32", scope="local")
            squares = T.alloc_buffer((width,), "float32", scope="local")
            scale = T.alloc_buffer((1,), "float32", scope="local")
            owner: T.let[T.int32] = T.Cast("int32", t) if decode else slot[0]
            at: T.let[T.int64] = T.Cast("int64", position[owner]) + (0 if decode else t)
            for i in T.serial(half):
                turn[1, i] = f32(at) * f32(T.pow(T.float64(theta), T.Cast("float64", i) * T.float64(-2.0 / rotary_dim)))
                turn[0, i] = T.cos(turn[1, i])
                turn[1, i] = T.sin(turn[1, i])
            for head in T.serial(heads + kv_heads):  # the query heads, then the key heads
                column: T.let[T.int32] = T.if_then_else(
                    head < heads, head * 2 * head_dim, k_columns + (head - heads) * head_dim
                )
                for v in T.vectorized(width):
                    squares[v] = T.float32(0)
                for block in T.serial(head_dim // width):
                    for v in T.vectorized(width):
                        row[block * width + v] = f32(qkv[t, column + block * width + v])
                        squares[v] += row[block * width + v] * row[block * width + v]
                scale[0] = T.float32(1) / T.sqrt(tree_sum(squares, width) / T.float32(head_dim) + T.float32(eps))
                for d in T.serial(head_dim):
                    row[d] = row[d] * scale[0] * T.if_then_else(head < heads, q_norm[d], k_norm[d])
                for i in T.serial(half):
                    scale[0] = row[i] * turn[0, i] - row[half + i] * turn[1, i]
                    row[half + i] = row[half + i] * turn[0, i] + row[i] * turn[1, i]
                    row[i] = scale[0]
                if head < heads:
                    for block in T.serial(head_dim // width):
                        for v in T.vectorized(width):
                            q[t, head * head_dim + block * width + v] = row[block * width + v]
                else:
                    for block in T.serial(head_dim // width):
                        for v in T.vectorized(width):
                            k_cache[owner, head - heads, at, block * width + v] = T.Cast(dtype, row[block * width + v])
                            v_cache[owner, head - heads, at, block * width + v] = qkv[
                                t, v_columns + (head - heads) * head_dim + block * width + v
                            ]

    return kernel
