"""Where the time of a captured step goes: kernel by kernel, from the profiler's trace of its replays.

With dependent launches kernels overlap, so a kernel is charged with the time from the end of the one before to its own
end: the charges add up to the step. What lies before a kernel's start is a gap, and charged with it.
"""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch

from tvm_sparse.bench.tables import Row

Kernel = tuple[str, float, float]
"""Name, start and end in microseconds."""


def trace(replay: Callable[[], object], replays: int) -> list[Kernel]:
    """The kernels of `replays` calls, in the order of their ends."""
    replay()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(replays):
            replay()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as scratch:
        written = Path(scratch, "trace.json")
        profiler.export_chrome_trace(str(written))
        events = json.loads(written.read_text())["traceEvents"]
    kernels = [(e["name"], e["ts"], e["ts"] + e["dur"]) for e in events if e.get("cat") == "kernel"]
    return sorted(kernels, key=lambda kernel: kernel[2])


def charges(kernels: list[Kernel], replays: int) -> list[Row]:
    """One row a kernel name, dearest first: launches a step, microseconds charged, running and idle before it."""
    found: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
    before = kernels[0][1]
    for name, start, end in kernels:
        found[name].append((end - before, end - start, max(0.0, start - before)))
        before = end
    rows = []
    for name, times in found.items():
        charged, running, idle = (sum(column) / len(times) for column in zip(*times, strict=True))
        rows.append(
            {
                "kernel": name.removesuffix("_kernel"),
                "launches": len(times) / replays,
                "us each": charged,
                "running us": running,
                "idle us": idle,
                "us a step": sum(each[0] for each in times) / replays,
            }
        )
    return sorted(rows, key=lambda row: -row["us a step"])  # type: ignore[operator, return-value]


def account(replay: Callable[[], object], replays: int = 5) -> list[Row]:
    return charges(trace(replay, replays), replays)
