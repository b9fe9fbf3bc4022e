"""Pruning by what the inputs are: layer after layer, on the activations of the pruned layers before.

Each layer is made, its matrices' inputs are summed over the calibration sequences, its matrices are pruned and
written, and the sequences go on through the pruned layer. Layers of an interrupted run are only passed through.

A method that follows the dense model has the same sequences go through the dense layers beside them, and prunes a
layer's matrices one input after the other, so that each makes up for what the ones before it changed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
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


Beside = tuple[nn.Module, torch.Tensor]
"""The dense layer, and the hidden states of the dense model that go into it."""


@dataclass(frozen=True)
class Method:
    """How to prune: "wanda", "sparsegpt" or "admm"; `by_row` compares within rows, but for sparsegpt's own blocks."""

    name: str
    pattern: Pattern
    by_row: bool
    follow: float = 0.0  # by what share new outputs make up for inputs that are not the dense model's any more


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
    dense = hidden.clone() if method.follow else None
    last = max(layer_of(name) or 0 for name in zeros)
    for index in bar(range(last + 1), last + 1, "layer", f"prune by {method.name}"):
        here = {name: count for name, count in zeros.items() if layer_of(name) == index}
        done = all(name in copy.done for name in here)
        layer = decoder.layer(index, copy.pruned() if done else model)
        beside = None if dense is None else (decoder.layer(index, model), dense)
        if not done:
            _prune_layer(copy, decoder, layer, hidden, beside, method, here)
        if index < last:
            decoder.advance(layer, hidden, f"layer {index}")
            if beside is not None:
                decoder.advance(*beside, f"layer {index}, dense")


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
        for inputs, group in _inputs(decoder, layer, hidden, None, here, whole=False):
            scores += [wanda_scores(_weight(layer, module), inputs.norms) for module in group]
        if scores:
            found[index] = outlier_share(scores, threshold)
        if index < last:
            decoder.advance(layer, hidden, f"layer {index}")
    return found


def _prune_layer(
    copy: CheckpointCopy, decoder: Decoder, layer: nn.Module, hidden: torch.Tensor, beside: Beside | None,
    method: Method, zeros: Mapping[str, int],
) -> None:  # fmt: skip
    modules = {_module(name): name for name in zeros}
    whole = method.name != "wanda"
    new: dict[str, list[torch.Tensor]] = {}
    facts: dict[str, dict[str, Any]] = {}
    for here in [modules] if beside is None else _one_by_one(modules):
        for inputs, group in _inputs(decoder, layer, hidden, beside, here, whole):
            factor = _factor(inputs, here[group[0]]) if method.name == "sparsegpt" else None
            for module in group:
                name, weight = here[module], _weight(layer, module)
                if not bool(weight.isfinite().all()):
                    raise Refusal(f"tensor {name} holds NaN or infinity: repair the checkpoint, or give another one")
                moved = inputs.following(weight, method.follow)
                found = copy.rounded(name, _pruned(moved, inputs, factor, method, zeros[name]) + 0.0)  # no -0.0
                layer.get_parameter(f"{module}.weight").copy_(found)
                new[name] = [found]
                facts[name] = _facts(found, weight, inputs, factor, whole)
    copy.write(new, facts)


def _one_by_one(modules: Mapping[str, str]) -> list[dict[str, str]]:
    """The modules in waves, each with one input, in the order of the layer."""
    waves = [{module: modules[module] for module in group if module in modules} for group in _GROUPS]
    return [wave for wave in waves if wave]


def _pruned(weight: torch.Tensor, inputs: Inputs, factor: Factor | None, method: Method, zeros: int) -> torch.Tensor:
    if factor is not None:
        return sparsegpt(weight, factor, zeros, method.pattern)
    if method.name == "admm":
        return admm(weight, inputs.gram, zeros, method.pattern, method.by_row)
    kept = keep_highest(wanda_scores(weight, inputs.norms), zeros, method.pattern, method.by_row)
    return torch.where(kept, weight, 0)


def _inputs(
    decoder: Decoder, layer: nn.Module, hidden: torch.Tensor, beside: Beside | None, here: Mapping[str, str],
    whole: bool,
) -> Iterator[tuple[Inputs, list[str]]]:  # fmt: skip
    """Sums the inputs of the modules in `here` over all sequences; yields them with the modules that share them."""
    waves = [list(wave) for wave in _one_by_one(here)]
    sums = []
    with ExitStack() as hooks:
        for wave in waves:
            module: Any = layer.get_submodule(wave[0])
            inputs = Inputs(module.in_features, whole, decoder.device, beside is not None)
            dense = _Latest()
            if beside is not None:
                _hook(hooks, beside[0].get_submodule(wave[0]), dense.see)

            def add(x: torch.Tensor, inputs: Inputs = inputs, dense: _Latest = dense) -> None:
                inputs.add(x, dense.x)

            _hook(hooks, module, add)
            sums.append(inputs)
        for part in decoder.batches(hidden, "inputs"):
            if beside is not None:
                decoder.forward(beside[0], beside[1][part])
            decoder.forward(layer, hidden[part])
    for wave, inputs in zip(waves, sums, strict=True):
        if not inputs.finite:
            raise Refusal(f"the inputs of {here[wave[0]]} are not finite on this text: check the checkpoint")
        yield inputs, wave


class _Latest:
    """What a module was last given."""

    x: torch.Tensor | None = None

    def see(self, x: torch.Tensor) -> None:
        self.x = x


def _hook(hooks: ExitStack, module: nn.Module, see: Callable[[torch.Tensor], None]) -> None:
    hooks.callback(module.register_forward_pre_hook(lambda _, args: see(args[0])).remove)


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
