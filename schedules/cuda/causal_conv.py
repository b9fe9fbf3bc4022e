"""The short convolution before the delta rule, on a GPU.

Decode: one thread a channel. Prefill: one thread a channel of a run of tokens; the first run's threads, the only ones
that read the old state, write the new one.
"""

from __future__ import annotations

import tvm
from tvm.script import tirx as T

from tvm_sparse.schedules.cuda.device_code import f32, silu, symbol, token_dim

THREADS = 128
RUN = 16  # tokens of a prefill thread, all in flight


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
        block = T.launch_thread("blockIdx.x", T.ceildiv(channels, THREADS))
        thread = T.launch_thread("threadIdx.x", THREADS)
        window = T.alloc_buffer((4,), "float32", scope="local")
        if block * THREADS + thread < channels:
            for j in T.unroll(3):
                window[j] = conv_state[token, j, block * THREADS + thread]
            window[3] = f32(mixed[token, block * THREADS + thread])
            y[token, block * THREADS + thread] = silu(
                window[0] * w[block * THREADS + thread, 0]
                + window[1] * w[block * THREADS + thread, 1]
                + window[2] * w[block * THREADS + thread, 2]
                + window[3] * w[block * THREADS + thread, 3]
            )
            for j in T.unroll(3):
                conv_state[token, j, block * THREADS + thread] = window[j + 1]

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
        block = T.launch_thread("blockIdx.x", T.ceildiv(channels, THREADS))
        run = T.launch_thread("blockIdx.y", T.ceildiv(n, RUN))
        thread = T.launch_thread("threadIdx.x", THREADS)
        channel: T.let[T.int32] = block * THREADS + thread
        taps = T.alloc_buffer((4,), "float32", scope="local")
        rows = T.alloc_buffer((RUN + 3,), "float32", scope="local")  # the run's, after the three before them
        kept = T.alloc_buffer((3,), "float32", scope="local")
        if channel < channels:
            for j in T.unroll(4):
                taps[j] = w[channel, j]
            for j in T.unroll(3):
                if run == 0:
                    rows[j] = conv_state[slot[0], j, channel]
                else:
                    rows[j] = f32(mixed[run * RUN + j - 3, channel])
            for j in T.unroll(RUN):
                rows[j + 3] = T.float32(0)
                if run * RUN + j < n:
                    rows[j + 3] = f32(mixed[run * RUN + j, channel])
            for j in T.unroll(RUN):
                if run * RUN + j < n:
                    y[run * RUN + j, channel] = silu(
                        rows[j] * taps[0] + rows[j + 1] * taps[1] + rows[j + 2] * taps[2] + rows[j + 3] * taps[3]
                    )
            if run == 0:
                # The call's last tokens; where it has fewer than three, older rows move up.
                for j in T.unroll(3):
                    if n + j >= 3:
                        kept[j] = f32(mixed[n + j - 3, channel])
                    else:
                        kept[j] = conv_state[slot[0], n + j, channel]
                for j in T.unroll(3):
                    conv_state[slot[0], j, channel] = kept[j]

    return causal_conv
