"""What `tune` is asked for, parsed once, and the kernels that follow from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tvm_sparse import targets
from tvm_sparse.bench.options import blank_spec, model_shapes, numbers, read_shapes, read_sparsities
from tvm_sparse.command_line import CommandParser
from tvm_sparse.errors import Refusal
from tvm_sparse.formats import FORMATS
from tvm_sparse.plan import decide, expected_stats
from tvm_sparse.schedules.product import product
from tvm_sparse.schedules.records import TUNING_LOGS
from tvm_sparse.schedules.spec import KernelSpec

BATCHES, SPARSITIES, TRIALS = "1,2,4,8,16", "0.5,0.75,0.9", 16


@dataclass(frozen=True)
class Server:
    """A tracker of TVM's RPC and the key under which the machine to tune for stands there."""

    host: str
    port: int
    key: str


@dataclass(frozen=True)
class TuneOptions:
    machine: targets.Machine
    shapes: tuple[tuple[int, int], ...]
    batches: tuple[int, ...]
    sparsities: tuple[float, ...]
    formats: tuple[str, ...]
    trials: int
    resume: bool
    out: Path
    server: Server | None
    jobs: int


def parse(argv: Sequence[str]) -> TuneOptions:
    """Raises Refusal for anything it cannot read."""
    parser = CommandParser("tune", "Search the schedules of a model's kernels, and keep what was measured.")
    add = parser.add_argument
    add("--target", required=True, help="the machine that measures: h200, b200, cpu, ..., or auto")
    add("--model", default="qwen3.5-27b", help="registered name, folder or hub id whose projections are tuned")
    add("--shapes", default="", help="NxK,... in the place of the model's")
    add("--batch", default=BATCHES, help="tokens at once, comma list")
    add("--sparsity", default=SPARSITIES, help="shares of zeros, comma list; the plan chooses the format of each")
    add("--formats", default="auto", help="comma list of the formats that the plan may choose from")
    add("--trials", type=int, default=TRIALS, help="schedules of each kernel that are measured")
    add("--resume", action="store_true", help="go on with what stands in the folder")
    add("--out", default="", help="folder of the records (default: tuning_logs/ of the target)")
    add("--rpc", default="", metavar="HOST:PORT/KEY", help="measure on a machine that TVM's RPC tracker knows")
    add("--jobs", type=int, default=0, help="kernels built at the same time; 0: as many as there are cores")
    known = parser.parse_args(argv)
    machines = targets.parse_targets(known.target)
    if len(machines) > 1:
        raise Refusal(f"--target {known.target}: tune for one machine at a time")
    formats = tuple(FORMATS) if known.formats == "auto" else tuple(known.formats.split(","))
    if unknown := [name for name in formats if name not in FORMATS]:
        raise Refusal(f"--formats {', '.join(unknown)}: choose from {', '.join(FORMATS)}")
    for flag, number, least in (("--trials", known.trials, 1), ("--jobs", known.jobs, 0)):
        if number < least:
            raise Refusal(f"{flag} {number}: at least {least}")
    return TuneOptions(
        machine=machines[0],
        shapes=read_shapes(known.shapes) if known.shapes else model_shapes(known.model),
        batches=numbers("--batch", known.batch),
        sparsities=read_sparsities(known.sparsity),
        formats=formats,
        trials=known.trials,
        resume=known.resume,
        out=Path(known.out) if known.out else TUNING_LOGS / machines[0].logs,
        server=_server(known.rpc) if known.rpc else None,
        jobs=known.jobs,
    )


def _server(text: str) -> Server:
    address, _, key = text.partition("/")
    host, _, port = address.rpartition(":")
    if not (host and port.isdigit() and key):
        raise Refusal(f"--rpc {text}: write HOST:PORT/KEY, such as 10.0.0.5:9190/h200")
    return Server(host, int(port), key)


def workloads(options: TuneOptions, arch: str) -> dict[KernelSpec, tuple[float, ...]]:
    """The kernels that the plan would use, each with the shares of zeros it serves: it is timed on all of them.

    Where a product decodes its matrix for every number of tokens asked for, the format's own kernel never runs.
    """
    found: dict[KernelSpec, tuple[float, ...]] = {}
    for shape in options.shapes:
        for sparsity in options.sparsities:
            stats = expected_stats(shape, 1 - sparsity)
            for batch in options.batches:
                entry = decide("weight", stats, (options.machine,), batch, options.formats)
                spec = replace(blank_spec(entry.choice, shape, batch, options.machine), arch=arch)
                made = product(spec)
                if made is None or made.decode is None or made.few is not None:
                    found[spec] = (*found.get(spec, ()), sparsity)
    return found
