"""gated_norm: RMSNorm of each DeltaNet head, times silu(z); norm before gate."""

from __future__ import annotations

from tvm.script import tirx as T

from tvm_sparse.schedules.cpu.vector import count, f32, lanes, silu, symbolic, tree_sum


def gated_norm(
    tokens: int | None, key_heads: int, value_heads: int, key_dim: int, value_dim: int, eps: float, dtype: str
):
    n, P, width = count(tokens), symbolic("P"), lanes(value_dim)
    z_columns = 2 * key_heads * key_dim + value_heads * value_dim

    @T.prim_func(s_tir=True)
    def kernel(o_: T.handle, mixed_: T.handle, w_: T.handle, y_: T.handle):
        o = T.match_buffer(o_, (n, value_heads * value_dim), "float32")
        mixed = T.match_buffer(mixed_, (n, P), dtype)
        w = T.match_buffer(w_, (value_dim,), "float32")
        y = T.match_buffer(y_, (n, value_heads * value_dim), dtype)
        for task in T.parallel(n * value_heads):
            squares = T.alloc_buffer((width,), "float32", scope="local")
            scale = T.alloc_buffer((1,), "float32", scope="local")
            t: T.let[T.int64] = T.Cast("int64", task // value_heads)
            column: T.let[T.int32] = T.Cast("int32", task % value_heads) * value_dim
            for v in T.vectorized(width):
                squares[v] = T.float32(0)
            for block in T.serial(value_dim // width):
                for v in T.vectorized(width):
                    squares[v] += o[t, column + block * width + v] * o[t, column + block * width + v]
            scale[0] = T.float32(1) / T.sqrt(tree_sum(squares, width) / T.float32(value_dim) + T.float32(eps))
            for block in T.serial(value_dim // width):
                for v in T.vectorized(width):
                    y[t, column + block * width + v] = T.Cast(
                        dtype,
                        w[block * width + v]
                        * (o[t, column + block * width + v] * scale[0])
                        * silu(f32(mixed[t, z_columns + column + block * width + v])),
                    )

    return kernel
