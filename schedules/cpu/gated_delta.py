"""gated_delta: the recurrence of a DeltaNet layer, one token after the other, in blocks of state columns.

Every column v of a head's state S [Dk, Dv] is independent of the others, so a task is one block of columns and walks
all tokens by itself; its part of the state stays in the first-level cache. Prefill and decode are the same loop.
"""

from __future__ import annotations

from tvm.script import tirx as T

from tvm_sparse.schedules.cpu.vector import count, f32, lanes, symbolic, tree_sum


def gated_delta(
    tokens: int | None, batch: int, key_heads: int, value_heads: int, key_dim: int, value_dim: int, dtype: str
):
    n, P = count(tokens), symbolic("P")
    decode = tokens is not None
    sequences, steps = (batch, 1) if decode else (1, n)
    width, key_width = lanes(value_dim, 32), lanes(key_dim)
    blocks, tasks = value_dim // width, value_heads * (value_dim // width)
    k_columns, v_columns = key_heads * key_dim, 2 * key_heads * key_dim
    channels = v_columns + value_heads * value_dim
    b_columns = channels + value_heads * value_dim
    a_columns = b_columns + value_heads
    group = value_heads // key_heads

    @T.prim_func(s_tir=True)
    def kernel(
        y_: T.handle,
        mixed_: T.handle,
        A_log_: T.handle,
        dt_bias_: T.handle,
        slot_: T.handle,
        state_: T.handle,
        o_: T.handle,
    ):
        y = T.match_buffer(y_, (n, channels), "float32")
        mixed = T.match_buffer(mixed_, (n, P), dtype)
        A_log = T.match_buffer(A_log_, (value_heads,), "float32")
        dt_bias = T.match_buffer(dt_bias_, (value_heads,), "float32")
        slot = T.match_buffer(slot_, (1,), "int32")
        state = T.match_buffer(state_, (batch, value_heads, key_dim, value_dim), "float32")
        o = T.match_buffer(o_, (n, value_heads * value_dim), "float32")
        for task in T.parallel(sequences * tasks):
            q = T.alloc_buffer((key_dim,), "float32", scope="local")
            k = T.alloc_buffer((key_dim,), "float32", scope="local")
            squares = T.alloc_buffer((2, key_width), "float32", scope="local")
            scale = T.alloc_buffer((2,), "float32", scope="local")
            gates = T.alloc_buffer((3,), "float32", scope="local")  # log decay, decay, beta
            delta = T.alloc_buffer((width,), "float32", scope="local")
            read = T.alloc_buffer((width,), "float32", scope="local")
            owner: T.let[T.int32] = task // tasks if decode else slot[0]
            h: T.let[T.int32] = task % tasks // blocks
            key: T.let[T.int32] = h // group * key_dim
            column: T.let[T.int32] = task % blocks * width
            for step in T.serial(steps):
                t: T.let[T.int64] = T.Cast("int64", task // tasks) + step

                for i in T.unroll(2):
                    for v in T.vectorized(key_width):
                        squares[i, v] = T.float32(0)
                for d in T.serial(key_dim // key_width):
                    for v in T.vectorized(key_width):
                        q[d * key_width + v] = y[t, key + d * key_width + v]
                        k[d * key_width + v] = y[t, k_columns + key + d * key_width + v]
                        squares[0, v] += q[d * key_width + v] * q[d * key_width + v]
                        squares[1, v] += k[d * key_width + v] * k[d * key_width + v]
                scale[0] = T.float32(key_dim**-0.5) / T.sqrt(
                    tree_sum([squares[0, i] for i in range(key_width)], key_width) + T.float32(1e-6)
                )
                scale[1] = T.float32(1) / T.sqrt(
                    tree_sum([squares[1, i] for i in range(key_width)], key_width) + T.float32(1e-6)
                )
                for d in T.serial(key_dim // key_width):
                    for v in T.vectorized(key_width):
                        q[d * key_width + v] = q[d * key_width + v] * scale[0]
                        k[d * key_width + v] = k[d * key_width + v] * scale[1]

                gates[0] = f32(mixed[t, a_columns + h]) + dt_bias[h]
                gates[0] = T.if_then_else(
                    gates[0] > T.float32(20), gates[0], T.log1p(T.exp(gates[0])), dtype="float32"
                )  # softplus
                gates[0] = -T.exp(A_log[h]) * gates[0]
                gates[1] = T.exp(gates[0])
                gates[2] = T.float32(1) / (T.float32(1) + T.exp(-f32(mixed[t, b_columns + h])))

                for v in T.vectorized(width):
                    read[v] = T.float32(0)
                for d in T.serial(key_dim):
                    for v in T.vectorized(width):
                        read[v] += state[owner, h, d, column + v] * k[d]
                for v in T.vectorized(width):
                    delta[v] = gates[2] * (y[t, v_columns + h * value_dim + column + v] - gates[1] * read[v])
                    read[v] = T.float32(0)
                for d in T.serial(key_dim):
                    for v in T.vectorized(width):
                        state[owner, h, d, column + v] = state[owner, h, d, column + v] * gates[1] + k[d] * delta[v]
                        read[v] += state[owner, h, d, column + v] * q[d]
                for v in T.vectorized(width):
                    o[t, h * value_dim + column + v] = read[v]

    return kernel
