"""causal_conv: depthwise convolution over the last four tokens, then silu; the state is the last three rows."""

from __future__ import annotations

from tvm.script import tirx as T

from tvm_sparse.schedules.cpu.vector import count, f32, lanes, silu, symbolic


def causal_conv(tokens: int | None, batch: int, channels: int, dtype: str):
    n, P, width = count(tokens), symbolic("P"), lanes(channels)
    decode = tokens is not None
    sequences, steps = (batch, 1) if decode else (1, n)
    blocks = channels // width

    @T.prim_func(s_tir=True)
    def kernel(mixed_: T.handle, w_: T.handle, slot_: T.handle, conv_state_: T.handle, y_: T.handle):
        mixed = T.match_buffer(mixed_, (n, P), dtype)
        w = T.match_buffer(w_, (channels, 4), "float32")
        slot = T.match_buffer(slot_, (1,), "int32")
        conv_state = T.match_buffer(conv_state_, (batch, 3, channels), "float32")
        y = T.match_buffer(y_, (n, channels), "float32")
        for task in T.parallel(sequences * blocks):  # a block of channels walks the tokens by itself
            window = T.alloc_buffer((4, width), "float32", scope="local")
            weight = T.alloc_buffer((4, width), "float32", scope="local")
            c: T.let[T.int32] = task % blocks * width
            owner: T.let[T.int32] = task // blocks if decode else slot[0]
            for j in T.unroll(3):
                for v in T.vectorized(width):
                    window[j, v] = conv_state[owner, j, c + v]
            for j in T.unroll(4):
                for v in T.vectorized(width):
                    weight[j, v] = w[c + v, j]
            for t in T.serial(steps):
                for v in T.vectorized(width):
                    window[3, v] = f32(mixed[task // blocks + t, c + v])
                for v in T.vectorized(width):
                    y[task // blocks + t, c + v] = silu(
                        window[0, v] * weight[0, v]
                        + window[1, v] * weight[1, v]
                        + window[2, v] * weight[2, v]
                        + window[3, v] * weight[3, v]
                    )
                for j in T.unroll(3):
                    for v in T.vectorized(width):
                        window[j, v] = window[j + 1, v]
            for j in T.unroll(3):
                for v in T.vectorized(width):
                    conv_state[owner, j, c + v] = window[j, v]

    return kernel
