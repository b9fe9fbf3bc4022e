"""Builds kernels in processes of their own, as many at a time as there are cores: TVM's part and nvcc's (or LLVM's)."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import count
from pathlib import Path

from tvm_sparse.schedules.spec import KernelSpec
from tvm_sparse.targets import MACHINES, Machine
from tvm_sparse.tune.worker import ignore_interrupts


class Builder:
    """Libraries in `folder`, `jobs` of them at a time (0: as many as there are cores)."""

    def __init__(self, machine: Machine, folder: Path, jobs: int = 0) -> None:
        self._machine, self._folder, self._numbers = machine.name, folder, count()
        cores = len(os.sched_getaffinity(0))
        self._pool = ProcessPoolExecutor(jobs or cores, multiprocessing.get_context("spawn"), ignore_interrupts)
        for _ in range(jobs or cores):
            self._pool.submit(_load)  # while the machine is asked for its name and data are packed

    def build(self, spec: KernelSpec, decisions: dict[str, int]) -> Future[Path]:
        """One kernel, under its spec's name."""
        return self._submit(_build_kernel, spec.to_json(), decisions, self._machine)

    def probe(self) -> Future[Path]:
        """A library for the CPU without any kernel, which knows the machine that loads it."""
        return self._submit(_build_probe)

    def close(self) -> None:
        """Forgets what is not begun; what is being built comes to its end."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _submit(self, function: Callable[..., Path], *arguments: object) -> Future[Path]:
        return self._pool.submit(function, str(self._folder / f"{next(self._numbers)}.so"), *arguments)


def _load() -> None:
    import tvm_sparse.schedules.table  # noqa: F401  TVM, most of all


def _build_kernel(path: str, spec_json: str, decisions: dict[str, int], machine: str) -> Path:
    import tvm

    from tvm_sparse.schedules.table import instantiate, write_decisions

    spec = KernelSpec.from_json(spec_json)
    kernel = instantiate(spec, decisions).with_attr("global_symbol", spec.name)
    if spec.device == "cuda":
        from tvm_sparse.codegen.cuda import build_cuda_library

        build_cuda_library(tvm.IRModule({spec.name: kernel}), path, [MACHINES[machine]])
        return Path(path)
    from tvm_sparse.codegen.cpu import compile_kernels

    noted = {spec.name: write_decisions(kernel, {spec.arch: decisions})}
    compile_kernels(noted, spec.arch).export_library(path)
    return Path(path)


def _build_probe(path: str) -> Path:
    import tvm

    from tvm_sparse.codegen.cpu import build_cpu_library

    build_cpu_library(tvm.IRModule({}), path)
    return Path(path)
