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
import random
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

import torch

from tvm_sparse.checkpoint.folder import FolderCheckpoint
from tvm_sparse.errors import Refusal
from tvm_sparse.pruning.distillation import distance, load, mixed_precision
from tvm_sparse.pruning.rewrite import CheckpointCopy

_MOMENTS = ("exp_avg", "exp_avg_sq")
_TOKENS = 16384  # that go through the models together
_WARM_UP = 0.05  # share of the budget in which the rate rises; it falls to zero in the rest
_SAVE_EVERY = 60.0  # seconds
_KEPT_BACK = 8  # windows, and at most a tenth of the text
_CHECKPOINTED = 1 << 30  # weights from which a layer's insides are computed again for the gradient


@dataclass(frozen=True)
class Budget:
    """When fine-tuning ends: after `steps`, or after `seconds` of work. One of them is None."""

    steps: int | None = None
    seconds: float | None = None

    def share(self, steps: int, seconds: float) -> float:
        """How much of it is spent, in [0, 1]."""
        done = steps / self.steps if self.steps is not None else seconds / (self.seconds or 1.0)
        return min(done, 1.0)


@dataclass(frozen=True)
class Finetune:
    """How to fine-tune: `batch` sequences of `length` tokens a step, AdamW's highest `rate`, the weight of `hidden`."""

    budget: Budget
    text: str
    batch: int
    length: int
    rate: float
    hidden: float
    seed: int
    teacher: str | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def finetune(
    copy: CheckpointCopy, teacher: FolderCheckpoint, names: tuple[str, ...], windows: torch.Tensor, how: Finetune,
    device: str,
) -> dict[str, Any]:  # fmt: skip
    """Fine-tunes the matrices `names` of a copy in its folder on `windows` [count, length] of ids; returns the facts.

    Raises Refusal where the device is too small or the loss is not finite any more.
    """
    run = _Run(copy, teacher, names, windows, how, torch.device(device))
    with _interruptible() as interrupted:
        while run.spent < 1.0:
            run.step()
            if interrupted():
                run.save()
                raise KeyboardInterrupt
            if time.monotonic() - run.saved > _SAVE_EVERY:
                run.save()
        run.finish()
    return run.facts


class _Run:
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
        self._weights = {name: self._student.get_parameter(f"model.{name}") for name in names}
        for weight in self._weights.values():
            kept = weight != 0
            weight.requires_grad_(True)
            weight.register_post_accumulate_grad_hook(_masked(kept))
        self._optimizer = torch.optim.AdamW(self._weights.values(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.0)
        self.steps, self.seconds = 0, 0.0
        self.facts: dict[str, Any] = {}
        self._order: tuple[int, list[int]] = (-1, [])
        self.saved = time.monotonic()
        if copy.state.is_file():
            self._restore()
        else:
            self.facts["divergence_before"] = self._check()

    @property
    def spent(self) -> float:
        return self._how.budget.share(self.steps, self.seconds)

    def step(self) -> None:
        began, before = time.monotonic(), self.spent
        warm = max(before, 1 / (self._how.budget.steps or 1000)) / _WARM_UP
        self._optimizer.param_groups[0]["lr"] = self._how.rate * min(warm, (1 - before) / (1 - _WARM_UP), 1.0)
        ids = self._batch(self.steps)
        loss = 0.0
        with mixed_precision(self._device):
            for part in ids.split(max(1, _TOKENS // ids.shape[1])):
                found, _ = distance(self._student, self._teacher, part.to(self._device), self._how.hidden)
                found = found * (len(part) / len(ids))
                found.backward()
                loss += float(found.detach())
        if not loss < float("inf"):
            raise Refusal(f"fine-tuning left the numbers at step {self.steps} (loss {loss}): pass a lower "
                          f"--finetune-rate than {self._how.rate:g}")  # fmt: skip
        torch.nn.utils.clip_grad_norm_(self._weights.values(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        self.seconds += time.monotonic() - began
        if int(self.spent * 10) > int(before * 10) or self.steps == 1:
            print(f"  fine-tuning: step {self.steps}, {self.seconds:.0f} s, loss {loss:.4f}", file=sys.stderr)

    def save(self) -> None:
        """Everything a later run needs, in one file that is whole or not there."""
        tensors = {}
        for name, weight in self._weights.items():
            tensors[name] = weight.detach()
            for moment in _MOMENTS:
                tensors[f"{name}.{moment}"] = self._optimizer.state[weight][moment]
        facts = {"steps": self.steps, "seconds": self.seconds, "facts": self.facts}
        self._copy.save_state(tensors, facts)
        self.saved = time.monotonic()

    def finish(self) -> None:
        """Writes the matrices, after the state: a run that ends in between writes them again."""
        self.facts |= {"steps": self.steps, "seconds": round(self.seconds, 1), "divergence_after": self._check()}
        self.save()
        stored = self._copy.pruned()
        new, facts = {}, {}
        for name, weight in self._weights.items():
            found = self._copy.rounded(name, weight.detach()) + 0.0
            if not bool(found.isfinite().all()):
                raise Refusal(f"fine-tuning left the numbers in {name}: pass a lower --finetune-rate")
            if bool((found[stored.tensor(name) == 0] != 0).any()):
                raise AssertionError(f"{name}: fine-tuning moved a zero")
            new[name] = [found]
            facts[name] = self._copy.done.get(name, {}) | {"shape": list(found.shape), "zeros": int((found == 0).sum())}
            facts[name].pop("error", None)  # of the outputs, before they were tuned
        self._copy.write(new, facts)

    def _restore(self) -> None:
        from safetensors import safe_open

        with safe_open(self._copy.state, "pt", device=str(self._device)) as file:
            facts = json.loads(file.metadata()["facts"])
            for name, weight in self._weights.items():
                weight.data.copy_(file.get_tensor(name))
                self._optimizer.state[weight] = {
                    "step": torch.tensor(float(facts["steps"])),
                    **{moment: file.get_tensor(f"{name}.{moment}") for moment in _MOMENTS},
                }
        self.steps, self.seconds, self.facts = facts["steps"], facts["seconds"], facts["facts"]

    def _batch(self, step: int) -> torch.Tensor:
        """Ids [batch, length] of a step: every epoch goes through all windows, in its own order."""
        count, chosen = len(self._windows), []
        for at in range(step * self._how.batch, (step + 1) * self._how.batch):
            epoch = at // count
            if self._order[0] != epoch:
                order = list(range(count))
                random.Random(f"{self._how.seed} {epoch}").shuffle(order)
                self._order = epoch, order
            chosen.append(self._order[1][at % count])
        return self._windows[chosen]

    def _check(self) -> float | None:
        """Mean divergence from the dense model in nats a token, on what was kept back; None without any."""
        if not len(self._unseen):
            return None
        total = 0.0
        with torch.no_grad(), mixed_precision(self._device):
            for part in self._unseen.split(max(1, _TOKENS // self._unseen.shape[1])):
                _, found = distance(self._student, self._teacher, part.to(self._device), 0.0)
                total += float(found) * len(part)
        return total / len(self._unseen)


def _masked(kept: torch.Tensor) -> Any:
    def mask(weight: torch.Tensor) -> None:
        assert weight.grad is not None
        weight.grad.mul_(kept)

    return mask


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
