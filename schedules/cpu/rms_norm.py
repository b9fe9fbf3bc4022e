"""rms_norm and add_rms_norm: a token's row over its root mean square, times the weight (Zhang and Sennrich 2019)."""

from __future__ import annotations

from tvm.script import tirx as T

from tvm_sparse.schedules.cpu.vector import count, f32, lanes, over_tokens, tree_sum


def rms_norm(tokens: int | None, hidden: int, eps: float, dtype: str):
    n, width, each_token = count(tokens), lanes(hidden), over_tokens(tokens)

    @T.prim_func(s_tir=True)
    def kernel(x_: T.handle, w_: T.handle, y_: T.handle):
        x = T.match_buffer(x_, (n, hidden), dtype)
        w = T.match_buffer(w_, (hidden,), "float32")
        y = T.match_buffer(y_, (n, hidden), dtype)
        for t in each_token(n):
            squares = T.alloc_buffer((width,), "float32", scope="local")
            scale = T.alloc_buffer((1,), "float32", scope="local")
            for v in T.vectorized(width):
                squares[v] = T.float32(0)
            for block in T.serial(hidden // width):
                for v in T.vectorized(width):
                    squares[v] += f32(x[t, block * width + v]) * f32(x[t, block * width + v])
            scale[0] = T.float32(1) / T.sqrt(tree_sum(squares, width) / T.float32(hidden) + T.float32(eps))
            for block in T.serial(hidden // width):
                for v in T.vectorized(width):
                    y[t, block * width + v] = T.Cast(
                        dtype, f32(x[t, block * width + v]) * scale[0] * w[block * width + v]
                    )

    return kernel


def add_rms_norm(tokens: int | None, hidden: int, eps: float, dtype: str):
    n, width, each_token = count(tokens), lanes(hidden), over_tokens(tokens)

    @T.prim_func(s_tir=True)
    def kernel(x_: T.handle, delta_: T.handle, w_: T.handle, total_: T.handle, y_: T.handle):
        x = T.match_buffer(x_, (n, hidden), dtype)
        delta = T.match_buffer(delta_, (n, hidden), dtype)
        w = T.match_buffer(w_, (hidden,), "float32")
        total = T.match_buffer(total_, (n, hidden), dtype)
        y = T.match_buffer(y_, (n, hidden), dtype)
        for t in each_token(n):
            squares = T.alloc_buffer((width,), "float32", scope="local")
            scale = T.alloc_buffer((1,), "float32", scope="local")
            for v in T.vectorized(width):
                squares[v] = T.float32(0)
            for block in T.serial(hidden // width):
                for v in T.vectorized(width):
                    total[t, block * width + v] = T.Cast(
                        dtype, f32(x[t, block * width + v]) + f32(delta[t, block * width + v])
                    )
                for v in T.vectorized(width):
                    squares[v] += f32(total[t, block * width + v]) * f32(total[t, block * width + v])
            scale[0] = T.float32(1) / T.sqrt(tree_sum(squares, width) / T.float32(hidden) + T.float32(eps))
            for block in T.serial(hidden // width):
                for v in T.vectorized(width):
                    y[t, block * width + v] = T.Cast(
                        dtype, f32(total[t, block * width + v]) * scale[0] * w[block * width + v]
                    )

    return kernel
