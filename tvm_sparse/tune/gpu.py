"""Times a kernel on this machine's GPU, as `bench kernels` does: captured graphs over rotating copies."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import median

import torch

from tvm_sparse.bench.gpu_timing import (
    TOLERANCE,
    Kernels,
    random_sparse,
    random_tokens,
    relative_error,
    rotating,
)
from tvm_sparse.errors import Refusal
from tvm_sparse.formats import FormatChoice, pack
from tvm_sparse.schedules.spec import KernelSpec
from tvm_sparse.targets import MACHINES
from tvm_sparse.tune.measuring import ROUNDS, Job, Wrong


@dataclass(frozen=True)
class GpuMeter:
    name: str

    def machine(self) -> str:
        if not torch.cuda.is_available():
            raise Refusal(f"--target {self.name}: no GPU here; tune where there is one, or name its server with --rpc")
        return torch.cuda.get_device_name(0)

    def isa(self, probe: Path) -> str:
        raise NotImplementedError("a GPU has one instruction set, its machine's arch")

    def measure(self, job: Job) -> tuple[float, ...]:
        spec = KernelSpec.from_json(job.spec)
        assert spec.m is not None, "a kernel is timed with a number of tokens"
        kernels = Kernels(Path(job.library))
        kernel = kernels[spec.name]
        x = random_tokens(spec.m, spec.k)
        seconds = []
        for sparsity in job.sparsities:
            copies = _copies((spec.n, spec.k), sparsity, spec.choice, self.name)
            y = torch.full((spec.m, spec.n), torch.nan, device="cuda").to(getattr(torch, spec.out_dtype))
            kernel(x, *copies[0], y)
            error = relative_error(y, _wanted((spec.n, spec.k), sparsity, spec.m))
            if not error < TOLERANCE:
                raise Wrong(f"relative error {error:.1e} at {sparsity:g}")
            calls = [lambda copy=copy, y=y: kernel(x, *copy, y) for copy in copies]  # type: ignore[misc]
            seconds.append(median(kernels.replays(calls, ROUNDS)))
        return tuple(seconds)


@lru_cache(maxsize=2)
def _weight(shape: tuple[int, int], sparsity: float) -> torch.Tensor:
    return random_sparse(shape, sparsity)


@lru_cache(maxsize=64)  # 0.3 to 0.7 GB each
def _copies(shape: tuple[int, int], sparsity: float, choice: FormatChoice, machine: str) -> list[list[torch.Tensor]]:
    packed = pack(_weight(shape, sparsity), choice)
    return rotating(packed.buffers.values(), MACHINES[machine])


@lru_cache(maxsize=128)
def _wanted(shape: tuple[int, int], sparsity: float, tokens: int) -> torch.Tensor:
    return random_tokens(tokens, shape[1]).double() @ _weight(shape, sparsity).double().T
