"""`bench kernels`: the packed matmul against the faster of torch's bfloat16 and float32 `F.linear`.

Weights are random with zeros at random places; every contender has its own rotating copies, 1 GB of them, so that
what is read comes from memory as it does in a model. Results are checked against float64 first.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial
from math import ceil, exp, log

import torch

from tvm_sparse import targets
from tvm_sparse.bench.cpu_kernel import CpuKernel, set_threads
from tvm_sparse.bench.tables import Row, render
from tvm_sparse.bench.timing import Contender, Times, race, ratio
from tvm_sparse.command_line import CommandParser
from tvm_sparse.errors import Refusal
from tvm_sparse.formats import FORMATS, Packed, measure, pack
from tvm_sparse.plan import decide
from tvm_sparse.schedules.spec import KernelSpec

SHAPES = ((34816, 5120), (5120, 17408), (16480, 5120), (14336, 5120), (5120, 6144))
"""Projections of the 27B: gate and up, down, DeltaNet in, attention in, out."""


@dataclass(frozen=True)
class Options:
    shapes: tuple[tuple[int, int], ...]
    sparsities: tuple[float, ...]
    batches: tuple[int, ...]
    threads: tuple[int, ...]
    packed: str
    copies_bytes: int
    rounds: int
    fmt: str


def main(argv: Sequence[str]) -> None:
    options = parse(argv)
    rows = [row for threads in options.threads for row in measure_all(options, threads)]
    print(render(rows + geometric_means(rows), options.fmt, origin(argv)))


def parse(argv: Sequence[str]) -> Options:
    """Raises Refusal for anything it cannot read."""
    parser = CommandParser("bench kernels", __doc__.splitlines()[0])
    parser.add_argument("--target", default="cpu", help="cpu")
    parser.add_argument("--shapes", default=",".join(f"{n}x{k}" for n, k in SHAPES), help="NxK,...")
    parser.add_argument("--sparsity", default="0.5,0.75,0.9", help="shares of zeros, comma list")
    parser.add_argument("--batch", default="1,8", help="tokens at once, comma list")
    parser.add_argument("--threads", default="1,all", help="comma list of numbers, or all")
    parser.add_argument("--packed", default="auto", help="auto (what the plan chooses), bitmap, delta or dense")
    parser.add_argument("--copies", type=float, default=1.0, help="GB of rotating copies for each contender")
    parser.add_argument("--rounds", type=int, default=7, help="timed passes over all copies")
    parser.add_argument("--format", default="md", choices=("md", "csv", "json"))
    known = parser.parse_args(argv)
    if targets.parse_targets(known.target)[0].is_gpu:
        raise Refusal(f"bench kernels --target {known.target}: only cpu can be measured here so far")
    if known.packed not in ("auto", "bitmap", "delta", "dense"):
        raise Refusal(f"--packed {known.packed}: choose auto, bitmap, delta or dense")
    sparsities = _list(known.sparsity, float, "--sparsity")
    if not all(0 <= s < 1 for s in sparsities):
        raise Refusal(f"--sparsity {known.sparsity}: every share must be in [0, 1)")
    cores = len(os.sched_getaffinity(0))
    counts = ",".join(str(cores) if part == "all" else part for part in known.threads.split(","))
    whole = {
        "--batch": _list(known.batch, int, "--batch"),
        "--threads": tuple(dict.fromkeys(_list(counts, int, "--threads"))),
        "--rounds": (known.rounds,),
    }
    for flag, numbers in whole.items():
        if min(numbers) < 1:
            raise Refusal(f"{flag}: numbers from 1")
    shapes = tuple(_shape(part) for part in known.shapes.split(","))
    return Options(
        shapes, sparsities, whole["--batch"], whole["--threads"], known.packed,
        int(known.copies * 1e9), known.rounds, known.format,
    )  # fmt: skip


def _list(text: str, kind, flag: str) -> tuple:
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        raise Refusal(f"{flag} {text}: a comma list of numbers") from None


def _shape(text: str) -> tuple[int, int]:
    try:
        n, k = (int(part) for part in text.lower().split("x"))
    except ValueError:
        raise Refusal(f"--shapes {text}: write NxK, such as 5120x17408") from None
    if n < 1 or k < 1:
        raise Refusal(f"--shapes {text}: both sides from 1")
    return n, k


def measure_all(options: Options, threads: int) -> list[Row]:
    set_threads(threads)
    rows = []
    for shape in options.shapes:
        for sparsity in options.sparsities:
            weight = random_sparse(shape, sparsity)
            for batch in options.batches:
                rows.append(measure_one(options, threads, weight, sparsity, batch))
                if sys.stderr.isatty():
                    print(f"  {rows[-1]}", file=sys.stderr)
    return rows


def random_sparse(shape: tuple[int, int], sparsity: float, seed: int = 0) -> torch.Tensor:
    """Normal weights, each zero with the same probability."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
    for rows in weight.split(1024):
        rows[torch.rand(rows.shape, generator=generator) < sparsity] = 0
    return weight


