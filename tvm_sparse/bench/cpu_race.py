"""`bench kernels` on a CPU: the packed matmul against the faster of torch's bfloat16 and float32 `F.linear`.

Every contender has its own rotating copies, 1 GB of them, so that what is read comes from memory as it does in a model.
Results are checked against float64 first.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator
from functools import partial
from math import ceil

import torch

from tvm_sparse import targets
from tvm_sparse.bench.cpu_kernel import CpuKernel, compiled, set_threads
from tvm_sparse.bench.options import Options, blank_spec
from tvm_sparse.bench.tables import Row
from tvm_sparse.bench.timing import Contender, race, ratio
from tvm_sparse.formats import FORMATS, Packed, measure, pack
from tvm_sparse.plan import decide
from tvm_sparse.schedules.records import Records


def measure_all(options: Options, threads: int) -> Iterator[Row]:
    set_threads(threads)
    for shape in options.shapes:
        for sparsity in options.sparsities:
            weight = random_sparse(shape, sparsity)
            for batch in options.batches:
                row = measure_one(options, threads, weight, sparsity, batch)
                if sys.stderr.isatty():
                    print(f"  {row}", file=sys.stderr)
                yield row


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
    spec = blank_spec(packed.choice, (n, k), batch, options.machine)
    kernel = compiled(spec, Records(options.machine).tuned(spec))
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
    if (row := first_wrong(kernel(x, packed), x, weight)) is not None:
        raise RuntimeError(f"{kernel.spec.name} on {kernel.isa}: wrong result in rows {row} and following")


def first_wrong(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> int | None:
    """The first row of a block of W's rows with a result that bfloat16 rounding and float32 sums do not explain."""
    x64 = x.double()
    for start in range(0, weight.shape[0], 1024):
        rows = weight[start : start + 1024].double()
        want = x64 @ rows.T
        allowed = want.abs() * 2**-8 + (x64.abs() @ rows.abs().T) * 2**-16
        if not bool(((y[:, start : start + 1024].double() - want).abs() <= allowed).all()):
            return start
    return None


def _ours(kernel: CpuKernel, packed: Packed, x: torch.Tensor, total: int) -> Contender:
    count = max(1, ceil(total / packed.nbytes))
    copies = [{name: t.clone() for name, t in packed.buffers.items()} for _ in range(count)]
    return Contender("ours", packed.nbytes, [kernel.bind(x, copy) for copy in copies])


def _torch(name: str, x: torch.Tensor, weight: torch.Tensor, total: int) -> Contender:
    copies = [weight.clone() for _ in range(max(1, ceil(total / weight.nbytes)))]
    return Contender(name, weight.nbytes, [partial(torch.nn.functional.linear, x, copy) for copy in copies])


def cpu_name() -> str:
    """The processor's model and how many cores of it this process may use."""
    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as facts:
            model = next(line.split(":", 1)[1].strip() for line in facts if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{model}, {len(os.sched_getaffinity(0))} cores"


def machine() -> dict[str, object]:
    return {"machine": cpu_name(), "torch": torch.__version__}
