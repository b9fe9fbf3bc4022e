"""What calibration tells of a matrix: sums over the tokens of its input x [K], in float64."""

from __future__ import annotations

import torch


class Inputs:
    """Sum of x x^T (`gram`, [K, K]), or its diagonal alone: what SparseGPT and what Wanda need."""

    def __init__(self, columns: int, whole: bool, device: torch.device) -> None:
        self.tokens = 0
        self._whole = whole
        shape = (columns, columns) if whole else (columns,)
        self._sum = torch.zeros(shape, dtype=torch.float64, device=device)

    def add(self, x: torch.Tensor) -> None:
        """x [*, K]: the products in its own dtype, their sums over batches in float64."""
        x = x.detach().reshape(-1, x.shape[-1])
        self.tokens += len(x)
        self._sum += x.T @ x if self._whole else x.double().square().sum(0)

    @property
    def gram(self) -> torch.Tensor:
        if not self._whole:
            raise ValueError("only the diagonal was summed")
        return self._sum

    @property
    def norms(self) -> torch.Tensor:
        """The L2 norm of every input feature over all tokens [K]."""
        return (self._sum.diagonal() if self._whole else self._sum).sqrt()

    @property
    def finite(self) -> bool:
        return bool(self._sum.isfinite().all())
