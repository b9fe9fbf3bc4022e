"""Choosing the next token: greedy, or temperature with top-k and top-p (Holtzman et al. 2020), seeded."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tvm_sparse.errors import Refusal


@dataclass(frozen=True)
class Sampling:
    """`temperature` 0 is greedy; `top_k` 0 and `top_p` 1 keep every token. Raises Refusal for other values."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise Refusal(f"temperature {self.temperature:g} is below 0: 0 is greedy, 1 the model's own distribution")
        if self.top_k < 0:
            raise Refusal(f"top-k {self.top_k} is below 0: 0 keeps every token")
        if not 0 < self.top_p <= 1:
            raise Refusal(f"top-p {self.top_p:g} is outside (0, 1]: 1 keeps every token")

    def choose_among(
        self, values: np.ndarray, ids: np.ndarray, log_sum: float, random: np.random.Generator
    ) -> int | None:
        """As `choose`, from the largest logits in order, their ids, and log sum e^(logit / temperature) over all.

        None, and no number drawn, where more logits than these would have to be known.
        """
        scaled = values.astype(np.float64) / self.temperature
        if 0 < self.top_k <= len(values):
            weights = np.exp(scaled[: self.top_k] - scaled[0])
            return self._draw(ids, weights / weights.sum(), random)
        weights = np.exp(scaled - log_sum)
        if self.top_k or weights.sum() < self.top_p:
            return None
        return self._draw(ids, weights, random)

    def choose(self, logits: np.ndarray, random: np.random.Generator) -> int:
        """float32 [vocab] -> a token id. One number is drawn unless greedy; equal logits: the lowest id first."""
        if self.temperature == 0:
            return int(logits.argmax())
        order = np.argsort(-logits, kind="stable")
        if self.top_k:
            order = order[: self.top_k]
        scaled = logits[order].astype(np.float64) / self.temperature
        weights = np.exp(scaled - scaled[0])
        return self._draw(order, weights / weights.sum(), random)

    def _draw(self, order: np.ndarray, weights: np.ndarray, random: np.random.Generator) -> int:
        """One of `order`, whose probabilities are `weights`, the largest first."""
        before = np.cumsum(weights) - weights
        weights = weights[before < self.top_p]  # the smallest set that reaches top_p; never empty
        reached = np.cumsum(weights)
        return int(order[np.searchsorted(reached, random.random() * reached[-1], side="right")])
