"""What the user asked `build` for: parsed once, frozen, passed down."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tvm_sparse.command_line import CommandParser
from tvm_sparse.errors import Refusal
from tvm_sparse.folding.request import FoldRequest, add_fold_flags, read_fold_flags
from tvm_sparse.pruning import Pattern, parse_pattern
from tvm_sparse.targets import Machine, parse_targets

PRUNERS = ("magnitude", "wanda", "sparsegpt", "admm", "none")
CALIBRATED = ("wanda", "sparsegpt", "admm")  # by tvm_sparse.prune, which makes a checkpoint
DEFAULT_CONTEXT = 4096
DTYPES = ("bfloat16", "float32")


@dataclass(frozen=True)
class BuildConfig:
    """One build.

    `sparsity` is None only with prune "none", where the checkpoint's own zeros are measured; `context` is None where
    it was not asked for: DEFAULT_CONTEXT then, or less where the model ends earlier.
    """

    model: str
    sparsity: float | None
    weights: str
    prune: str
    granularity: str
    pattern: Pattern
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    targets: tuple[Machine, ...]
    dtype: str
    context: int | None
    batch: int
    seed: int
    fold: FoldRequest
    out: Path

    @property
    def device(self) -> str:
        return self.targets[0].device


def parse_build(argv: Sequence[str]) -> BuildConfig:
    """argv -> BuildConfig. Raises Refusal for whatever can be known to be wrong before any work."""
    parser = CommandParser("build", "Compile a weight-sparse Qwen3.5 into a library and packed weights.")
    add = parser.add_argument
    add("--model", required=True, help="registered name, local folder or hub id")
    add("--sparsity", type=float, help="share of zeros in every pruned matrix, in [0, 1); 0 builds dense")
    add("--weights", default="auto", help="auto, a folder, a hub id, or synthetic")
    add("--prune", default="magnitude", choices=PRUNERS, help="none: sparse already, measured as it is")
    add("--granularity", default="matrix", choices=("matrix", "row"), help="what the share of zeros holds for")
    add("--pattern", default="unstructured", help="unstructured, N:M or block:RxC")
    add("--include", action="append", default=[], metavar="REGEX", help="prune these checkpoint names too")
    add("--exclude", action="append", default=[], metavar="REGEX", help="do not prune these; wins over --include")
    add("--target", default="b200", help="comma list of b200, h200, h100, cpu, or auto")
    add("--dtype", default="bfloat16", choices=DTYPES, help="of activations and caches")
    add("--context", type=int, default=argparse.SUPPRESS, help="largest context in tokens (default: 4096, or less "
        "where the model ends earlier)")  # fmt: skip
    add("--batch", type=int, default=1, help="sequences decoded together")
    add("--seed", type=int, default=0, help="of synthetic weights")
    add_fold_flags(parser)
    add("--out", type=Path, help="the artefact (default dist/MODEL-sSPARSITY-TARGET)")
    args = parser.parse_args(argv)

    if args.prune in CALIBRATED:
        raise Refusal(
            f"--prune {args.prune} calibrates on a text: run python -m tvm_sparse.prune --model {args.model} "
            f"--sparsity {args.sparsity or 0.75:g} --prune {args.prune} --text FILE --out DIR, "
            "then build --model DIR --prune none"
        )
    if args.sparsity is None and args.prune != "none":
        raise Refusal("--sparsity is missing: give the share of zeros, or --prune none for a sparse checkpoint")
    if args.sparsity is not None and args.prune == "none":
        raise Refusal("--prune none keeps the checkpoint's own zeros: leave --sparsity out, or choose a method")
    if args.sparsity is not None and not 0 <= args.sparsity < 1:
        raise Refusal(f"--sparsity {args.sparsity:g} is outside [0, 1): 0.75 makes three weights of four zero")
    context = getattr(args, "context", None)
    for flag, value in (("context", context), ("batch", args.batch)):
        if value is not None and value < 1:
            raise Refusal(f"--{flag} {value} must be at least 1")
    for expression in (*args.include, *args.exclude):
        _check_expression(expression)

    targets = parse_targets(args.target)
    fold = read_fold_flags(args)
    return BuildConfig(
        model=args.model,
        sparsity=args.sparsity,
        weights=args.weights,
        prune=args.prune,
        granularity=args.granularity,
        pattern=parse_pattern(args.pattern, args.sparsity),
        include=tuple(args.include),
        exclude=tuple(args.exclude),
        targets=targets,
        dtype=args.dtype,
        context=context,
        batch=args.batch,
        seed=args.seed,
        fold=fold,
        out=args.out or _default_out(args.model, args.sparsity, targets, fold),
    )


def _check_expression(expression: str) -> None:
    try:
        re.compile(expression)
    except re.error as bad:
        raise Refusal(f"{expression!r} is not a regular expression ({bad}): --include and --exclude take one") from bad


def _default_out(model: str, sparsity: float | None, targets: tuple[Machine, ...], fold: FoldRequest) -> Path:
    name = model.rstrip("/").rsplit("/", 1)[-1].lower()
    share = "asis" if sparsity is None else f"{sparsity:g}"
    folded = "" if fold.off else "-folded"
    return Path("dist") / f"{name}-s{share}-{'+'.join(machine.name for machine in targets)}{folded}"
