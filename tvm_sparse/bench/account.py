"""Where the time of a captured step goes: kernel by kernel, from the profiler's trace of its replays.

With dependent launches kernels overlap, so a kernel is charged with the time from the end of the one before to its own
end: the charges add up to the step. What lies before a kernel's start is a gap, and charged with it.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from tvm_sparse.bench.tables import Row
from tvm_sparse.layout import RuntimeParam

OTHERS = "others"
_CLASSES = {
    "products by cuBLASLt": "nvjet|cutlass|xmma|cublas|gemm|gemv|splitKreduce",
    "attention": "attention|rope_append",
    "delta rule": "delta_step|causal_conv|gated_delta|gated_norm",
    "norms": "rms_norm",
    "silu": "silu",
    "pick": "pick|candidates",
}
_SHAPE = re.compile(r"(\d+)x(\d+)")

Kernel = tuple[str, float, float]
"""Name, start and end in microseconds."""


def trace(run: Callable[[int], object], steps: int) -> list[Kernel]:
    """The kernels of `run(steps)`, in the order of their ends; none where the profiler cannot look into this GPU."""
    run(1)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        run(steps)
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as scratch:
        written = Path(scratch, "trace.json")
        profiler.export_chrome_trace(str(written))
        events = json.loads(written.read_text())["traceEvents"]
    kernels = [(e["name"], e["ts"], e["ts"] + e["dur"]) for e in events if e.get("cat") == "kernel"]
    return sorted(kernels, key=lambda kernel: kernel[2])


def charges(kernels: list[Kernel], steps: int) -> list[Row]:
    """One row a kernel name, dearest first: launches a step, microseconds charged, running and idle before it."""
    found: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
    before = kernels[0][1] if kernels else 0.0
    for name, start, end in kernels:
        found[name].append((end - before, end - start, max(0.0, start - before)))
        before = end
    rows = []
    for name, times in found.items():
        charged, running, idle = (sum(column) / len(times) for column in zip(*times, strict=True))
        rows.append(
            {
                "kernel": name.removesuffix("_kernel"),
                "launches": len(times) / steps,
                "us each": charged,
                "running us": running,
                "idle us": idle,
                "us a step": sum(each[0] for each in times) / steps,
            }
        )
    return sorted(rows, key=lambda row: -row["us a step"])  # type: ignore[operator, return-value]


def account(run: Callable[[int], object], steps: int = 5) -> list[Row]:
    """`charges` of `run(steps)`, which takes so many steps, one behind the other."""
    return charges(trace(run, steps), steps)


def by_class(rows: Sequence[Row], products: Mapping[tuple[int, int], str]) -> dict[str, float]:
    """Milliseconds a step by class of kernel: products by name, in their order, then what stands between them.

    A product's kernel is told by the shape in its name; those of cuBLASLt tell their tiles only.
    """
    found = dict.fromkeys([*products.values(), *_CLASSES, OTHERS], 0.0)
    for row in rows:
        name = str(row["kernel"])
        shape = _SHAPE.search(name)
        product = products.get((int(shape[1]), int(shape[2]))) if shape else None
        known = (kind for kind, names in _CLASSES.items() if re.search(names, name))
        found[product or next(known, OTHERS)] += float(row["us a step"]) / 1e3  # type: ignore[arg-type]
    return {kind: spent for kind, spent in found.items() if spent}


def product_names(params: Sequence[RuntimeParam]) -> dict[tuple[int, int], str]:
    """[N, K] -> the matrices of that shape, without their layers: "mlp.down_proj"."""
    found: dict[tuple[int, int], dict[str, None]] = defaultdict(dict)
    for param in params:
        if param.kind in ("projection", "head"):
            found[param.shape[0], param.shape[1]][re.sub(r"^layers\.\d+\.|\.weight$", "", param.name)] = None
    return {shape: " and ".join(names) for shape, names in found.items()}
