"""Cosine similarity of the layers' outputs on a text: the model runs in transformers on the CPU, in float32.

Two matrices, each the mean over all tokens: of the hidden states after every layer, which are alike because every
layer adds to the same stream, and of what each layer adds, which is what folding layers would have to reproduce.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tvm_sparse.checkpoint import Checkpoint
from tvm_sparse.checkpoint.folder import FolderCheckpoint
from tvm_sparse.errors import Refusal
from tvm_sparse.measure.similarity import largest
from tvm_sparse.progress import bar

WINDOW = 256


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as bad:
        raise Refusal(f"cannot read --text {path}: {bad.strerror}") from bad
    except UnicodeDecodeError as bad:
        raise Refusal(f"--text {path} is not UTF-8 (byte {bad.start}): convert it first") from bad


def check(checkpoint: Checkpoint) -> Path:
    """The folder to run the model from. Raises Refusal where there is none, no tokenizer, or not enough memory."""
    if not isinstance(checkpoint, FolderCheckpoint):
        raise Refusal("--text runs the model, and synthetic weights say nothing about text: give a checkpoint")
    if not (checkpoint.folder / "tokenizer.json").is_file():
        raise Refusal(f"{checkpoint.folder} has no tokenizer.json, which --text needs: add it or leave --text out")
    needed = 4 * sum(prod(checkpoint.spec(name).shape) for name in checkpoint.names())
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > free:
        raise Refusal(
            f"--text holds the model in float32, {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free: "
            "leave --text out, or run it on a machine with more memory"
        )
    return checkpoint.folder


def output_similarity(folder: Path, text: str, max_tokens: int) -> dict[str, Any]:
    """Layers against layers on the text's first tokens, in windows that each start from nothing."""
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text, add_special_tokens=False).ids[:max_tokens]
    if not ids:
        raise Refusal("--text holds no token: give a longer text")
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    layers = model.model.layers
    entered: list[torch.Tensor] = []
    left: list[torch.Tensor] = []
    for layer in layers:
        layer.register_forward_hook(_keeper(entered, left), with_kwargs=True)
    sums = {"hidden": np.zeros((len(layers),) * 2), "added": np.zeros((len(layers),) * 2)}
    windows = [ids[start : start + WINDOW] for start in range(0, len(ids), WINDOW)]
    with torch.inference_mode():
        for window in bar(windows, len(windows), "window", "run the text"):
            entered.clear()
            left.clear()
            model.model(torch.tensor([window]), use_cache=False)
            states, before = torch.stack(left), torch.stack(entered)
            sums["hidden"] += _summed_cosines(states)
            sums["added"] += _summed_cosines(states - before)
    found: dict[str, Any] = {"tokens": len(ids), "window": WINDOW, "layers": list(range(len(layers)))}
    for name, total in sums.items():
        mean = np.clip(total / len(ids), -1, 1)
        found[name] = {"layers": found["layers"], "cosine": mean.round(5).tolist(),
                       "largest": largest(found["layers"], mean)}  # fmt: skip
    return found


def _keeper(entered: list[torch.Tensor], left: list[torch.Tensor]) -> Callable[..., None]:
    def keep(layer: Any, arguments: tuple, named: dict[str, Any], output: Any) -> None:
        entered.append((arguments[0] if arguments else named["hidden_states"])[0])
        left.append((output[0] if isinstance(output, tuple) else output)[0])

    return keep


def _summed_cosines(states: torch.Tensor) -> np.ndarray:
    """[layers, tokens, hidden] -> [layers, layers], cosines summed over tokens."""
    unit = torch.nn.functional.normalize(states.double(), dim=-1).flatten(1)
    return (unit @ unit.T).numpy()
