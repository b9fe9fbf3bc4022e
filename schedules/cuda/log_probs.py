"""Log-probabilities of given tokens, on a GPU: one CTA a row of logits, read twice."""

from __future__ import annotations

import tvm
from tvm.script import tirx as T

from tvm_sparse.schedules.cuda.device_code import block_max, block_sum, token_dim

THREADS = 1024


def log_probs(vocab: int) -> tvm.tirx.PrimFunc:
    """See schedules/ops.py."""
    n = token_dim(None)

    @T.prim_func(s_tir=True)
    def log_probs(
        logits: T.Buffer((n, vocab), "float32"),
        targets: T.Buffer((n,), "int32"),
        y: T.Buffer((n,), "float32"),
    ):
        row = T.launch_thread("blockIdx.x", n)
        thread = T.launch_thread("threadIdx.x", THREADS)
        largest = T.alloc_buffer((1,), "float32", scope="local")
        total = T.alloc_buffer((1,), "float32", scope="local")
        largest[0] = T.float32(-3.4028234663852886e38)
        for step in range(T.ceildiv(vocab, THREADS)):
            if step * THREADS + thread < vocab:
                largest[0] = T.max(largest[0], logits[row, step * THREADS + thread])
        largest[0] = block_max(largest[0])
        total[0] = T.float32(0)
        for step in range(T.ceildiv(vocab, THREADS)):
            if step * THREADS + thread < vocab:
                total[0] += T.exp(logits[row, step * THREADS + thread] - largest[0])
        total[0] = block_sum(total[0])
        if thread == 0:
            y[row] = logits[row, targets[row]] - largest[0] - T.log(total[0])

    return log_probs
