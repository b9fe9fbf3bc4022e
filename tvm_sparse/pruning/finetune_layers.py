"""Recovery layer by layer, in the memory of one: each layer's kept weights learn the dense layer's outputs.

EBFT (Guo et al. 2024, "EBFT: Effective and Block-Wise Fine-Tuning for Sparse LLMs"): the layer's inputs are the tuned
model's so far, the outputs to reach those of the dense model, and the loss their squared distance over the square of
what is to be reached. Hidden states of both models stay on the host, samples x length x hidden x 8 bytes.

A finished layer has "tuned" in its matrices' facts in the journal; an interrupted run goes on behind it. What is about
to be written is saved beside the files first, so that a torn matrix is written again and not tuned twice.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from tvm_sparse.checkpoint.folder import FolderCheckpoint
from tvm_sparse.errors import Refusal
from tvm_sparse.progress import bar
from tvm_sparse.pruning.decoder import Decoder
from tvm_sparse.pruning.distillation import mixed_precision
from tvm_sparse.pruning.layerwise import layer_of
from tvm_sparse.pruning.rewrite import CheckpointCopy
from tvm_sparse.pruning.teaching import Finetune, Teaching, new_matrices


def finetune_layers(
    copy: CheckpointCopy, teacher: FolderCheckpoint, names: tuple[str, ...], windows: torch.Tensor, how: Finetune,
    device: str,
) -> dict[str, Any]:  # fmt: skip
    """Fine-tunes the matrices `names` of a copy in its folder on `windows` [samples, length] of ids; returns the facts.

    A budget in steps is each layer's, a time is shared equally. Raises Refusal where the loss is not finite any more.
    """
    decoder = Decoder(copy.model.folder, device)
    hidden = decoder.embed(copy.model, windows)
    wanted = decoder.embed(teacher, windows)
    layers = sorted({layer_of(name) or 0 for name in names})
    for index in bar(range(layers[-1] + 1), layers[-1] + 1, "layer", "fine-tune"):
        here = tuple(name for name in names if layer_of(name) == index)
        decoder.advance(decoder.layer(index, teacher), wanted, f"layer {index}, dense")
        if here and not all("tuned" in copy.done.get(name, {}) for name in here):
            _tune(copy, decoder, index, here, hidden, wanted, how, len(layers))
        if index < layers[-1]:
            decoder.advance(decoder.layer(index, copy.pruned()), hidden, f"layer {index}")
    tuned = {
        str(index): copy.done[next(name for name in names if layer_of(name) == index)]["tuned"] for index in layers
    }
    return {"layers": tuned}


def _tune(
    copy: CheckpointCopy, decoder: Decoder, index: int, names: tuple[str, ...], hidden: torch.Tensor,
    wanted: torch.Tensor, how: Finetune, layers: int,
) -> None:  # fmt: skip
    found, facts = _saved(copy, index)
    if found is None:
        layer = decoder.layer(index, copy.pruned()).train()
        before = _distance(decoder, layer, hidden, wanted)
        weights = {name: layer.get_parameter(name.split(".", 2)[2]) for name in names}
        teaching = Teaching(weights, how, len(hidden), 1 / layers)

        def loss(part: list[int]) -> torch.Tensor:
            target = wanted[part].to(decoder.device)
            with mixed_precision(decoder.device):
                ours = decoder.apply(layer, hidden[part])
            return (ours.float() - target).square().mean() / target.square().mean()

        while teaching.spent < 1.0:
            teaching.step(loss)
        facts = {"steps": teaching.steps, "before": before, "after": _distance(decoder, layer, hidden, wanted)}
        found = {name: weight.detach() for name, weight in weights.items()}
        copy.save_state(found, {"layer": index, "facts": facts})
    new, all_facts = new_matrices(copy, found)
    copy.write(new, {name: all_facts[name] | {"tuned": facts} for name in names})


def _saved(copy: CheckpointCopy, index: int) -> tuple[dict[str, torch.Tensor] | None, Mapping[str, Any]]:
    """What an earlier run was about to write for a layer."""
    from safetensors import safe_open

    if not copy.state.is_file():
        return None, {}
    with safe_open(copy.state, "pt") as file:
        saved = json.loads(file.metadata()["facts"])
        if saved["layer"] != index:
            return None, {}
        return {name: file.get_tensor(name) for name in file.keys()}, saved["facts"]  # noqa: SIM118


def _distance(decoder: Decoder, layer: nn.Module, hidden: torch.Tensor, wanted: torch.Tensor) -> float:
    """Squared distance of a layer's outputs to the wanted ones, over the square of these."""
    apart = total = 0.0
    for part in decoder.batches(hidden, "distance"):
        target = wanted[part].to(decoder.device)
        apart += float((decoder.forward(layer, hidden[part]) - target).double().square().sum())
        total += float(target.double().square().sum())
    if not apart < float("inf"):
        raise Refusal("the hidden states are not finite on this text: check the checkpoint, or pass a lower "
                      "--finetune-rate")  # fmt: skip
    return apart / total
