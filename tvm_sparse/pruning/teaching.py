"""What fine-tuning of a model and of a layer share: the budget, steps that leave zeros alone, what is written."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from tvm_sparse.errors import Refusal
from tvm_sparse.pruning.rewrite import CheckpointCopy

TOKENS = 16384  # that go through a model together
_MOMENTS = ("exp_avg", "exp_avg_sq")
_WARM_UP = 0.05  # share of the budget in which the rate rises; it falls to zero in the rest


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
    """How to fine-tune: by "model" or "layer", `batch` sequences of `length` tokens a step, AdamW's highest `rate`, the
    weight of `hidden` states in the loss."""

    budget: Budget
    by: str
    text: str
    batch: int
    length: int
    rate: float
    hidden: float
    seed: int
    teacher: str | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Teaching:
    """AdamW on matrices whose zeros stay zero: one loss after the other, until the budget is spent.

    `windows` is how many there are to learn from, `part` the share of a budget in time.
    """

    def __init__(self, weights: Mapping[str, torch.Tensor], how: Finetune, windows: int, part: float = 1.0) -> None:
        self.weights = dict(weights)
        self.steps, self.seconds = 0, 0.0
        self._how, self._count = how, windows
        self._part = part
        for weight in self.weights.values():
            kept = weight != 0
            weight.requires_grad_(True)
            weight.register_post_accumulate_grad_hook(_masked(kept))
        self._optimizer = torch.optim.AdamW(self.weights.values(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.0)
        self._order: tuple[int, list[int]] = (-1, [])

    @property
    def spent(self) -> float:
        """The share of the budget, in [0, 1]."""
        return self._how.budget.share(self.steps, self.seconds / self._part)

    def batch(self) -> list[int]:
        """The windows of this step: every epoch goes through all of them, in its own order."""
        chosen = []
        for at in range(self.steps * self._how.batch, (self.steps + 1) * self._how.batch):
            epoch = at // self._count
            if self._order[0] != epoch:
                order = list(range(self._count))
                random.Random(f"{self._how.seed} {epoch}").shuffle(order)
                self._order = epoch, order
            chosen.append(self._order[1][at % self._count])
        return chosen

    def step(self, loss: Callable[[list[int]], torch.Tensor]) -> float:
        """One step on this step's windows, some at a time; `loss` is the mean over those it is given. Returns the mean.

        Raises Refusal where it is not finite.
        """
        began, before = time.monotonic(), self.spent
        warm = max(before, 1 / (self._how.budget.steps or 1000)) / _WARM_UP
        self._optimizer.param_groups[0]["lr"] = self._how.rate * min(warm, (1 - before) / (1 - _WARM_UP), 1.0)
        chosen, total = self.batch(), 0.0
        together = max(1, TOKENS // self._how.length)
        for start in range(0, len(chosen), together):
            part = chosen[start : start + together]
            found = loss(part) * (len(part) / len(chosen))
            found.backward()
            total += float(found.detach())
        if not total < float("inf"):
            raise Refusal(f"fine-tuning left the numbers at step {self.steps} (loss {total}): pass a lower "
                          f"--finetune-rate than {self._how.rate:g}")  # fmt: skip
        torch.nn.utils.clip_grad_norm_(self.weights.values(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        self.seconds += time.monotonic() - began
        return total

    def tensors(self) -> dict[str, torch.Tensor]:
        """Weights and moments, by name."""
        found = {name: weight.detach() for name, weight in self.weights.items()}
        for name, weight in self.weights.items():
            found |= {f"{name}.{moment}": self._optimizer.state[weight][moment] for moment in _MOMENTS}
        return found

    def restore(self, tensor: Callable[[str], torch.Tensor], steps: int, seconds: float) -> None:
        """Takes over what `tensors` gave after so many steps."""
        self.steps, self.seconds = steps, seconds
        for name, weight in self.weights.items():
            weight.data.copy_(tensor(name))
            state: dict[str, torch.Tensor] = {moment: tensor(f"{name}.{moment}") for moment in _MOMENTS}
            self._optimizer.state[weight] = {"step": torch.tensor(float(steps)), **state}


def new_matrices(
    copy: CheckpointCopy, weights: Mapping[str, torch.Tensor]
) -> tuple[dict[str, list[torch.Tensor]], dict[str, dict[str, Any]]]:
    """Fine-tuned matrices as the files will hold them, with their facts, for CheckpointCopy.write.

    What is zero in the files is checked to have stayed so.
    """
    stored = copy.pruned()
    new, facts = {}, {}
    for name, weight in weights.items():
        found = copy.rounded(name, weight.detach()) + 0.0
        if not bool(found.isfinite().all()):
            raise Refusal(f"fine-tuning left the numbers in {name}: pass a lower --finetune-rate")
        if bool((found[stored.tensor(name) == 0] != 0).any()):
            raise AssertionError(f"{name}: fine-tuning moved a zero")
        new[name] = [found]
        facts[name] = copy.done.get(name, {}) | {"shape": list(found.shape), "zeros": int((found == 0).sum())}
        facts[name].pop("error", None)  # of the outputs, before they were tuned
    return new, facts


def _masked(kept: torch.Tensor) -> Any:
    def mask(weight: torch.Tensor) -> None:
        assert weight.grad is not None
        weight.grad.mul_(kept)

    return mask
