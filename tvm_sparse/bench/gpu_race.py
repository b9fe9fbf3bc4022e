"""`bench kernels` on a GPU: captured graphs over rotating copies, in one run with torch's and our own dense product.

A graph holds at least 64 calls and its copies of the weights exceed the L2 cache four times; a call that does not know
the kernel before it pays for the whole of itself. Nothing here imports TVM's compiler: a library built elsewhere runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from math import ceil
from pathlib import Path
from typing import Any

import torch

from tvm_sparse.bench.options import Options, blank_spec
from tvm_sparse.bench.tables import Row
from tvm_sparse.bench.timing import Times
from tvm_sparse.engine.runtime import load_cuda
from tvm_sparse.formats import FORMATS, Packed, pack
from tvm_sparse.formats.base import FormatChoice
from tvm_sparse.plan import decide, expected_stats
from tvm_sparse.schedules.spec import KernelSpec
from tvm_sparse.targets import Machine

CALLS = 64
TOLERANCE = 4e-3  # rounding to bfloat16 leaves 1.7e-3


def specs(options: Options, machine: Machine) -> list[KernelSpec]:
    """Every kernel a run needs, told from the options alone."""
    found: dict[KernelSpec, None] = {}
    for shape in options.shapes:
        for batch in options.batches:
            choices = [_choice(options, expected_stats(shape, 1 - s), machine, batch) for s in options.sparsities]
            for choice in (*choices, FORMATS["dense"].choice()):
                found[blank_spec(choice, shape, batch, machine)] = None
    return list(found)


def _choice(options: Options, stats, machine: Machine, batch: int) -> FormatChoice:
    if options.packed == "auto":
        return decide("weight", stats, (machine,), batch).choice
    return (*FORMATS[options.packed].choices(stats, machine), FORMATS["dense"].choice())[0]


def measure_all(options: Options, machine: Machine, library: Path) -> list[Row]:
    kernels = Kernels(library)
    rows = []
    for shape in options.shapes:
        for sparsity in options.sparsities:
            weight = _random_sparse(shape, sparsity)
            for batch in options.batches:
                choice = _choice(options, expected_stats(shape, 1 - sparsity), machine, batch)
                rows.append(_measure_one(options, kernels, machine, weight, choice, sparsity, batch))
                print("  " + ", ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    return rows


class Kernels:
    """The functions of a compiled library by name."""

    def __init__(self, library: Path) -> None:
        torch.zeros(1, device="cuda")  # loads the CUDA runtime that torch carries
        load_cuda()
        import tvm_ffi

        self.stream = tvm_ffi.use_torch_stream
        self._module = tvm_ffi.load_module(str(library.resolve()))

    def __getitem__(self, name: str) -> Callable[..., Any]:
        return self._module[name]


def _random_sparse(shape: tuple[int, int], sparsity: float) -> torch.Tensor:
    """Normal weights with the smallest set to zero, as pruning by magnitude leaves them."""
    generator = torch.Generator("cuda").manual_seed(0)
    weight = torch.empty(shape, device="cuda").normal_(0, 0.0111, generator=generator)
    cut = weight.abs().flatten()[: 1 << 22].quantile(sparsity)
    return weight.mul_(weight.abs() > cut).bfloat16()


def _measure_one(
    options: Options,
    kernels: Kernels,
    machine: Machine,
    weight: torch.Tensor,
    choice: FormatChoice,
    sparsity: float,
    batch: int,
) -> Row:
    n, k = weight.shape
    x = torch.randn(batch, k, device="cuda", generator=torch.Generator("cuda").manual_seed(1)).bfloat16()
    want = x.double() @ weight.double().T
    packed = pack(weight, choice)
    y = torch.empty(batch, n, dtype=torch.bfloat16, device="cuda")
    ours, dense = (kernels[blank_spec(c, (n, k), batch, machine).name] for c in (choice, FORMATS["dense"].choice()))

    def race(name: str, parts: Mapping[str, torch.Tensor], call: Callable[..., object], check: bool = True) -> Times:
        nbytes = sum(t.nbytes for t in parts.values())
        copies = [[t.clone() for t in parts.values()] for _ in range(_copies(nbytes, machine))]
        y.fill_(torch.nan)
        rounds = tuple(_replays(kernels, [lambda c=c: call(*c) for c in copies], options.rounds))  # type: ignore[misc]
        if check and not _error(y, want) < TOLERANCE:
            raise RuntimeError(f"{name} [{n}, {k}]: relative error {_error(y, want):.1e}")
        return Times(name, nbytes, rounds)

    mine = race(str(choice), packed.buffers, lambda *parts: ours(x, *parts, y))
    error = _error(y, want)
    others = [
        race("dense", {"": weight}, lambda w: dense(x, w, y)),
        race("torch", {"": weight}, lambda w: torch.mm(x, w.T, out=y)),
    ]
    best = min(others, key=lambda times: times.median)
    row: dict[str, object] = {
        "shape": f"{n}x{k}", "sparsity": sparsity, "batch": batch, "format": str(choice),
        "us": mine.median * 1e6, "spread us": mine.spread * 1e6, "MB": packed.nbytes / 1e6,
        "TB/s": packed.nbytes / mine.median / 1e12, "floor us": _floor(kernels, packed, batch, machine, race),
        "dense us": others[0].median * 1e6, "torch us": others[1].median * 1e6,
        "ratio": best.median / mine.median, "error": error,
    }  # fmt: skip
    return row


def _floor(kernels: Kernels, packed: Packed, batch: int, machine: Machine, race: Callable[..., Times]) -> float | str:
    """Microseconds of the kernel that reads the same words and does nothing else."""
    if packed.choice.name != "delta":
        return ""
    stream = kernels["floor_" + blank_spec(packed.choice, packed.shape, batch, machine).name]
    out = torch.zeros(1, dtype=torch.uint32, device="cuda")
    return race("floor", packed.buffers, lambda words, *_: stream(words, out), check=False).median * 1e6


def _copies(nbytes: int, machine: Machine) -> int:
    return max(2, ceil(4 * machine.l2 / nbytes) + 1)


def _replays(kernels: Kernels, calls: list[Callable[[], object]], rounds: int) -> Iterator[float]:
    """Seconds of one call, for each replay of a graph that makes every call as often, at least CALLS in all."""
    calls = calls * ceil(CALLS / len(calls))
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with kernels.stream(torch.cuda.graph(graph)):
        for call in calls:
            call()
    for number in range(rounds + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        if number >= 2:  # the first ones warm up
            yield start.elapsed_time(end) * 1e-3 / len(calls)


def _error(y: torch.Tensor, want: torch.Tensor) -> float:
    return float((y.double() - want).norm() / want.norm())


def machine() -> dict[str, object]:
    return {"machine": torch.cuda.get_device_name(0), "torch": torch.__version__}


__all__ = ["Kernels", "machine", "measure_all", "specs"]
