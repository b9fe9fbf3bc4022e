"""`python -m tvm_sparse.prune`: a checkpoint goes in, the same checkpoint with zeros comes out.

request -> calibration sequences -> zeros for every matrix -> a copy with new matrices -> what stays fine-tuned, where
asked for -> sparsity.json
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch

from tvm_sparse import __version__
from tvm_sparse.checkpoint import open_checkpoint
from tvm_sparse.checkpoint.folder import FolderCheckpoint, read_json
from tvm_sparse.errors import Refusal, Stopped, run_command
from tvm_sparse.pruning import Pruner, select
from tvm_sparse.pruning.allocation import by_layer, layer_sparsities, uniform
from tvm_sparse.pruning.by_magnitude import prune_globally, prune_matrices
from tvm_sparse.pruning.calibration import Calibration, all_windows, calibration
from tvm_sparse.pruning.finetune import check_memory, finetune, room_for_state
from tvm_sparse.pruning.finetune_layers import finetune_layers
from tvm_sparse.pruning.request import PruneRequest, needs_text, parse_prune
from tvm_sparse.pruning.rewrite import SUMMARY, CheckpointCopy
from tvm_sparse.pruning.structured import round_half_up


def main(argv: Sequence[str]) -> None:
    request = parse_prune(argv)
    summary = prune(request)
    total = summary["total"]
    print(f"{total['matrices']} matrices, {total['weights']:,} weights: {total['sparsity']:.2%} zeros")
    print(request.out)


def prune(request: PruneRequest) -> dict[str, Any]:
    """Makes the checkpoint `request.out` and returns what its sparsity.json says.

    Raises Refusal before anything is written to OUT, and Stopped where finished work is kept: a full disk, or
    a device without room for a layer.
    """
    model = _open(request.model)
    names = select(model.config, request.include, request.exclude)
    shapes = {name: model.spec(name).shape for name in names}
    _check(request, shapes)
    text = None
    if request.text is not None and needs_text(request.method, request.allocation):
        text = calibration(request.text, model.folder, model.config, request.samples, request.length, request.seed)
    teacher = _teacher(request, model, tuple(names))
    how, lessons = request.finetune, _lessons(request, model)
    fingerprint = _fingerprint(request, model, text, teacher, lessons)
    if (request.out / SUMMARY).is_file() and read_json(request.out / SUMMARY).get("fingerprint") == fingerprint:
        return read_json(request.out / SUMMARY)

    room = room_for_state(model, names) if how and how.by == "model" else 0
    with CheckpointCopy(model, request.out, fingerprint, room) as copy:
        for name in copy.left_behind:
            print(f"  left out: {name}, the model as it was in another file", file=sys.stderr)
        try:
            if request.method != "none" and any(name not in copy.done for name in names):
                _prune(request, copy, text, _zeros(request, copy, text, shapes))
            if how and lessons and teacher and "finetune" not in copy.notes:
                tune = finetune if how.by == "model" else finetune_layers
                copy.note("finetune", tune(copy, teacher, names, lessons.ids, how, request.device))
        except torch.OutOfMemoryError as error:
            raise Stopped(f"{request.device} has too little free memory: make room there and run the same "
                          "command again, or pass --device cpu") from error  # fmt: skip
        summary = {"tvm_sparse": __version__, "fingerprint": fingerprint, **request.to_json()}
        if text is not None:
            summary["calibration"] = text.to_json()
        if "owl" in copy.notes:
            summary["outliers"] = copy.notes["owl"]
        if request.method == "none" and (model.folder / SUMMARY).is_file():
            before = read_json(model.folder / SUMMARY)
            summary["pruned"] = {key: before[key] for key in before if key not in ("matrices", "total", "fingerprint")}
        if lessons is not None:
            summary["finetune"] |= {**lessons.to_json(), **copy.notes["finetune"]}
        summary |= _counted({name: copy.done[name] for name in names})
        copy.finish(summary)
    return summary


def _open(name: str) -> FolderCheckpoint:
    model = open_checkpoint("auto", model=name)
    if not isinstance(model, FolderCheckpoint):
        raise Refusal(f"{name} is no checkpoint of files: give a folder or a hub id")
    return model


def _teacher(request: PruneRequest, model: FolderCheckpoint, names: tuple[str, ...]) -> FolderCheckpoint | None:
    """Whom to learn from. Raises Refusal where that model or this machine does not serve."""
    if request.finetune is None:
        return None
    teacher = model if request.finetune.teacher is None else _open(request.finetune.teacher)
    sizes = [(one.config.vocab_size, one.config.hidden_size, one.config.num_hidden_layers) for one in (model, teacher)]
    if sizes[0] != sizes[1]:
        raise Refusal(f"--teacher {request.finetune.teacher} has other sizes (vocabulary, hidden, layers) "
                      f"{sizes[1]} than the model's {sizes[0]}: give the dense model it was pruned from")  # fmt: skip
    if request.finetune.by == "model":
        check_memory(model, teacher, names, request.device)
    return teacher


def _lessons(request: PruneRequest, model: FolderCheckpoint) -> Calibration | None:
    """What is learned from: all of a text, or as many sequences as a calibration has."""
    how = request.finetune
    if how is None:
        return None
    if how.by == "layer":
        return calibration(how.text, model.folder, model.config, request.samples, how.length, how.seed)
    flag = "--text" if how.text == request.text else "--finetune-text"
    return all_windows(flag, how.text, model.folder, model.config, how.length, how.seed)


def _check(request: PruneRequest, shapes: Mapping[str, tuple[int, ...]]) -> None:
    if not shapes:
        raise Refusal("nothing is left to prune: --exclude matches every matrix")
    for name, shape in shapes.items():
        request.pattern.check(name, shape)
        if request.finetune and not name.startswith("layers."):
            raise Refusal(f"{name} is in no layer, and only layers are fine-tuned: leave it or --finetune out")
        if needs_text(request.method, request.allocation) and not name.startswith("layers."):
            raise Refusal(f"{name} is in no layer, and calibration goes by layers: leave it out, or pass --prune "
                          "magnitude --allocation uniform")  # fmt: skip


def _zeros(
    request: PruneRequest, copy: CheckpointCopy, text: Calibration | None, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, int]:
    """How many weights of each matrix go."""
    if request.allocation == "uniform" or text is None:
        return uniform(shapes, request.sparsity)
    from tvm_sparse.pruning.decoder import Decoder
    from tvm_sparse.pruning.layerwise import layer_of, outliers

    if "owl" not in copy.notes:
        decoder = Decoder(copy.model.folder, request.device)
        found = outliers(copy.model, decoder, text.ids, shapes, request.owl_threshold)
        copy.note("owl", {str(layer): share for layer, share in found.items()})
    shares = {int(layer): share for layer, share in copy.notes["owl"].items()}
    layers = {name: layer_of(name) or 0 for name in shapes}
    sizes = [sum(prod(shapes[name]) for name in shapes if layers[name] == layer) for layer in shares]
    by_share = layer_sparsities(list(shares.values()), sizes, request.sparsity, request.owl_reach)
    return by_layer(shapes, layers, dict(zip(shares, by_share, strict=True)), request.sparsity)


def _prune(request: PruneRequest, copy: CheckpointCopy, text: Calibration | None, zeros: Mapping[str, int]) -> None:
    if request.method == "magnitude":
        if request.granularity == "global":
            weights = sum(prod(copy.model.spec(name).shape) for name in zeros)
            prune_globally(copy, tuple(zeros), round_half_up(request.sparsity * weights))
            return
        pruner = Pruner("magnitude", request.sparsity, request.pattern, request.granularity)
        prune_matrices(copy, pruner, zeros)
        return
    from tvm_sparse.pruning.decoder import Decoder
    from tvm_sparse.pruning.layerwise import Method, prune_layers

    assert text is not None
    method = Method(request.method, request.pattern, request.granularity == "row", request.follow)
    prune_layers(copy, Decoder(copy.model.folder, request.device), text.ids, method, zeros)


def _fingerprint(
    request: PruneRequest, model: FolderCheckpoint, text: Calibration | None, teacher: FolderCheckpoint | None,
    lessons: Calibration | None,
) -> str:  # fmt: skip
    """Everything the new values depend on: another one does not resume what an earlier run left."""
    facts = [__version__, model.fingerprint(), request.to_json(), text.to_json() if text else None, request.device]
    if teacher is not None and lessons is not None:
        facts += [teacher.fingerprint(), lessons.to_json()]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _counted(matrices: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    weights = sum(prod(facts["shape"]) for facts in matrices.values())
    zeros = sum(facts["zeros"] for facts in matrices.values())
    return {
        "total": {"matrices": len(matrices), "weights": weights, "zeros": zeros, "sparsity": zeros / weights},
        "matrices": {
            name: facts | {"sparsity": facts["zeros"] / prod(facts["shape"])} for name, facts in matrices.items()
        },
    }


if __name__ == "__main__":
    sys.exit(run_command(main))
