"""What the tests of packed products share: a matrix with every difficulty, and how close to float64 is close enough."""

from __future__ import annotations

from pathlib import Path

import torch
from emulated_tensor_cores import Kernels

from tvm_sparse.formats import pack
from tvm_sparse.schedules.spec import KernelSpec
from tvm_sparse.schedules.table import decoder, instantiate


def matrix(n: int, k: int) -> torch.Tensor:
    """A full row beside empty ones, rows of very different density, values outside the window."""
    generator = torch.Generator().manual_seed(n * k)
    weight = torch.randn(n, k, generator=generator) * 0.02
    weight *= torch.rand(n, k, generator=generator) < torch.rand(n, 1, generator=generator) * 0.6
    weight[0], weight[n // 3], weight[n // 2] = 0, 0, torch.randn(k, generator=generator)
    weight.view(-1)[:: n * k // 5 + 1] = 1e-20
    return weight.bfloat16()


def close(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether y is x W^T within a rounding to y's dtype and the error of float32 sums over a row of products."""
    want = x.double() @ weight.double().T
    rounding = 2**-8 if y.dtype == torch.bfloat16 else 2**-23
    allowed = want.abs() * rounding + (x.double().abs() @ weight.double().abs().T) * 2**-20
    return bool(((y.double() - want).abs() <= allowed).all())


def multiplies(
    spec: KernelSpec, decisions: dict, tokens: int, bins: int, warps: int, folder: Path, shim: str = ""
) -> bool:
    """Whether the kernel, on `bins` x turns of 8 or 16 tokens CTAs, computes x W^T."""
    kernels = Kernels(instantiate(spec, decisions), "kernel", folder, shim=shim)
    weight = matrix(spec.n, spec.k)
    x = torch.randn(tokens, spec.k, generator=torch.Generator().manual_seed(1)).to(getattr(torch, spec.x_dtype))
    y = torch.full((tokens, spec.n), float("nan"), dtype=getattr(torch, spec.out_dtype))
    turns = -(-tokens // (8 if spec.m is not None and spec.m <= 8 else 16))
    values = {"x": x, "y": y, **pack(weight, spec.choice).buffers, "n": tokens}
    kernels.run("kernel_kernel", (bins, turns), 32 * warps, values)
    return close(y, x, weight)


def decodes(spec: KernelSpec, bins: int, warps: int, folder: Path, shim: str = "") -> bool:
    """Whether the decoder, on `bins` CTAs, gives the matrix back bit for bit."""
    kernels = Kernels(decoder(spec), "kernel", folder, shim=shim)
    weight = matrix(spec.n, spec.k)
    dense = torch.full((spec.n, spec.k), float("nan"), dtype=torch.bfloat16)
    kernels.run("kernel_kernel", (bins,), 32 * warps, {"w": dense, **pack(weight, spec.choice).buffers})
    return torch.equal(dense.view(torch.int16), weight.view(torch.int16).masked_fill(weight == 0, 0))
