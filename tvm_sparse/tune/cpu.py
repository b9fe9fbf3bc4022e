"""Times a kernel on this machine's CPU with all of its cores, over rotating copies of 1 GB."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache
from math import ceil
from pathlib import Path
from statistics import median

import torch

from tvm_sparse.bench.cpu_kernel import CpuKernel, set_threads
from tvm_sparse.bench.cpu_race import cpu_name, first_wrong, random_sparse
from tvm_sparse.bench.timing import Contender, race
from tvm_sparse.formats import FormatChoice, Packed, pack
from tvm_sparse.schedules.spec import CPU_ISAS, KernelSpec
from tvm_sparse.tune.measuring import ROUNDS, Job, Wrong

COPIES = 1 << 30
_MOST = 64  # copies of a small matrix, however small


@dataclass(frozen=True)
class CpuMeter:
    def machine(self) -> str:
        return cpu_name()

    def isa(self, probe: Path) -> str:
        import tvm_ffi

        return CPU_ISAS[tvm_ffi.load_module(str(probe)).get_function("tvm_sparse_isa", query_imports=True)()]

    def measure(self, job: Job) -> tuple[float, ...]:
        set_threads(len(os.sched_getaffinity(0)))
        spec = KernelSpec.from_json(job.spec)
        assert spec.m is not None, "a kernel is timed with a number of tokens"
        kernel = CpuKernel(spec, Path(job.library))
        x, seconds = random_tokens(spec), []
        for sparsity in job.sparsities:
            packed = packed_matrix((spec.n, spec.k), sparsity, spec.choice)
            check(spec, sparsity, kernel(x, packed))
            count = min(_MOST, max(2, ceil(COPIES / packed.nbytes)))
            copies = [{name: t.clone() for name, t in packed.buffers.items()} for _ in range(count)]
            (times,) = race([Contender("", packed.nbytes, [kernel.bind(x, copy) for copy in copies])], ROUNDS)
            seconds.append(median(times.rounds))
        return tuple(seconds)


def random_tokens(spec: KernelSpec) -> torch.Tensor:
    x = torch.randn(spec.m, spec.k, generator=torch.Generator().manual_seed(1))
    return x.to(getattr(torch, spec.x_dtype))


@lru_cache(maxsize=4)
def weight_matrix(shape: tuple[int, int], sparsity: float) -> torch.Tensor:
    return random_sparse(shape, sparsity)


@lru_cache(maxsize=4)
def packed_matrix(shape: tuple[int, int], sparsity: float, choice: FormatChoice) -> Packed:
    return pack(weight_matrix(shape, sparsity), choice)


def check(spec: KernelSpec, sparsity: float, y: torch.Tensor) -> None:
    """Raises Wrong where y is not the product of `random_tokens` and this matrix."""
    if (row := first_wrong(y, random_tokens(spec), weight_matrix((spec.n, spec.k), sparsity))) is not None:
        raise Wrong(f"wrong result in rows {row} and following at {sparsity:g}")
