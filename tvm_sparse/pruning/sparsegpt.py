"""SparseGPT (Frantar and Alistarh 2023, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot")."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tvm_sparse.errors import Refusal
from tvm_sparse.pruning.pattern import Pattern
from tvm_sparse.pruning.selection import drop_lowest
from tvm_sparse.pruning.structured import KeepNOfM

BLOCK = 128
DAMPING = 0.01


@dataclass(frozen=True)
class Factor:
    """Upper triangular U of the damped Hessian's inverse U^T U [K, K]; inputs that were zero on every token.

    `damping` is the share of the mean diagonal that was added to the diagonal.
    """

    upper: torch.Tensor
    dead: torch.Tensor
    damping: float


def factorise(gram: torch.Tensor, damping: float = DAMPING) -> Factor:
    """The inverse Cholesky factor of sum x x^T [K, K], float64, damped as in the paper, more where that is singular.

    As the paper's code does, an input that was always zero has 1 on its diagonal and its weights are dropped.
    """
    dead = gram.diagonal() == 0
    mean = float(gram.diagonal().mean()) or 1.0
    while damping <= 1:
        damped = gram.clone()
        damped.diagonal()[dead] = 1
        damped.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed and bool(upper.isfinite().all()):
                return Factor(upper, dead, damping)
        damping *= 10
    raise Refusal("its inputs' Hessian stays singular when damped: calibrate on more or other text, or --exclude it")


def sparsegpt(weight: torch.Tensor, factor: Factor, zeros: int, pattern: Pattern, block: int = BLOCK) -> torch.Tensor:
    """Algorithm 1 on a matrix [N, K], float64: what stays is updated to make up for what goes.

    The mask is chosen block by block of columns, over all rows, for unstructured zeros (their number exact, spread
    evenly over the columns), and group by group in every row for N:M. Returns the new matrix.
    """
    weight = weight.clone()
    weight[:, factor.dead] = 0
    upper, diagonal = factor.upper, factor.upper.diagonal()
    columns = weight.shape[1]
    group = pattern.m if pattern.kind == "n:m" else block
    block -= block % group if group < block else block - group
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        part = weight[:, start:stop].clone()
        kept = torch.empty(part.shape, dtype=torch.bool, device=part.device)
        errors = torch.empty_like(part)
        for column in range(start, stop):
            at = column - start
            if column % group == 0:
                here = slice(at, min(at + group, stop - start))
                scores = (part[:, here] / diagonal[column : column + group][: stop - column]).square()
                kept[:, here] = _keep(scores, _share(zeros, column, min(column + group, stop), columns), pattern)
            errors[:, at] = torch.where(kept[:, at], 0, part[:, at] / diagonal[column])
            part[:, at:] -= errors[:, at, None] * upper[column, column:stop]
        weight[:, start:stop] = torch.where(kept, part, 0)
        weight[:, stop:] -= errors @ upper[start:stop, stop:]
    return weight


def _keep(scores: torch.Tensor, zeros: int, pattern: Pattern) -> torch.Tensor:
    if pattern.kind == "n:m":
        return KeepNOfM(pattern.n, pattern.m).keep(0, scores.contiguous())
    return drop_lowest(scores.reshape(1, -1), [zeros]).view(scores.shape)


def _share(zeros: int, start: int, stop: int, columns: int) -> int:
    """The zeros of columns [start, stop): shares of all blocks sum to `zeros`."""
    return zeros * stop // columns - zeros * start // columns
