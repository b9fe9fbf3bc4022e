"""The fold: what was asked, held against the model and its weights, becomes a layer schedule."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tvm_sparse.checkpoint import Checkpoint
from tvm_sparse.checkpoint.folder import FolderCheckpoint
from tvm_sparse.errors import Refusal
from tvm_sparse.folding.averaged import AveragedCheckpoint
from tvm_sparse.folding.ranges import KINDS, executed_layers, spelled, tied_layers
from tvm_sparse.folding.request import FoldRequest
from tvm_sparse.folding.reuse import Reuse
from tvm_sparse.folding.similar import alike_as_weights, layer_cosines, runs
from tvm_sparse.models.config import ModelConfig
from tvm_sparse.pruning.calibration import calibration


@dataclass(frozen=True)
class Tie:
    """Layers of one kind that all run with the weights of one of them."""

    layers: tuple[int, ...]
    weights: int


@dataclass(frozen=True)
class Fold:
    """`schedule` is the layout's; of `averaged` ties the one layer has the mean of all. `facts` are for the report."""

    schedule: tuple[int, ...]
    ties: tuple[Tie, ...] = ()
    averaged: bool = False
    facts: dict[str, Any] = field(default_factory=dict)

    def weights(self, checkpoint: Checkpoint) -> Checkpoint:
        """The checkpoint to take the schedule's layers from."""
        return AveragedCheckpoint(checkpoint, [tie.layers for tie in self.ties]) if self.averaged else checkpoint


def check_fold(request: FoldRequest, config: ModelConfig) -> None:
    """Raises Refusal for layers that this model does not have or that do not go together."""
    tied_layers(config, request.ranges)
    executed_layers(config, request.layers or ())


def decide_fold(request: FoldRequest, config: ModelConfig, checkpoint: Checkpoint | None, device: str) -> Fold:
    """`checkpoint` is None where no weights are to be had: then only what needs none can be done.

    `device` runs the calibration text. Raises Refusal.
    """
    executed = executed_layers(config, request.layers) if request.layers else tuple(range(config.num_hidden_layers))
    facts: dict[str, Any] = {"asked": request.to_json()}
    groups = tied_layers(config, request.ranges)
    reuse = _reuse(request, config, checkpoint, groups, device)
    if request.auto:
        if checkpoint is None:
            raise Refusal("--fold auto compares weights, and there are none: name the layers, --fold 8:24")
        groups = _alike(request, config, checkpoint, reuse, facts)
    ties = tuple(Tie(layers, _weights(request, layers, reuse)) for layers in groups)
    if ties:
        facts["ties"] = [_tie_facts(config, tie, reuse) for tie in ties]
    uses = {layer: tie.weights for tie in ties for layer in tie.layers}
    schedule = tuple(uses.get(layer, layer) for layer in executed)
    facts |= {"executed": len(schedule), "layers": len(set(schedule)), "schedule": spelled(schedule)}
    return Fold(schedule, ties, request.weights == "mean" and bool(ties), facts)


def _reuse(
    request: FoldRequest, config: ModelConfig, checkpoint: Checkpoint | None, groups: Sequence[Sequence[int]],
    device: str,
) -> Reuse | None:  # fmt: skip
    if request.text is None:
        return None
    if not isinstance(checkpoint, FolderCheckpoint):
        raise Refusal("--calibration runs the model, and there are no trained weights to run: leave it out")
    places = range(config.num_hidden_layers) if request.auto else sorted({i for group in groups for i in group})
    try:
        text = calibration(request.text, checkpoint.folder, config, request.samples, request.length, seed=0)
    except Refusal as refusal:  # it speaks of prune's flags
        said = str(refusal).replace("--text", "--calibration")
        for flag in ("samples", "length"):
            said = said.replace(f"--{flag}", f"--calibration-{flag}")
        raise Refusal(said) from None
    return Reuse(checkpoint, text.ids, places, device)


def _alike(
    request: FoldRequest, config: ModelConfig, checkpoint: Checkpoint, reuse: Reuse | None, facts: dict[str, Any]
) -> tuple[tuple[int, ...], ...]:
    """Neighbours of one kind that are alike: by their outputs on the text where there is one, else as weights."""
    cosines = layer_cosines(checkpoint)
    facts["similarity"] = {KINDS[kind]: found["largest"] for kind, found in cosines.items()}
    outputs: dict[tuple[int, int], float] = {}

    def alike_as_outputs(a: int, b: int) -> bool:
        outputs[a, b] = reuse.similarity(a, b) if reuse is not None else 0.0
        return outputs[a, b] >= request.threshold

    alike = alike_as_weights(checkpoint, cosines, request.threshold) if reuse is None else alike_as_outputs
    groups: list[tuple[int, ...]] = []
    for kind in cosines:
        groups += runs([i for i, other in enumerate(config.layer_types) if other == kind], alike)
    if outputs:
        pair = max(outputs, key=lambda pair: outputs[pair])
        facts["outputs"] = {"layers": list(pair), "similarity": outputs[pair], "compared": len(outputs)}
    if not groups:
        facts["nothing"] = _nothing_alike(facts, request.threshold)
        print(f"  --fold auto folds nothing: {facts['nothing']}", file=sys.stderr)
    return tuple(sorted(groups))


def _nothing_alike(facts: dict[str, Any], threshold: float) -> str:
    """One line: what was the most similar, and what would have been enough."""
    parts = [
        f"cosine {found['cosine']:.3f} of {kind} layers {found['layers'][0]} and {found['layers'][1]}"
        for kind, found in facts["similarity"].items()
    ]
    if outputs := facts.get("outputs"):
        a, b = outputs["layers"]
        parts.append(f"{outputs['similarity']:.3f} of the outputs of layers {a} and {b}")
    highest = f"the highest similarity is {', '.join(parts)}" if parts else "no kind has two layers"
    return f"{highest}; it takes {threshold:g}"


def _weights(request: FoldRequest, layers: tuple[int, ...], reuse: Reuse | None) -> int:
    return reuse.best(layers) if request.weights == "best" and reuse is not None else layers[0]


def _tie_facts(config: ModelConfig, tie: Tie, reuse: Reuse | None) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "kind": KINDS[config.layer_types[tie.layers[0]]],
        "layers": list(tie.layers),
        "weights": tie.weights,
    }
    if reuse is not None:
        facts["errors"] = {str(layer): reuse.error(layer, tie.layers) for layer in tie.layers}
    return facts
