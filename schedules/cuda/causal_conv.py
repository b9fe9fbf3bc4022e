"""The short convolution before the delta rule, on a GPU.

Decode: one thread a channel. Prefill: a CTA owns 32 channels, its 32 warps take every 32nd token each; it reads the old
state before its barrier and writes the new one after it.
"""

from __future__ import annotations

import tvm
from tvm.script import tirx as T

from tvm_sparse.schedules.cuda.device_code import f32, silu, symbol, token_dim

DECODE_THREADS = 128
LANES = 32  # channels of a prefill CTA
STRIDE = 32  # its tokens in flight


def causal_conv(tokens: int | None, batch: int, channels: int, dtype: str) -> tvm.tirx.PrimFunc:
    """See schedules/ops.py."""
    if tokens is None:
        return _prefill(batch, channels, dtype)
    return _decode(tokens, batch, channels, dtype)


def _decode(tokens: int, batch: int, channels: int, dtype: str) -> tvm.tirx.PrimFunc:
    row_length = symbol("row_length")

    @T.prim_func(s_tir=True)
    def causal_conv(
        mixed: T.Buffer((tokens, row_length), dtype),
        w: T.Buffer((channels, 4), "float32"),
        slot: T.Buffer((1,), "int32"),
        conv_state: T.Buffer((batch, 3, channels), "float32"),
        y: T.Buffer((tokens, channels), "float32"),
    ):
        token = T.launch_thread("blockIdx.y", tokens)
        block = T.launch_thread("blockIdx.x", T.ceildiv(channels, DECODE_THREADS))
        thread = T.launch_thread("threadIdx.x", DECODE_THREADS)
        window = T.alloc_buffer((4,), "float32", scope="local")
        if block * DECODE_THREADS + thread < channels:
            for j in T.unroll(3):
                window[j] = conv_state[token, j, block * DECODE_THREADS + thread]
            window[3] = f32(mixed[token, block * DECODE_THREADS + thread])
            y[token, block * DECODE_THREADS + thread] = silu(
                window[0] * w[block * DECODE_THREADS + thread, 0]
                + window[1] * w[block * DECODE_THREADS + thread, 1]
                + window[2] * w[block * DECODE_THREADS + thread, 2]
                + window[3] * w[block * DECODE_THREADS + thread, 3]
            )
            for j in T.unroll(3):
                conv_state[token, j, block * DECODE_THREADS + thread] = window[j + 1]

    return causal_conv


def _prefill(batch: int, channels: int, dtype: str) -> tvm.tirx.PrimFunc:
    n = token_dim(None)
    row_length = symbol("row_length")

    @T.prim_func(s_tir=True)
    def causal_conv(
        mixed: T.Buffer((n, row_length), dtype),
        w: T.Buffer((channels, 4), "float32"),
        slot: T.Buffer((1,), "int32"),
        conv_state: T.Buffer((batch, 3, channels), "float32"),
        y: T.Buffer((n, channels), "float32"),
    ):
        block = T.launch_thread("blockIdx.x", T.ceildiv(channels, LANES))
        thread = T.launch_thread("threadIdx.x", LANES * STRIDE)
        channel: T.let[T.int32] = block * LANES + thread % LANES
        first: T.let[T.int32] = thread // LANES
        taps = T.alloc_buffer((4,), "float32", scope="local")
        total = T.alloc_buffer((1,), "float32", scope="local")
        kept = T.alloc_buffer((1,), "float32", scope="local")
        if channel < channels:
            for j in T.unroll(4):
                taps[j] = w[channel, j]
            for step in range(T.ceildiv(n, STRIDE)):
                if step * STRIDE + first < n:
                    total[0] = T.float32(0)
                    for j in T.unroll(4):
                        if step * STRIDE + first + j >= 3:
                            total[0] += taps[j] * f32(mixed[step * STRIDE + first + j - 3, channel])
                        else:
                            total[0] += (
                                taps[j]
                                * conv_state[slot[0], step * STRIDE + first + j, channel]
                            )
                    y[step * STRIDE + first, channel] = silu(total[0])
            # Row `first` of the new state: one of the call's tokens, or an older row that moves up.
            if first < 3:
                if n + first >= 3:
                    kept[0] = f32(mixed[n + first - 3, channel])
                else:
                    kept[0] = conv_state[slot[0], n + first, channel]
        T.tvm_storage_sync("shared")
        if channel < channels and first < 3:
            conv_state[slot[0], first, channel] = kept[0]

    return causal_conv
