"""How far a pruned model is from the dense one on a text: the loss that fine-tuning lowers.

KL(dense || pruned) of the next token, in nats, the mean over all tokens; optionally with SquareHead (Kurtic et al.
2023, "Sparse Fine-tuning for Inference Acceleration of Large Language Models"): the squared distance of the hidden
states after each layer, relative to the dense model's own square, the mean over layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import kl_div
from torch.utils.checkpoint import checkpoint

_LOGITS = 1 << 26  # made at a time: 256 MB in float32, whatever the vocabulary


def load(folder: Path, device: torch.device) -> Any:
    """transformers' model of a checkpoint's text part, float32, on the device."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()  # "the fast path is not available": slow here is known
    logging.disable_progress_bar()
    loader: Any = AutoModelForCausalLM
    model = loader.from_pretrained(folder, dtype=torch.float32, local_files_only=True, attn_implementation="sdpa")
    return model.to(device).requires_grad_(False)


def distance(student: Any, teacher: Any, ids: torch.Tensor, hidden: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, its KL part), both scalars in float32, for ids [samples, length] on the models' device."""
    positions = torch.arange(ids.shape[1], device=ids.device).expand(3, *ids.shape)
    given = {
        "input_ids": ids, "position_ids": positions, "use_cache": False, "output_hidden_states": hidden > 0,
    }  # fmt: skip
    with torch.no_grad():
        wanted = teacher.model(**given)
    found = student.model(**given)
    divergence = _divergence(student.lm_head, found.last_hidden_state, teacher.lm_head, wanted.last_hidden_state)
    if not hidden:
        return divergence, divergence
    # the first are the embeddings, which are the same; the last are those after the final norm
    pairs = list(zip(found.hidden_states[1:], wanted.hidden_states[1:], strict=True))
    apart = [(ours.float() - theirs.float()).square().mean() / theirs.float().square().mean() for ours, theirs in pairs]
    return divergence + hidden * torch.stack(apart).mean(), divergence


def _divergence(
    student_head: Any, student_hidden: torch.Tensor, teacher_head: Any, teacher_hidden: torch.Tensor
) -> torch.Tensor:
    """Logits are made for some tokens at a time, and again for the gradient: never for a whole batch."""

    def some(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
        known = teacher_head(theirs).float().log_softmax(-1)
        return kl_div(student_head(ours).float().log_softmax(-1), known, log_target=True, reduction="sum")

    ours, theirs = student_hidden.flatten(0, 1), teacher_hidden.flatten(0, 1)
    step = max(1, _LOGITS // student_head.out_features)
    parts = [
        checkpoint(some, ours[start : start + step], theirs[start : start + step], use_reentrant=False)
        for start in range(0, len(ours), step)
    ]
    total: torch.Tensor = torch.stack(parts).sum() / len(ours)
    return total


@contextmanager
def mixed_precision(device: torch.device) -> Iterator[None]:
    """bfloat16 products on a GPU, as the model will run, but for the recurrence; float32 on a CPU."""
    from transformers.models.qwen3_5 import modeling_qwen3_5 as modeling

    if device.type == "cpu":
        yield
        return
    recurrence = modeling.torch_chunk_gated_delta_rule
    wrapped: Any = torch.autocast(device.type, enabled=False)(recurrence)
    modeling.torch_chunk_gated_delta_rule = wrapped
    try:
        with torch.autocast(device.type, torch.bfloat16):
            yield
    finally:
        modeling.torch_chunk_gated_delta_rule = recurrence
