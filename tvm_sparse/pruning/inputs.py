"""What calibration tells of a matrix: sums over the tokens of its input x [K], in float64."""

from __future__ import annotations

import torch

_DAMPING = 0.01


class Inputs:
    """Sum of x x^T (`whole`: [K, K]), or its diagonal alone: what SparseGPT and what Wanda need.

    With `follow` also of x' x^T, x' being what the dense model has in the place of x.
    """

    def __init__(self, columns: int, whole: bool, device: torch.device, follow: bool = False) -> None:
        self.tokens = 0
        self._whole = whole
        shape = (columns, columns) if whole else (columns,)
        self._sum = torch.zeros(shape, dtype=torch.float64, device=device)
        self._cross = torch.zeros_like(self._sum) if follow else None

    def add(self, x: torch.Tensor, dense: torch.Tensor | None = None) -> None:
        """x and x' [*, K]: the products in their own dtype, the sums over batches in float64."""
        x = x.detach().reshape(-1, x.shape[-1])
        self.tokens += len(x)
        self._sum += x.T @ x if self._whole else x.double().square().sum(0)
        if self._cross is not None and dense is not None:
            self._cross += dense.detach().reshape(x.shape).T @ x

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

    def following(self, weight: torch.Tensor, share: float) -> torch.Tensor:
        """A matrix [N, K] moved so that W x comes closer to the dense model's W x', by this share of the way.

        The way is to the least squares solution, damped: W (sum x' x^T) (sum x x^T)^-1.
        """
        if self._cross is None:
            return weight
        damped = self.gram.clone()
        damped.diagonal().add_(_DAMPING * float(damped.diagonal().mean()) or 1.0)
        drift = weight @ (self._cross - self.gram)
        return weight + share * torch.linalg.solve(damped, drift, left=False)
