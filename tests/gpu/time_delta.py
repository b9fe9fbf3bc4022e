"""The delta stream's decode against torch's dense bfloat16 product: python tests/gpu/time_delta.py LIBRARY [sparsity]

Each contender is a captured graph of one call per copy of its weights; the copies together exceed L2 many times over.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

import cases  # noqa: E402
import torch  # noqa: E402
import tvm_ffi  # noqa: E402
from host import DEVICE, load, relative_error  # noqa: E402

from tvm_sparse.formats import FORMATS  # noqa: E402

TOTAL = 600 << 20  # bytes of copies a contender


def microseconds(call: Callable[[int], object], copies: int) -> float:
    """Median of 15 replays of a graph with one call for each copy."""
    for i in range(copies):
        call(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with tvm_ffi.use_torch_stream(torch.cuda.graph(graph)):
        for i in range(copies):
            call(i)
    times = []
    for _ in range(18):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / copies)
    return sorted(times[3:])[7]


def dense_time(w: torch.Tensor, x: torch.Tensor) -> float:
    copies = [w.clone() for _ in range(-(-TOTAL // w.nbytes))]
    y = torch.empty(1, w.shape[0], dtype=torch.bfloat16, device=DEVICE)
    return microseconds(lambda i: torch.mm(x, copies[i].T, out=y), len(copies))


def main(library: str, sparsity: float = 0.75) -> None:
    get = load(library)
    for n, k in cases.PROJECTIONS:
        w = torch.randn(n, k, device=DEVICE) * 0.0111
        w = (w * (w.abs() > torch.quantile(w.abs().flatten()[: 1 << 22], sparsity))).bfloat16()
        x = torch.randn(1, k, device=DEVICE).bfloat16()
        reference = x.double() @ w.double().T
        dense = dense_time(w, x)
        print(f"[{n}, {k}] {sparsity:.0%}: torch bf16 {dense:.1f} us, {w.nbytes / dense / 1e6:.2f} TB/s")
        choice, copies = None, []
        for case in cases.timed():
            if (case.n, case.k) != (n, k):
                continue
            if case.choice != choice:
                choice, packed = case.choice, FORMATS[case.choice.name].pack(w, case.choice)
                count = min(24, -(-TOTAL // packed.nbytes))
                copies = [[t.clone() for t in packed.buffers.values()] for _ in range(count)]
            y = torch.full((1, n), float("nan"), device=DEVICE).bfloat16()
            kernel = get(case.name)
            took = microseconds(lambda i: kernel(x, *copies[i], y), len(copies))  # noqa: B023
            error = relative_error(y, reference)
            chosen = " ".join(f"{key}={value}" for key, value in case.decisions)
            print(
                f"  {case.choice!s:28} {chosen:19} {took:6.1f} us {packed.nbytes / took / 1e6:5.2f} TB/s"
                f"  x{dense / took:.2f}  error {error:.1e}"
            )


if __name__ == "__main__":
    main(sys.argv[1], *map(float, sys.argv[2:]))
