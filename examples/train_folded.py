"""Train a checkpoint some of whose layers are made one, and save it with tensors for every layer.

The folded model learns from the text and from the model as it was, in the manner of train_tiny.py, whose text it takes:

    python train_folded.py tiny-qwen3.5 --fold 4:8 --corpus kjv.txt --out tiny-folded

What it writes is an ordinary checkpoint with equal layers, which `build --fold auto` folds again without any loss. With
`--sparsity` the weights are pruned on the way, along train_tiny.py's ramp.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch
from train_tiny import encode, fit, read_chapters, save, split
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3_5ForCausalLM

from tvm_sparse.checkpoint import model_config
from tvm_sparse.folding.ranges import parse_fold, tied_layers


def tie(model: Qwen3_5ForCausalLM, groups: tuple[tuple[int, ...], ...]) -> None:
    """The layers of a group become its first one, the very same module: gradients of all its places add up."""
    layers = model.model.layers
    for first, *others in groups:
        for other in others:
            layers[other] = layers[first]


def untie(model: Qwen3_5ForCausalLM, groups: tuple[tuple[int, ...], ...]) -> None:
    """Every layer a module of its own again, with equal weights."""
    layers = model.model.layers
    for first, *others in groups:
        for other in others:
            layers[other] = copy.deepcopy(layers[first])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("model", help="the checkpoint")
    add("--fold", required=True, help="as build has it: 4:8, or a comma list")
    add("--corpus", type=Path, required=True, help="output of `bible -l 9999 Gen1:1-Rev22:21`")
    add("--out", type=Path, required=True)
    add("--sparsity", type=float, default=0.0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--graph", action=argparse.BooleanOptionalAction, default=True)
    add("--steps", type=int, default=1200)
    add("--batch", type=int, default=32, help="windows in a step")
    add("--length", type=int, default=512, help="tokens in a window")
    add("--rate", type=float, default=1e-3, help="highest learning rate")
    add("--decay", type=float, default=0.5, help="weight decay of the matrices")
    add("--check", type=int, default=200, help="steps between validations")
    add("--seed", type=int, default=0)
    options = parser.parse_args()

    groups = tied_layers(model_config(options.model), parse_fold(options.fold))
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    training, validation, _ = (encode(tokenizer, text) for text in split(read_chapters(options.corpus)))
    loaded = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    teacher = copy.deepcopy(loaded).to(options.device).requires_grad_(False)
    tie(loaded, groups)
    model = loaded.to(options.device)
    streams = [stream.to(options.device) for stream in (training, validation)]
    fit(model, *streams, options, teacher=teacher, sparsity=options.sparsity)
    untie(model, groups)
    save(model, tokenizer, options.out)


if __name__ == "__main__":
    main()
