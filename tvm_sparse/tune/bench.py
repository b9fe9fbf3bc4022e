"""Where `tune` builds and times: a pool of builders and one measuring process, kept apart where they must be."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from types import TracebackType

from tvm_sparse.schedules.spec import KernelSpec
from tvm_sparse.targets import Machine
from tvm_sparse.tune.builder import Builder
from tvm_sparse.tune.measuring import Job, Meter
from tvm_sparse.tune.worker import Worker

_FIRST, _LATER = 300.0, 60.0  # seconds: the first call on some data packs it, and the very first loads libraries


class WorkBench:
    """A `tvm_sparse.schedules.tuning.Bench`, and a context that ends its processes.

    `data` are the shares of zeros each kernel is timed on. With `apart` (a CPU that measures itself) nothing runs
    before everything asked for is built.
    """

    data: Mapping[KernelSpec, tuple[float, ...]]

    def __init__(self, machine: Machine, meter: Meter, jobs: int, apart: bool) -> None:
        self.apart = apart
        self._machine, self._meter = machine, meter
        self._folder = tempfile.TemporaryDirectory(prefix="tvm_sparse_tune_")
        self._builder = Builder(machine, Path(self._folder.name), jobs)
        self._building: set[Future[Path]] = set()
        self._thread = ThreadPoolExecutor(1)
        self._worker = Worker()
        self._name = self._thread.submit(self._worker.call, meter.machine, timeout=_FIRST)
        self._packed: set[tuple[object, ...]] = set()

    def machine(self) -> str:
        """What the hardware calls itself. Raises Refusal where it is not there."""
        return str(self._name.result())

    def arch(self) -> str:
        """The machine's; of a CPU the best instruction set it has."""
        if self._machine.is_gpu:
            return self._machine.arch
        probe = self._builder.probe()
        return str(self._worker.call(self._meter.isa, probe.result(), timeout=_FIRST))

    def build(self, spec: KernelSpec, decisions: dict[str, int]) -> Future[Path]:
        future = self._builder.build(spec, decisions)
        self._building.add(future)
        future.add_done_callback(self._building.discard)
        return future

    def run(self, spec: KernelSpec, library: Future[Path]) -> Future[Sequence[float]]:
        return self._thread.submit(self._run, spec, library)

    def _run(self, spec: KernelSpec, library: Future[Path]) -> Sequence[float]:
        if self.apart:
            wait(list(self._building))
        path, data = library.result(), (spec.choice, spec.n, spec.k)
        job = Job(spec.to_json(), str(path), self.data[spec])
        try:
            seconds: Sequence[float] = self._worker.call(
                self._meter.measure, job, timeout=_LATER if data in self._packed else _FIRST
            )
        finally:
            path.unlink(missing_ok=True)
        self._packed.add(data)
        return seconds

    def __enter__(self) -> WorkBench:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._worker.end()
        self._builder.close()
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._folder.cleanup()
