"""Packs a model's parameters on the GPU and on the CPU: python tests/gpu/run_packing.py [MODEL [LAYERS]]

First every format on small matrices, bit for bit; then, with MODEL (such as qwen3.5-27b), the whole model or its first
layers from synthetic weights at 75 % into a temporary folder, with the time, the peak of host memory and the seconds of
each phase. Reading and pruning, packing, and writing go on side by side, each in a thread of its own.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[2])]

import torch  # noqa: E402

from tvm_sparse import packing  # noqa: E402
from tvm_sparse.artefact.writer import ParamsWriter  # noqa: E402
from tvm_sparse.checkpoint.base import Checkpoint  # noqa: E402
from tvm_sparse.checkpoint.synthetic import SyntheticCheckpoint  # noqa: E402
from tvm_sparse.formats import FORMATS, delta, measure, pack  # noqa: E402
from tvm_sparse.layout import make_layout  # noqa: E402
from tvm_sparse.models.config import REGISTERED, ModelConfig  # noqa: E402
from tvm_sparse.packing import pack_model, packing_device  # noqa: E402
from tvm_sparse.plan import declared  # noqa: E402
from tvm_sparse.progress import peak_memory  # noqa: E402
from tvm_sparse.pruning import Pattern, PrunedWeights, Pruner, select  # noqa: E402
from tvm_sparse.targets import MACHINES  # noqa: E402

H200 = (MACHINES["h200"],)


def same_bits() -> None:
    generator = torch.Generator().manual_seed(0)
    wrong = checked = 0
    for n, k in ((512, 1024), (130, 1001), (1, 640), (4096, 5120)):
        for pruner in (Pruner(sparsity=0.5), Pruner(sparsity=0.9), Pruner(pattern=Pattern("n:m", n=2, m=4))):
            if pruner.pattern.kind == "n:m" and k % 4:
                continue
            here = torch.randn(n, k, generator=generator).mul_(0.011).bfloat16()
            here.view(-1)[::1000] = 2.0**-130  # outside the window of exponents: the residual
            there = here.cuda()
            pruner.matrix("w", here)
            pruner.matrix("w", there)
            wrong += not torch.equal(here, there.cpu())
            stats, again = measure(here, ((16, 16),)), measure(there, ((16, 16),))
            wrong += stats != again
            for fmt in FORMATS.values():
                for choice in fmt.choices(stats, H200[0]):
                    one, other = pack(here, choice).buffers, pack(there, choice).buffers
                    bad = [name for name in one if not torch.equal(_bytes(one[name]), _bytes(other[name].cpu()))]
                    checked += 1
                    wrong += bool(bad)
                    if bad:
                        print(f"  {choice} [{n}, {k}]: {bad} differ")
    print(f"{checked} packings on both devices, {wrong} differ")


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


SECONDS: Counter[str] = Counter()
TIMED = {
    "read": (SyntheticCheckpoint, "rows"),
    "prune": (Pruner, "matrix"),
    "measure": (packing, "measure"),
    "plan": (packing, "decide"),
    "pack": (packing, "pack"),
    "deal, of pack": (delta, "deal"),
    "write": (ParamsWriter, "write"),
    "close a file, of write": (ParamsWriter, "_close_file"),
}


def timed(phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*arguments: Any, **options: Any) -> Any:
        began = time.perf_counter()
        try:
            return function(*arguments, **options)
        finally:
            SECONDS[phase] += time.perf_counter() - began  # type: ignore[assignment]

    return run


def whole(model: ModelConfig) -> None:
    layout, selected = make_layout(model), select(model)
    checkpoint: Checkpoint = SyntheticCheckpoint(model)
    weights = PrunedWeights(checkpoint, Pruner(sparsity=0.75), selected, packing_device())
    expected = declared(model, layout, selected, 0.75, Pattern(), H200, 1).nbytes
    for phase, (owner, name) in TIMED.items():
        setattr(owner, name, timed(phase, getattr(owner, name)))
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        plan = pack_model(Path(folder), "timing", layout, weights, H200, 1, expected=expected)
        took = time.perf_counter() - began
    peak = peak_memory() / 2**30
    print(f"{plan.nbytes / 1e9:.2f} GB packed on {weights.device} in {took:.0f} s, {peak:.2f} GiB of RAM")
    print(", ".join(f"{phase} {seconds:.1f} s" for phase, seconds in SECONDS.items()))


def main(model: str = "", layers: str = "") -> None:
    same_bits()
    if not model:
        return
    config = REGISTERED[model]
    if layers:
        config = replace(config, num_hidden_layers=int(layers), layer_types=config.layer_types[: int(layers)])
    whole(config)


if __name__ == "__main__":
    main(*sys.argv[1:])
