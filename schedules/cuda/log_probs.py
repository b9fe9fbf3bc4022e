"""Log-probabilities of given tokens, on a GPU: one CTA a row of logits, read once.

A thread keeps the maximum of what it read and the sum of exponentials below it, 32 bytes at a time where rows allow.
"""

from __future__ import annotations

import tvm
from tvm.script import tirx as T

from tvm_sparse.schedules.cuda.device_code import block_max, block_sum, token_dim

THREADS = 1024
_LOWEST = -3.4028234663852886e38


def log_probs(vocab: int) -> tvm.tirx.PrimFunc:
    """See schedules/ops.py."""
    n = token_dim(None)
    run, width = (8, 4) if vocab % 8 == 0 else (1, 1)

    @T.prim_func(s_tir=True)
    def log_probs(
        logits: T.Buffer((n, vocab), "float32"),
        targets: T.Buffer((n,), "int32"),
        y: T.Buffer((n,), "float32"),
    ):
        row = T.launch_thread("blockIdx.x", n)
        thread = T.launch_thread("threadIdx.x", THREADS)
        values = T.alloc_buffer((run,), "float32", scope="local")
        largest = T.alloc_buffer((2,), "float32", scope="local")  # before this step, with it
        total = T.alloc_buffer((1,), "float32", scope="local")
        largest[0] = T.float32(_LOWEST)
        total[0] = T.float32(0)
        for step in range(T.ceildiv(vocab, THREADS * run)):
            if (step * THREADS + thread) * run < vocab:
                for block in T.unroll(run // width):
                    for v in T.vectorized(width):
                        values[block * width + v] = logits[row, (step * THREADS + thread) * run + block * width + v]
                largest[1] = largest[0]
                for v in T.unroll(run):
                    largest[1] = T.max(largest[1], values[v])
                total[0] = total[0] * T.exp(largest[0] - largest[1])
                for v in T.unroll(run):
                    total[0] += T.exp(values[v] - largest[1])
                largest[0] = largest[1]
        largest[1] = block_max(largest[0])
        total[0] = block_sum(total[0] * T.exp(largest[0] - largest[1]))
        if thread == 0:
            y[row] = logits[row, targets[row]] - largest[1] - T.log(total[0])

    return log_probs
