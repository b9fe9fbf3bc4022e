"""What else multiplies on an NVIDIA GPU: cuBLAS, cuBLASLt, cuSPARSELt and cuSPARSE, through torch.

A `Rival` is a call and the tensors it reads anew at every call. Those that need a form of their own say how far they
are from float64 themselves.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

Call = Callable[..., object]


@dataclass(frozen=True)
class Rival:
    """`call(*tensors)`, where `tensors` are the weights; `result` is y [m, n] of the latest call."""

    tensors: tuple[torch.Tensor, ...]
    call: Call
    result: Callable[[], torch.Tensor]


@contextmanager
def blas(library: str) -> Iterator[None]:
    """torch's products go to "cublas" or "cublaslt"."""
    former = torch.backends.cuda.preferred_blas_library(library)
    try:
        yield
    finally:
        torch.backends.cuda.preferred_blas_library(former)


def dense(x: torch.Tensor, weight: torch.Tensor) -> Rival:
    """torch.mm; which library does it is for `blas` to say."""
    y = torch.full((x.shape[0], weight.shape[0]), torch.nan, dtype=x.dtype, device=x.device)
    return Rival((weight,), lambda w: torch.mm(x, w.T, out=y), lambda: y)


def two_four(x: torch.Tensor, weight: torch.Tensor) -> Rival:
    """cuSPARSELt: the two larger of every four weights, compressed; tokens rounded up to 8, as it wants them, and the
    algorithm that its own search finds.

    Its matrix is another one at every share of zeros but a half: 2:4 is the only pattern it has.
    """
    groups = weight.view(weight.shape[0], -1, 4)
    keep = groups.abs().argsort(-1).argsort(-1) >= 2
    compressed = torch._cslt_compress((groups * keep).view_as(weight))
    padded = torch.zeros(-(-x.shape[0] // 8) * 8, x.shape[1], dtype=x.dtype, device=x.device)
    padded[: x.shape[0]] = x
    fastest = torch._cslt_sparse_mm_search(compressed, padded.T)
    out: list[torch.Tensor] = []

    def call(packed: torch.Tensor) -> None:
        out[:] = [torch._cslt_sparse_mm(packed, padded.T, alg_id=fastest)]

    return Rival((compressed,), call, lambda: out[0].T[: x.shape[0]])


def two_four_wanted(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """float64 [m, n] of the matrix `two_four` keeps."""
    groups = weight.view(weight.shape[0], -1, 4)
    keep = groups.abs().argsort(-1).argsort(-1) >= 2
    return x.double() @ (groups * keep).view_as(weight).double().T


def csr(x: torch.Tensor, weight: torch.Tensor) -> Rival:
    """cuSPARSE, CSR with 32-bit indices: its matrix-vector product for one token, else its matrix product."""
    shape = tuple(weight.shape)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls CSR a prototype
        sparse = weight.to_sparse_csr()
    parts = (sparse.crow_indices().int(), sparse.col_indices().int(), sparse.values())
    tokens = x[0] if x.shape[0] == 1 else x.T.contiguous()
    out: list[torch.Tensor] = []

    def call(rows: torch.Tensor, columns: torch.Tensor, values: torch.Tensor) -> None:
        out[:] = [torch.sparse_csr_tensor(rows, columns, values, size=shape, check_invariants=False) @ tokens]

    return Rival(parts, call, lambda: out[0].view(shape[0], -1).T)
