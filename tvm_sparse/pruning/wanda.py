"""Wanda (Sun, Liu, Bair and Kolter 2023, "A Simple and Effective Pruning Approach for Large Language Models")."""

from __future__ import annotations

import torch


def wanda_scores(weight: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    """Equation 1: |w| of [N, K] times the L2 norm of its input feature [K]; the paper compares within rows."""
    return weight.abs() * norms
