"""Pruning by what the inputs are: layer after layer, on the activations of the pruned layers before.

Each layer is made, its matrices' inputs are summed over the calibration sequences, its matrices are pruned and
written, and the sequences go on through the pruned layer. Layers of an interrupted run are only passed through.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tvm_sparse.checkpoint import Checkpoint
from tvm_sparse.errors import Refusal
from tvm_sparse.progress import bar
from tvm_sparse.pruning.admm import admm
from tvm_sparse.pruning.allocation import outlier_share
from tvm_sparse.pruning.decoder import Decoder
from tvm_sparse.pruning.inputs import Inputs
from tvm_sparse.pruning.pattern import Pattern
from tvm_sparse.pruning.rewrite import CheckpointCopy
from tvm_sparse.pruning.selection import keep_highest
from tvm_sparse.pruning.sparsegpt import DAMPING, Factor, factorise, sparsegpt
from tvm_sparse.pruning.wanda import wanda_scores

# Matrices of a layer that share an input, in the order the input meets them.
_GROUPS = (
    ("linear_attn.in_proj_qkv", "linear_attn.in_proj_z", "linear_attn.in_proj_b", "linear_attn.in_proj_a"),
    ("linear_attn.out_proj",),
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


@dataclass(frozen=True)
class Method:
    """How to prune: "wanda", "sparsegpt" or "admm"; `by_row` compares within rows, but for sparsegpt's own blocks."""

    name: str
    pattern: Pattern
    by_row: bool


def layer_of(name: str) -> int | None:
    """The layer that a matrix belongs to; None for the embedding and the head."""
    parts = name.split(".")
    return int(parts[1]) if parts[0] == "layers" else None


def prune_layers(
    copy: CheckpointCopy, decoder: Decoder, ids: torch.Tensor, method: Method, zeros: Mapping[str, int]
) -> None:
    """Prunes the matrices of `zeros` (name -> how many) and writes them, layer by layer.

    Raises Refusal for weights or activations that are not finite and for a Hessian that stays singular, by name.
    """
    model = copy.model
    hidden = decoder.embed(model, ids)
    last = max(layer_of(name) or 0 for name in zeros)
    for index in bar(range(last + 1), last + 1, "layer", f"prune by {method.name}"):
        names = [name for name in zeros if layer_of(name) == index]
        done = all(name in copy.done for name in names)
        layer = decoder.layer(index, copy.pruned() if done else model)
        if not done:
            _prune_layer(copy, decoder, layer, hidden, method, {name: zeros[name] for name in names})
        if index < last:
            decoder.run(layer, hidden, f"layer {index}")


def outliers(
    model: Checkpoint, decoder: Decoder, ids: torch.Tensor, names: Iterable[str], threshold: float
) -> dict[int, float]:
    """OWL's share of outliers in every layer with matrices to prune, on the activations of the dense model."""
    hidden = decoder.embed(model, ids)
    wanted = [name for name in names if layer_of(name) is not None]
    last = max(layer_of(name) or 0 for name in wanted)
    found = {}
    for index in bar(range(last + 1), last + 1, "layer", "count outliers"):
        layer = decoder.layer(index, model)
        here = {_module(name): name for name in wanted if layer_of(name) == index}
        scores = []
        for inputs, group in _inputs(decoder, layer, hidden, here, whole=False, keep=True):
            scores += [wanda_scores(_weight(layer, module), inputs.norms) for module in group]
        if scores:
            found[index] = outlier_share(scores, threshold)
    return found


def _prune_layer(
    copy: CheckpointCopy, decoder: Decoder, layer: nn.Module, hidden: torch.Tensor, method: Method,
    zeros: Mapping[str, int],
) -> None:  # fmt: skip
    here = {_module(name): name for name in zeros}
    new: dict[str, list[torch.Tensor]] = {}
    facts: dict[str, dict[str, Any]] = {}
    whole = method.name != "wanda"
    for inputs, group in _inputs(decoder, layer, hidden, here, whole, keep=False):
        factor = _factor(inputs, here[group[0]]) if method.name == "sparsegpt" else None
        for module in group:
            name, weight = here[module], _weight(layer, module)
            if not bool(weight.isfinite().all()):
                raise Refusal(f"tensor {name} holds NaN or infinity: repair the checkpoint, or give another one")
            found = copy.rounded(name, _pruned(weight, inputs, factor, method, zeros[name]) + 0.0)  # no -0.0
            layer.get_parameter(f"{module}.weight").copy_(found)
            new[name] = [found]
            facts[name] = _facts(found, weight, inputs, factor, whole)
    copy.write(new, facts)


def _pruned(weight: torch.Tensor, inputs: Inputs, factor: Factor | None, method: Method, zeros: int) -> torch.Tensor:
    if factor is not None:
        return sparsegpt(weight, factor, zeros, method.pattern)
    if method.name == "admm":
        return admm(weight, inputs.gram, zeros, method.pattern, method.by_row)
    kept = keep_highest(wanda_scores(weight, inputs.norms), zeros, method.pattern, method.by_row)
    return torch.where(kept, weight, 0)


def _inputs(
    decoder: Decoder, layer: nn.Module, hidden: torch.Tensor, here: Mapping[str, str], whole: bool, keep: bool
) -> Iterator[tuple[Inputs, list[str]]]:
    """Sums the inputs of the modules in `here` over all sequences; yields them with the modules that share them."""
    groups = [[module for module in group if module in here] for group in _GROUPS]
    groups = [group for group in groups if group]
    sums = []
    with ExitStack() as hooks:
        for group in groups:
            module: Any = layer.get_submodule(group[0])
            inputs = Inputs(module.in_features, whole, decoder.device)
            handle = module.register_forward_pre_hook(lambda _, args, inputs=inputs: inputs.add(args[0]))
            hooks.callback(handle.remove)
            sums.append(inputs)
        decoder.run(layer, hidden, "inputs", keep)
    for group, inputs in zip(groups, sums, strict=True):
        if not inputs.finite:
            raise Refusal(f"the inputs of {here[group[0]]} are not finite on this text: check the checkpoint")
        yield inputs, group


def _factor(inputs: Inputs, name: str) -> Factor:
    try:
        factor = factorise(inputs.gram)
    except Refusal as refusal:
        raise Refusal(f"{name}: {refusal}") from None
    if dead := int(factor.dead.sum()):
        print(f"  {name}: {dead} inputs are zero on all of the text, their weights go", file=sys.stderr)
    if factor.damping > DAMPING:
        print(f"  {name}: the Hessian was singular, damped by {factor.damping:.0%} of its mean", file=sys.stderr)
    return factor


def _facts(
    found: torch.Tensor, weight: torch.Tensor, inputs: Inputs, factor: Factor | None, whole: bool
) -> dict[str, Any]:
    """Shape and zeros; the change of the outputs over the text, relative and squared; what was out of the ordinary."""
    facts: dict[str, Any] = {"shape": list(found.shape), "zeros": int((found == 0).sum())}
    if whole:
        change, gram = found.to(weight) - weight, inputs.gram
        facts["error"] = float(((change @ gram) * change).sum() / ((weight @ gram) * weight).sum().clamp_min(1e-300))
    if factor is not None and bool(factor.dead.any()):
        facts["dead_inputs"] = int(factor.dead.sum())
    if factor is not None and factor.damping > DAMPING:
        facts["damping"] = factor.damping
    return facts


def _weight(layer: nn.Module, module: str) -> torch.Tensor:
    return layer.get_parameter(f"{module}.weight").detach().double()


def _module(name: str) -> str:
    return name.split(".", 2)[2].removesuffix(".weight")
