"""ADMM with a gradual mask (Boza 2024, "Fast and Effective Weight Update for Pruned Large Language Models")."""

from __future__ import annotations

import torch

from tvm_sparse.pruning.pattern import Pattern
from tvm_sparse.pruning.selection import keep_highest

DAMPING = 0.1
GRADUAL, ITERATIONS = 15, 20  # the mask grows in the first, then stays


def admm(weight: torch.Tensor, gram: torch.Tensor, zeros: int, pattern: Pattern, by_row: bool) -> torch.Tensor:
    """Algorithm 1 on [N, K] and sum x x^T [K, K], float64: minimises the change of the outputs under a mask.

    Columns are scaled to inputs of norm 1, so that the mask is Wanda's, taken of weights that have been updated
    already. The share of zeros follows a cubic ramp; an N:M is taken at once. Returns the new matrix.
    """
    norms = gram.diagonal().sqrt() + 1e-8
    hessian = gram / norms / norms[:, None]
    hessian.diagonal().add_(DAMPING * float(hessian.diagonal().mean()))
    scaled = weight * norms
    target = scaled @ hessian
    inverse = torch.linalg.inv(hessian + torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device))
    dual, current = torch.zeros_like(scaled), scaled
    kept = torch.ones_like(scaled, dtype=torch.bool)
    for step in range(1, ITERATIONS + 1):
        wanted = current + dual
        if step <= GRADUAL:
            ramp = 1 - (1 - step / GRADUAL) ** 3
            kept = keep_highest(wanted.abs(), int(zeros * ramp), pattern, by_row)
        sparse = torch.where(kept, wanted, 0)
        dual = wanted - sparse
        current = (target + sparse - dual) @ inverse
    return torch.where(kept, current + dual, 0) / norms
