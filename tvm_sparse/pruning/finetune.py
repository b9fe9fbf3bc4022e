"""Recovery: the weights that pruning left learn from the dense model, and what is zero stays zero.

Only the pruned matrices learn (AdamW, no decay; the gradient of a zero is masked, so that the zero never moves), on the
consecutive windows of a text, in an order that the seed and the epoch give. Up to 8 windows are kept back to say how
far the model is from the dense one before and after.

State (weights in float32, AdamW's moments, steps, seconds) is saved in the new checkpoint's folder every minute and
when interrupted; the same command goes on from there. Nothing in a step depends on when that was: a budget in steps
ends with the same weights. The matrices in the folder are overwritten once, at the end.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

import torch

from tvm_sparse.checkpoint.folder import FolderCheckpoint
from tvm_sparse.errors import Refusal
from tvm_sparse.pruning.distillation import distance, load, mixed_precision
from tvm_sparse.pruning.rewrite import CheckpointCopy
from tvm_sparse.pruning.teaching import TOKENS, Finetune, Teaching, new_matrices

_SAVE_EVERY = 60.0  # seconds
_KEPT_BACK = 8  # windows, and at most a tenth of the text
_CHECKPOINTED = 1 << 30  # weights from which a layer's insides are computed again for the gradient


def finetune(
    copy: CheckpointCopy, teacher: FolderCheckpoint, names: tuple[str, ...], windows: torch.Tensor, how: Finetune,
    device: str,
) -> dict[str, Any]:  # fmt: skip
    """Fine-tunes the matrices `names` of a copy in its folder on `windows` [count, length] of ids; returns the facts.

    Raises Refusal where the loss is not finite any more.
    """
    run = _Run(copy, teacher, names, windows, how, torch.device(device))
    with _interruptible() as interrupted:
        while run.teaching.spent < 1.0:
            run.step()
            if interrupted():
                run.save()
                raise KeyboardInterrupt
            if time.monotonic() - run.saved > _SAVE_EVERY:
                run.save()
        run.finish()
    return run.facts


class _Run:
    """Fine-tuning of a whole model at a time."""

    def __init__(
        self, copy: CheckpointCopy, teacher: FolderCheckpoint, names: tuple[str, ...], windows: torch.Tensor,
        how: Finetune, device: torch.device,
    ) -> None:  # fmt: skip
        self._copy, self._how, self._device = copy, how, device
        kept_back = min(_KEPT_BACK, len(windows) // 10)
        self._windows = windows[: len(windows) - kept_back]
        self._unseen = windows[len(windows) - kept_back :]
        self._teacher = load(teacher.folder, device).eval()
        self._student = load(copy.folder, device).train()
        if sum(p.numel() for p in self._student.parameters()) > _CHECKPOINTED:
            self._student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        weights = {name: self._student.get_parameter(f"model.{name}") for name in names}
        self.teaching = Teaching(weights, how, len(self._windows))
        self.facts: dict[str, Any] = {}
        self.saved = time.monotonic()
        if copy.state.is_file():
            self._restore()
        else:
            self.facts["divergence_before"] = self._check()

    def step(self) -> None:
        before = self.teaching.spent
        loss = self.teaching.step(self._loss)
        steps, spent = self.teaching.steps, self.teaching.spent
        if int(spent * 10) > int(before * 10) or steps == 1:
            print(f"  fine-tuning: step {steps}, {self.teaching.seconds:.0f} s, loss {loss:.4f}", file=sys.stderr)

    def save(self) -> None:
        """Everything a later run needs, in one file that is whole or not there."""
        facts = {"steps": self.teaching.steps, "seconds": self.teaching.seconds, "facts": self.facts}
        self._copy.save_state(self.teaching.tensors(), facts)
        self.saved = time.monotonic()

    def finish(self) -> None:
        """Writes the matrices, after the state: a run that ends in between writes them again."""
        self.facts |= {
            "steps": self.teaching.steps, "seconds": round(self.teaching.seconds, 1), "divergence_after": self._check(),
        }  # fmt: skip
        self.save()
        self._copy.write(*new_matrices(self._copy, self.teaching.weights))

    def _loss(self, part: list[int]) -> torch.Tensor:
        with mixed_precision(self._device):
            loss, _ = distance(self._student, self._teacher, self._windows[part].to(self._device), self._how.hidden)
        return loss

    def _restore(self) -> None:
        from safetensors import safe_open

        with safe_open(self._copy.state, "pt", device=str(self._device)) as file:
            facts = json.loads(file.metadata()["facts"])
            self.teaching.restore(file.get_tensor, facts["steps"], facts["seconds"])
        self.facts = facts["facts"]

    def _check(self) -> float | None:
        """Mean divergence from the dense model in nats a token, on what was kept back; None without any."""
        if not len(self._unseen):
            return None
        total = 0.0
        with torch.no_grad(), mixed_precision(self._device):
            for part in self._unseen.split(max(1, TOKENS // self._unseen.shape[1])):
                _, found = distance(self._student, self._teacher, part.to(self._device), 0.0)
                total += float(found) * len(part)
        return total / len(self._unseen)


def room_for_state(model: FolderCheckpoint, names: tuple[str, ...]) -> int:
    """Bytes of the state on the disk: every weight that learns, and its two moments, in float32."""
    return 12 * sum(prod(model.spec(name).shape) for name in names)


def check_memory(model: FolderCheckpoint, teacher: FolderCheckpoint, names: tuple[str, ...], device: str) -> None:
    """Raises Refusal where the device cannot hold both models in float32, the gradients, AdamW's moments and masks."""
    weights = sum(prod(one.spec(name).shape) for one in (model, teacher) for name in one.names())
    need = 4 * weights + 13 * sum(prod(model.spec(name).shape) for name in names)
    if torch.device(device).type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if need > free:
        raise Refusal(f"fine-tuning needs {need / 1e9:.0f} GB for both models and the state, {device} has "
                      f"{free / 1e9:.0f}: leave matrices out with --exclude, or take a larger device")  # fmt: skip


@contextmanager
def _interruptible() -> Iterator[Any]:
    """Ctrl-C and SIGTERM wait for the end of a step, a second one does not."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    asked: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, frame: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    for number in before:
        signal.signal(number, ask)
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
