"""What report.md says of a fold."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tvm_sparse.folding.ranges import spelled


def fold_lines(fold: dict[str, Any]) -> list[str]:
    """Markdown of the report's `fold`; nothing where nothing was asked."""
    return [*_decided(fold), *_resident(fold["residence"])] if fold else []


def _decided(fold: dict[str, Any]) -> Iterator[str]:
    yield from ("", "## Folding", "")
    yield f"- {fold['executed']} layers are executed, with the weights of {fold['layers']}: {fold['schedule']}"
    weights = fold["asked"]["weights"]
    for tie in fold.get("ties", ()):
        whose = "the mean of their weights" if weights == "mean" else f"the weights of layer {tie['weights']}"
        yield f"- {tie['kind']} layers {spelled(tie['layers'])} run with {whose}"
        if errors := tie.get("errors"):
            tried = ", ".join(f"{layer}: {error:.3f}" for layer, error in errors.items())
            yield f"  - squared error of what they add, with each layer's weights: {tried}"
    for kind, largest in fold.get("similarity", {}).items():
        a, b = largest["layers"]
        yield f"- most similar {kind} layers as weights: {a} and {b}, cosine {largest['cosine']:.4f}"
    if outputs := fold.get("outputs"):
        a, b = outputs["layers"]
        compared = f"most similar of {outputs['compared']} pairs compared on the text"
        yield f"- {compared}: layers {a} and {b}, {outputs['similarity']:.4f}"
    if "nothing" in fold:
        yield f"- nothing was folded: {fold['nothing']}"


def _resident(layers: list[dict[str, Any]]) -> Iterator[str]:
    """Whether weights that run again are still in the cache: MB, microseconds."""
    if not layers:
        return
    yield ""
    yield (
        "Weights that run again, expected: a use finds them in the cache where no more than it holds has passed since "
        "the use before. `first` is a use from memory, `later` one from the cache, `saved` of a whole token."
    )
    yield ""
    heads = ("weights", "uses", "MB", "MB from use to use", "machine", "cache holds", "found", "first us", "later us",
             "saved us", "")  # fmt: skip
    yield f"| {' | '.join(heads)} |"
    yield "|---" * len(heads) + "|"
    for row in layers:
        between = ", ".join(f"{int(size) / 1e6:.1f} ({times}x)" for size, times in row["between"].items())
        for machine, facts in row["machines"].items():
            times = " | ".join(f"{facts[key] * 1e6:.1f}" for key in ("first", "later", "saved"))
            holds = f"{facts['holds'] / 1e6:.0f} of {facts['l2'] / 1e6:.0f} MB"
            yield (
                f"| {row['kind']} {row['layer']} | {row['uses']} | {row['bytes'] / 1e6:.1f} | {between} | {machine} "
                f"| {holds} | {facts['found']} of {row['uses'] - 1} | {times} | {_fit(facts)} |"
            )


def _fit(facts: dict[str, Any]) -> str:
    if "part" not in facts:
        return "fits"
    from_sparsity = facts["from_sparsity"]
    alone = f"from {from_sparsity:.0%} zeros on" if from_sparsity is not None else "at no sparsity"
    return f"does not fit: {facts['part']:.0%} of it would, all of it {alone}"
