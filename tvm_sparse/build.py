"""`python -m tvm_sparse.build`: a checkpoint goes in, one folder with a compiled library and packed weights comes out.

configuration -> checkpoint -> fold -> layout -> pruning -> plan and packed buffers -> library -> report
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tvm_sparse.artefact.reader import FACTS, LIBRARY
from tvm_sparse.artefact.versions import installed
from tvm_sparse.artefact.writer import write_json
from tvm_sparse.checkpoint import Checkpoint, WeightsUnavailable, model_config, open_checkpoint
from tvm_sparse.config import DEFAULT_CONTEXT, BuildConfig, parse_build
from tvm_sparse.errors import Refusal, run_command
from tvm_sparse.folding.decide import Fold, check_fold, decide_fold
from tvm_sparse.folding.residence import residence
from tvm_sparse.formats import FORMATS
from tvm_sparse.layout import Layout, make_layout
from tvm_sparse.models.config import ModelConfig
from tvm_sparse.packing import pack_model, packing_device
from tvm_sparse.plan import Plan, declared
from tvm_sparse.progress import DEBUG, Phases, peak_memory
from tvm_sparse.pruning import PrunedWeights, Pruner, select

LIBRARY_FACTS = "library.json"


def main(argv: Sequence[str]) -> None:
    config = parse_build(argv)
    build(config)
    print(config.out)


def build(config: BuildConfig) -> None:
    """Builds the artefact `config.out`.

    Raises Refusal before anything is written, and Stopped where finished work is kept: a full disk, or no weights
    (the library is built for the declared sparsity all the same).
    """
    phases = Phases()
    config, model, selected = _prepare(config)
    pruner = Pruner(config.prune, config.sparsity, config.pattern, config.granularity)
    with phases.phase("open the checkpoint"):
        missing, checkpoint = _open(config, model)
    if checkpoint is None:
        _without_weights(config, model, selected, phases, str(missing))
        raise WeightsUnavailable(f"{config.out / LIBRARY} is built and kept, its weights are missing: {missing}")

    if line := checkpoint.dropped_line():
        print(f"  {line}", file=sys.stderr)
    model = replace(model, eos_token_ids=checkpoint.config.eos_token_ids)
    with phases.phase("fold"):
        fold = decide_fold(config.fold, model, checkpoint, str(packing_device()))
    layout = make_layout(model, fold.schedule)
    with phases.phase("prune and pack"):
        weights = PrunedWeights(fold.weights(checkpoint), pruner, selected, packing_device())
        plan = _pack(config, layout, weights, _declare(config, model, layout, selected).nbytes)
    if DEBUG >= 2:
        print(plan, file=sys.stderr)
    _compile(config, model, layout, plan, phases)
    negative = sum(zeros.negative_zeros for zeros in weights.zeros.values())
    notes = [line for line in (checkpoint.dropped_line(),) if line]
    notes += [f"{negative} weights were -0.0 and are +0.0"] if negative else []
    _finish(config, _report(config, model, fold, plan, checkpoint.origin, phases, notes), model, layout, checkpoint)


def build_library(config: BuildConfig) -> None:
    """`config.out` with the library and its report alone, for the declared sparsity. Raises Refusal as `build` does."""
    config, model, selected = _prepare(config)
    _without_weights(config, model, selected, Phases(), "none were asked for")


def _prepare(config: BuildConfig) -> tuple[BuildConfig, ModelConfig, tuple[str, ...]]:
    """What is known before any work, the context filled in."""
    model = model_config(config.model)
    config = replace(config, context=_context(config, model))
    check_fold(config.fold, model)
    selected = select(model, config.include, config.exclude)
    _require_machines(config)
    return config, model, selected


def _without_weights(
    config: BuildConfig, model: ModelConfig, selected: Sequence[str], phases: Phases, missing: str
) -> None:
    if config.sparsity is None:
        raise Refusal(f"--prune none measures the checkpoint's zeros, and there is none: {missing}")
    fold = decide_fold(config.fold, model, None, "cpu")
    layout = make_layout(model, fold.schedule)
    plan = _declare(config, model, layout, selected)
    _compile(config, model, layout, plan, phases)
    _finish(config, _report(config, model, fold, plan, {"kind": "none"}, phases, [missing]), model, layout, None)


def _require_machines(config: BuildConfig) -> None:
    """Everything the machine must have, and a place to write to: asked for before any work."""
    if config.device == "cuda":
        from tvm_sparse.codegen.cuda_toolkit import find_toolkit

        find_toolkit()
    if config.out.exists() and not config.out.is_dir():
        raise Refusal(f"{config.out} is a file: give --out a folder")
    known = (FACTS, LIBRARY, "params.json", "params.journal")
    if config.out.is_dir() and any(config.out.iterdir()) and not any((config.out / name).exists() for name in known):
        raise Refusal(f"{config.out} holds other things than an artefact: give --out an empty or a new folder")


def _context(config: BuildConfig, model: ModelConfig) -> int:
    limit = model.max_position_embeddings
    if config.context is not None and config.context > limit:
        raise Refusal(f"--context {config.context} is over the model's {limit} positions: ask for at most {limit}")
    return config.context or min(DEFAULT_CONTEXT, limit)


def _open(config: BuildConfig, model: ModelConfig) -> tuple[WeightsUnavailable | None, Checkpoint | None]:
    try:
        return None, open_checkpoint(config.weights, model, model=config.model, seed=config.seed)
    except WeightsUnavailable as missing:
        return missing, None


def _formats(config: BuildConfig) -> tuple[str, ...]:
    """The formats the plan may choose from: --sparsity 0 is the dense model, whatever zeros it happens to have."""
    return ("dense",) if config.sparsity == 0 else tuple(FORMATS)


def _blocks(config: BuildConfig) -> tuple[tuple[int, int], ...]:
    pattern = config.pattern
    return ((pattern.rows, pattern.cols),) if pattern.kind == "block" else ((16, 16),)


def _declare(config: BuildConfig, model: ModelConfig, layout: Layout, selected: Sequence[str]) -> Plan:
    return declared(
        model, layout, selected, config.sparsity or 0.0, config.pattern, config.targets, config.batch, _formats(config)
    )


def _pack(config: BuildConfig, layout: Layout, weights: PrunedWeights, expected: int) -> Plan:
    """Packs into OUT; weights that cannot be packed leave no new folder behind."""
    fresh = not config.out.exists()
    try:
        return pack_model(
            config.out, _fingerprint(config, layout, weights.checkpoint), layout, weights, config.targets, config.batch,
            _blocks(config), _formats(config), expected,
        )  # fmt: skip
    except Refusal:
        if fresh:
            shutil.rmtree(config.out, ignore_errors=True)
        raise


def _fingerprint(config: BuildConfig, layout: Layout, checkpoint: Checkpoint) -> str:
    """Everything the packed bytes depend on: another one does not resume what an earlier build left."""
    facts = {
        "versions": installed(),
        "checkpoint": checkpoint.fingerprint(),
        "layers": sorted(set(layout.schedule)),
        "pruning": _pruning(config),
        "targets": [machine.name for machine in config.targets],
        "batch": config.batch,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def _fold(config: BuildConfig, model: ModelConfig, fold: Fold, plan: Plan) -> dict[str, Any]:
    if config.fold.off:
        return {}
    again = residence(model.layer_types, fold.schedule, plan, config.targets, config.batch)
    return {**fold.facts, "residence": again}


def _pruning(config: BuildConfig) -> dict[str, Any]:
    return {
        "method": config.prune,
        "sparsity": config.sparsity,
        "granularity": config.granularity,
        "pattern": str(config.pattern),
        "include": list(config.include),
        "exclude": list(config.exclude),
    }


def _compile(config: BuildConfig, model: ModelConfig, layout: Layout, plan: Plan, phases: Phases) -> None:
    """lib.so and library.json in OUT; what an earlier build made of the same plan is kept."""
    choices = {name: [str(entry.choice), entry.shape] for name, entry in plan.items()}
    facts = [
        installed(), model.to_json(), layout.schedule, choices, config.dtype, config.batch,
        [machine.name for machine in config.targets],
    ]  # fmt: skip
    fingerprint = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    path = config.out / LIBRARY
    if path.exists() and _library_facts(config.out).get("fingerprint") == fingerprint:
        return
    with phases.phase("compile"):
        from tvm_sparse.library import compile_library

        config.out.mkdir(parents=True, exist_ok=True)
        partial = config.out / "partial.so"  # the linker goes by the ending
        try:
            library = compile_library(partial, model, layout, plan, config.targets, config.dtype, config.batch)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        write_json(config.out / LIBRARY_FACTS, {"fingerprint": fingerprint, **library.to_json()})


def _library_facts(folder: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((folder / LIBRARY_FACTS).read_text())
    except (OSError, ValueError):
        return {}
    return found


def _finish(config: BuildConfig, report: dict[str, Any], model: ModelConfig, layout: Layout,
            checkpoint: Checkpoint | None) -> None:  # fmt: skip
    """Side files, report and, last of all, tvm_sparse.json, which makes the folder an artefact."""
    from tvm_sparse.library import describe
    from tvm_sparse.report import write_report

    for name, path in (checkpoint.side_files() if checkpoint else {}).items():
        shutil.copyfile(path, config.out / name)
    write_report(config.out, report)
    described = describe(model, layout, config.device, config.dtype, config.batch, config.context or 0)
    keep = ("versions", "model", "targets", "pruning", "weights")
    write_json(config.out / FACTS, {
        **{key: report[key] for key in keep},
        **described,
        "params": _library_facts(config.out)["params"],
        "workspace": _library_facts(config.out)["workspace"],
        "plan": {row["param"]: row["format"] for row in report["matrices"]},
    })  # fmt: skip


def _report(config: BuildConfig, model: ModelConfig, fold: Fold, plan: Plan, weights: dict[str, Any], phases: Phases,
            notes: list[str]) -> dict[str, Any]:  # fmt: skip
    from tvm_sparse.report import make_report

    facts = {
        "model": config.model,
        "versions": installed(),
        "targets": [machine.name for machine in config.targets],
        "dtype": config.dtype,
        "batch": config.batch,
        "context": config.context,
        "pruning": _pruning(config),
        "fold": _fold(config, model, fold, plan),
        "seconds": phases.seconds,
        "peak_memory": peak_memory(),
        "notes": notes,
    }
    return make_report(facts, plan, _library_facts(config.out), config.targets, weights)


if __name__ == "__main__":
    sys.exit(run_command(main))
