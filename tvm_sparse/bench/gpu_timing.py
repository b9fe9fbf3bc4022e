"""Timing on a GPU: captured graphs over rotating copies. Nothing here imports TVM's compiler.

A graph holds at least 64 calls and its copies of the weights exceed the L2 cache four times; a call that does not know
the kernel before it pays for the whole of itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import ceil
from pathlib import Path
from typing import Any

import torch

from tvm_sparse.engine.runtime import load_cuda
from tvm_sparse.targets import Machine

CALLS = 64
TOLERANCE = 4e-3  # relative, of a whole output: rounding it to bfloat16 leaves 1.7e-3
_LONGEST = 1.0  # seconds of replays: slow products have fewer rounds, though never less than 3


class Kernels:
    """The functions of a compiled library by name."""

    def __init__(self, library: Path) -> None:
        torch.zeros(1, device="cuda")  # loads the CUDA runtime that torch carries
        load_cuda()
        import tvm_ffi

        self._stream = tvm_ffi.use_torch_stream
        self._module = tvm_ffi.load_module(str(library.resolve()))

    def __getitem__(self, name: str) -> Callable[..., Any]:
        return self._module[name]

    def replays(self, calls: Sequence[Callable[[], object]], rounds: int) -> tuple[float, ...]:
        """Seconds of one call, for each replay of a graph that makes every call as often, at least CALLS in all.

        Every call runs once before, outside of the graph, and two replays warm up.
        """
        for call in calls:
            call()
        graph = torch.cuda.CUDAGraph()
        with self._stream(torch.cuda.graph(graph)):
            for call in list(calls) * ceil(CALLS / len(calls)):
                call()
        count = len(calls) * ceil(CALLS / len(calls))

        def replay() -> float:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            return start.elapsed_time(end) * 1e-3

        longest = max(replay(), replay())
        rounds = max(min(rounds, 3), min(rounds, int(_LONGEST / longest)))
        return tuple(replay() / count for _ in range(rounds))


def rotating(buffers: Iterable[torch.Tensor], machine: Machine) -> list[list[torch.Tensor]]:
    """Copies of a packed matrix: when the first has its turn again, nothing of it is left in the cache."""
    buffers = list(buffers)
    count = max(2, ceil(4 * machine.l2 / sum(tensor.nbytes for tensor in buffers)) + 1)
    return [[tensor.clone() for tensor in buffers] for _ in range(count)]


def random_sparse(shape: tuple[int, int], sparsity: float) -> torch.Tensor:
    """Normal weights with the smallest set to zero, as pruning by magnitude leaves them."""
    generator = torch.Generator("cuda").manual_seed(0)
    weight = torch.empty(shape, device="cuda").normal_(0, 0.0111, generator=generator)
    cut = weight.abs().flatten()[: 1 << 22].quantile(sparsity)
    return weight.mul_(weight.abs() > cut).bfloat16()


def random_tokens(count: int, k: int) -> torch.Tensor:
    return torch.randn(count, k, device="cuda", generator=torch.Generator("cuda").manual_seed(1)).bfloat16()


def relative_error(y: torch.Tensor, want: torch.Tensor) -> float:
    """Against a float64 reference; NaN where y has one."""
    return float((y.double() - want).norm() / want.norm())
