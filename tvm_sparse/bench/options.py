"""What `bench kernels` is asked to measure."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from tvm_sparse import targets
from tvm_sparse.checkpoint import model_config
from tvm_sparse.command_line import CommandParser
from tvm_sparse.errors import Refusal
from tvm_sparse.formats import FORMATS, FormatChoice
from tvm_sparse.layout import make_layout
from tvm_sparse.schedules.spec import KernelSpec

MANY = 64
"""More tokens than this are a prompt: the kernel is the one for any number of them."""


@dataclass(frozen=True)
class Options:
    machine: targets.Machine
    shapes: tuple[tuple[int, int], ...]
    sparsities: tuple[float, ...]
    batches: tuple[int, ...]
    threads: tuple[int, ...]  # CPU
    packed: str
    copies_bytes: int  # CPU
    rounds: int
    fmt: str
    library: str = ""
    build_library: str = ""
    out: str = ""


def parse(argv: Sequence[str]) -> Options:
    """Raises Refusal for anything it cannot read."""
    parser = CommandParser("bench kernels", "Sparse matmuls against the fastest dense one of the same run.")
    parser.add_argument("--target", default="cpu", help="cpu, h200, ...")
    parser.add_argument("--model", default="qwen3.5-27b", help="registered name, folder or hub id: its projections")
    parser.add_argument("--shapes", default="", help="NxK,... in the place of the model's")
    parser.add_argument("--sparsity", default="0.5,0.75,0.9", help="shares of zeros, comma list")
    parser.add_argument("--batch", default="", help=f"tokens at once, comma list; more than {MANY} are a prompt "
                        "(default: 1,8 on a CPU, 1,2,4,8,16,2048 on a GPU)")
    parser.add_argument("--threads", default="1,all", help="comma list of numbers, or all")
    parser.add_argument("--packed", default="auto", help="auto (what the plan chooses), or a format")
    parser.add_argument("--copies", type=float, default=1.0, help="GB of rotating copies for each contender")
    parser.add_argument("--rounds", type=int, default=7, help="timed passes over all copies")
    parser.add_argument("--library", default="", help="GPU: the kernels, built by --build-library with the same flags")
    parser.add_argument("--build-library", default="", help="GPU: write the kernels to this file and stop")
    parser.add_argument("--format", default="md", choices=("md", "csv", "json"), help="of what is printed")
    parser.add_argument("--out", default="", help="folder whose kernels.json, .md, .csv and .svg take the rows too")
    known = parser.parse_args(argv)
    machine = targets.parse_targets(known.target)[0]
    if not machine.is_gpu and (known.library or known.build_library):
        raise Refusal("bench kernels --library, --build-library: only a GPU's kernels are built apart from their run")
    if known.packed not in ("auto", *FORMATS):
        raise Refusal(f"--packed {known.packed}: choose auto, {', '.join(FORMATS)}")
    sparsities = read_sparsities(known.sparsity)
    cores = len(os.sched_getaffinity(0))
    counts = ",".join(str(cores) if part == "all" else part for part in known.threads.split(","))
    usual = "1,2,4,8,16,2048" if machine.is_gpu else "1,8"
    batches, threads = numbers("--batch", known.batch or usual), numbers("--threads", counts)
    (rounds,) = numbers("--rounds", str(known.rounds))
    shapes = read_shapes(known.shapes) if known.shapes else model_shapes(known.model)
    return Options(
        machine, shapes, sparsities, batches, tuple(dict.fromkeys(threads)), known.packed,
        int(known.copies * 1e9), rounds, known.format, known.library, known.build_library, known.out,
    )  # fmt: skip


def model_shapes(model: str) -> tuple[tuple[int, int], ...]:
    """[N, K] of the model's fused projections, each once, largest first."""
    layout = make_layout(model_config(model))
    shapes = {(param.shape[0], param.shape[1]) for param in layout.params if param.kind == "projection"}
    return tuple(sorted(shapes, key=lambda shape: (-shape[0] * shape[1], shape)))


def read_shapes(text: str) -> tuple[tuple[int, int], ...]:
    return tuple(_shape(part) for part in text.split(","))


def read_sparsities(text: str) -> tuple[float, ...]:
    found = _list(text, float, "--sparsity")
    if not all(0 <= share < 1 for share in found):
        raise Refusal(f"--sparsity {text}: every share must be in [0, 1)")
    return found


def numbers(flag: str, text: str) -> tuple[int, ...]:
    found = _list(text, int, flag)
    if min(found) < 1:
        raise Refusal(f"{flag} {text}: numbers from 1")
    return found


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


def blank_spec(choice: FormatChoice, shape: tuple[int, int], batch: int, machine: targets.Machine) -> KernelSpec:
    """The kernel of one measurement: bfloat16 in and out."""
    return KernelSpec(choice, *shape, None if batch > MANY else batch, "bfloat16", "bfloat16", machine.arch)
