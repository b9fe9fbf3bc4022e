"""silu_mul: the gate of the MLP."""

from __future__ import annotations

from tvm.script import tirx as T

from tvm_sparse.schedules.cpu.vector import count, f32, lanes, silu


def silu_mul(tokens: int | None, inner: int, dtype: str):
    n, width = count(tokens), lanes(inner)
    pieces = lanes(inner // width, 4)  # a task is a quarter of a token, so that one token feeds several threads
    steps = inner // width // pieces

    @T.prim_func(s_tir=True)
    def kernel(gate_up_: T.handle, y_: T.handle):
        gate_up = T.match_buffer(gate_up_, (n, 2 * inner), dtype)
        y = T.match_buffer(y_, (n, inner), dtype)
        for task in T.parallel(n * pieces):
            for step in T.serial(steps):
                for v in T.vectorized(width):
                    y[task // pieces, (task % pieces * steps + step) * width + v] = T.Cast(
                        dtype,
                        silu(f32(gate_up[task // pieces, (task % pieces * steps + step) * width + v]))
                        * f32(gate_up[task // pieces, inner + (task % pieces * steps + step) * width + v]),
                    )

    return kernel
