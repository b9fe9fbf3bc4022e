"""What a measuring process is asked, and who answers: a GPU, the CPU, or a machine behind TVM's RPC.

All three pack random weights with a share of zeros as the kernel's format wants them, check a kernel's result against
float64 first, and let it read rotating copies that no cache holds. They live in the process of a `Worker`, where data
are kept between calls; this module loads neither torch nor TVM.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tvm_sparse.targets import Machine
from tvm_sparse.tune.options import Server

ROUNDS = 7


@dataclass(frozen=True)
class Job:
    """A library with the kernel of `spec` (a KernelSpec as JSON), to be timed with each of these shares of zeros."""

    spec: str
    library: str
    sparsities: tuple[float, ...]


class Wrong(Exception):
    """A kernel's result is further from float64 than rounding explains."""


class Meter(Protocol):
    """Picklable; its methods run in the measuring process."""

    def machine(self) -> str:
        """What the hardware calls itself. Raises Refusal where it is not there."""

    def isa(self, probe: Path) -> str:
        """The best of CPU_ISAS that the machine has, asked of a library that knows."""

    def measure(self, job: Job) -> Sequence[float]:
        """Seconds of one call, a median for each share of zeros. Raises Wrong, or whatever the kernel does."""


def meter_for(machine: Machine, server: Server | None) -> Meter:
    if server is not None:
        from tvm_sparse.tune.remote import RemoteMeter

        return RemoteMeter(machine.name, server)
    if machine.is_gpu:
        from tvm_sparse.tune.gpu import GpuMeter

        return GpuMeter(machine.name)
    from tvm_sparse.tune.cpu import CpuMeter

    return CpuMeter()