def measure_one(options: Options, threads: int, weight: torch.Tensor, sparsity: float, batch: int) -> Row:
    n, k = weight.shape
    packed = pack(weight, _choice(options.packed, weight, batch))
    x = torch.randn(batch, k, generator=torch.Generator().manual_seed(1)).bfloat16()
    kernel = CpuKernel(KernelSpec(packed.choice, n, k, batch, "bfloat16", "bfloat16", "x86-64"))
    check(kernel, packed, x, weight)
    contenders = [
        _ours(kernel, packed, x, options.copies_bytes),
        _torch("torch bf16", x, weight, options.copies_bytes),
        _torch("torch f32", x.float(), weight.float(), options.copies_bytes),
    ]
    ours, *dense = race(contenders, options.rounds)
    best = min(dense, key=lambda times: times.median)
    return {
        "shape": f"{n}x{k}", "sparsity": sparsity, "batch": batch, "threads": threads,
        "format": str(packed.choice), "isa": kernel.isa,
        "us": ours.mean * 1e6, "spread us": ours.spread * 1e6, "MB": ours.nbytes / 1e6,
        "GB/s": ours.bandwidth / 1e9,
        **{f"{times.name} us": times.mean * 1e6 for times in dense},
        **{f"{times.name} spread us": times.spread * 1e6 for times in dense},
        "dense GB/s": best.bandwidth / 1e9, "ratio": ratio(best, ours),
    }  # fmt: skip


def _choice(packed: str, weight: torch.Tensor, batch: int):
    if packed == "auto":
        return decide("weight", measure(weight), (targets.MACHINES["cpu"],), batch).choice
    return FORMATS[packed].choice()


def check(kernel: CpuKernel, packed: Packed, x: torch.Tensor, weight: torch.Tensor) -> None:
    """Raises RuntimeError where y is further from float64 than bfloat16 rounding and float32 sums explain."""
    y = kernel(x, packed)
    x64 = x.double()
    for start in range(0, weight.shape[0], 1024):
        rows = weight[start : start + 1024].double()
        want = x64 @ rows.T
        allowed = want.abs() * 2**-8 + (x64.abs() @ rows.abs().T) * 2**-16
        if not bool(((y[:, start : start + 1024].double() - want).abs() <= allowed).all()):
            raise RuntimeError(f"{kernel.spec.name} on {kernel.isa}: wrong result in rows {start} and following")


def _ours(kernel: CpuKernel, packed: Packed, x: torch.Tensor, total: int) -> Contender:
    count = max(1, ceil(total / packed.nbytes))
    copies = [{name: t.clone() for name, t in packed.buffers.items()} for _ in range(count)]
    return Contender("ours", packed.nbytes, [kernel.bind(x, copy) for copy in copies])


def _torch(name: str, x: torch.Tensor, weight: torch.Tensor, total: int) -> Contender:
    copies = [weight.clone() for _ in range(max(1, ceil(total / weight.nbytes)))]
    return Contender(name, weight.nbytes, [partial(torch.nn.functional.linear, x, copy) for copy in copies])


def geometric_means(rows: Sequence[Row]) -> list[Row]:
    """One row for each sparsity, batch and number of threads: the ratio over the shapes."""
    groups: dict[tuple, list[float]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("sparsity", "batch", "threads"))
        groups.setdefault(key, []).append(float(row["ratio"]))  # type: ignore[arg-type]
    if max(len(group) for group in groups.values()) < 2:
        return []
    blank = dict.fromkeys(rows[0], "")
    return [
        {**blank, "shape": "geometric mean", "sparsity": key[0], "batch": key[1], "threads": key[2],
         "ratio": exp(sum(log(r) for r in group) / len(group))}
        for key, group in groups.items()
    ]  # fmt: skip


def origin(argv: Sequence[str]) -> dict[str, object]:
    """What was run, when and where."""
    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as facts:
            model = next(line.split(":", 1)[1].strip() for line in facts if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return {
        "command": " ".join(["python -m tvm_sparse.bench kernels", *argv]),
        "date": date.today().isoformat(),
        "machine": f"{model}, {len(os.sched_getaffinity(0))} cores",
        "torch": torch.__version__,
    }


__all__ = ["Options", "Times", "main", "parse"]
