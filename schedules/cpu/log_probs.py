"""log_probs: log softmax at one column of each row."""

from __future__ import annotations

from tvm.script import tirx as T

from tvm_sparse.schedules.cpu.vector import exp, lanes, symbolic, tree_max, tree_sum


def log_probs(vocab: int):
    n, width = symbolic("n"), lanes(vocab)

    @T.prim_func(s_tir=True)
    def kernel(logits_: T.handle, targets_: T.handle, y_: T.handle):
        logits = T.match_buffer(logits_, (n, vocab), "float32")
        targets = T.match_buffer(targets_, (n,), "int32")
        y = T.match_buffer(y_, (n,), "float32")
        for t in T.parallel(n):
            part = T.alloc_buffer((width,), "float32", scope="local")
            total = T.alloc_buffer((width,), "float32", scope="local")
            largest = T.alloc_buffer((1,), "float32", scope="local")
            for v in T.vectorized(width):
                part[v] = logits[t, v]
            for block in T.serial(vocab // width):
                for v in T.vectorized(width):
                    part[v] = T.max(part[v], logits[t, block * width + v])
            largest[0] = tree_max(part, width)
            for v in T.vectorized(width):
                total[v] = T.float32(0)
            # sums of 256 terms first: one long float32 sum over a large vocabulary would lose bits
            for outer in T.serial((vocab // width + 255) // 256):
                for v in T.vectorized(width):
                    part[v] = T.float32(0)
                for inner in T.serial(T.min(256, vocab // width - outer * 256)):
                    for v in T.vectorized(width):
                        part[v] += exp(logits[t, (outer * 256 + inner) * width + v] - largest[0])
                for v in T.vectorized(width):
                    total[v] += part[v]
            y[t] = logits[t, targets[t]] - largest[0] - T.log(tree_sum(total, width))

    return kernel
