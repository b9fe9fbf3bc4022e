"""Tunes kernels: MetaSchedule's tasks, trials and database; a `Bench` builds each kernel and times it on its data."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from itertools import count
from math import inf
from pathlib import Path
from threading import Event
from typing import Any, Protocol

import tvm
from tvm.ir.utils import derived_object
from tvm.s_tir import meta_schedule as ms
from tvm.s_tir.meta_schedule.builder import BuilderResult, PyBuilder
from tvm.s_tir.meta_schedule.measure_callback import PyMeasureCallback
from tvm.s_tir.meta_schedule.runner import PyRunner, PyRunnerFuture, RunnerResult

from tvm_sparse.schedules import fast_parse  # noqa: F401  before MetaSchedule, which parses TVMScript when imported
from tvm_sparse.schedules.records import Log, Trial, fits
from tvm_sparse.schedules.search import Points, SearchPoints
from tvm_sparse.schedules.space import annotated_decisions, schedule_space, workload
from tvm_sparse.schedules.spec import KernelSpec

AT_ONCE = 8
"""Trials of one kernel between two looks at what they took."""

_STOPPED = "stopped"
_TARGET = tvm.target.Target({"kind": "llvm", "num-cores": 1})  # MetaSchedule asks for one; the spec says for whom


class Bench(Protocol):
    """Where kernels are built and timed. Both calls return at once, so that some are built while others run."""

    def build(self, spec: KernelSpec, decisions: dict[str, int]) -> Future[Path]:
        """The library with this one kernel, under its spec's name."""

    def run(self, spec: KernelSpec, library: Future[Path]) -> Future[Sequence[float]]:
        """Seconds of a call, one number for each kind of data."""


Progress = Callable[[KernelSpec, list[Trial]], None]


def tune(
    specs: Sequence[KernelSpec], log: Log, trials: int, bench: Bench, progress: Progress = lambda *_: None,
    stop: Event | None = None, seed: int = 0,
) -> None:  # fmt: skip
    """Tries as many schedules of each kernel as the log lacks of `trials`, or all there are.

    Kernels take turns, `AT_ONCE` trials each, so that while some run others are built. A trial that ran is written at
    the end of its kernel's turn; a failed one is only reported. `progress` is told of all trials of this call so far.
    Once `stop` is set nothing more is tried and what has run is written. (An exception, KeyboardInterrupt for one,
    would become another kind on its way through MetaSchedule.)
    """
    stop = stop or Event()
    tasks = [_Task(spec, log, trials, seed, progress, stop) for spec in specs]
    tasks = [task for task in tasks if task.missing]
    if not tasks:
        return
    handover = _Handover(bench, stop)
    with tempfile.TemporaryDirectory() as work:
        ms.tune.tune_tasks(
            tasks=[task.context() for task in tasks], task_weights=[1.0] * len(tasks), work_dir=work,
            max_trials_global=trials * len(tasks), max_trials_per_task=trials, num_trials_per_iter=AT_ONCE,
            builder=_Builder(handover), runner=_Runner(handover), database="memory", cost_model="random",
            measure_callbacks=[_Keep(tasks)], task_scheduler="round-robin",
        )  # fmt: skip


def missing(spec: KernelSpec, log: Log, trials: int) -> int:
    """How many trials the kernel lacks: none where its whole space has run."""
    return _Task(spec, log, trials, 0, lambda *_: None, Event()).missing


class _Task:
    """One kernel: what the log has of it, what is missing, and the trials of this run."""

    def __init__(self, spec: KernelSpec, log: Log, trials: int, seed: int, progress: Progress, stop: Event):
        self.spec, self.log, self.progress, self.stop = spec, log, progress, stop
        self.points = Points(spec, seed)
        known = [trial for trial in log.trials(spec) if fits(spec, trial.decisions)]
        for trial in known:
            self.points.learn(trial.decisions, trial.mean)
        self.missing = max(0, min(trials, self.points.size) - len(known))
        self.done: list[Trial] = []

    def context(self) -> ms.TuneContext:
        quiet = logging.getLogger("tvm_sparse.tuning")
        quiet.setLevel(logging.ERROR)
        return ms.TuneContext(
            mod=workload(self.spec), target=_TARGET, task_name=self.spec.name, logger=quiet, num_threads=1,
            space_generator=ms.space_generator.ScheduleFn(schedule_space, postprocs=[]), rand_state=1,
            search_strategy=SearchPoints(self.spec, self.points, self.missing, self.stop),
        )  # fmt: skip

    def keep(self, candidate: Any, result: RunnerResult) -> None:
        decisions = annotated_decisions(candidate.sch.mod)[1]
        if result.error_msg == _STOPPED:
            return
        if result.error_msg is not None:
            self.done.append(Trial(decisions, (), str(result.error_msg)))
            self.points.learn(decisions, inf)
            return
        trial = Trial(decisions, tuple(float(s) for s in result.run_secs))
        self.done.append(trial)
        self.points.learn(decisions, trial.mean)
        self.log.add(self.spec, candidate, _TARGET, trial.seconds)


class _Handover:
    """From builder to runner, where MetaSchedule passes the name of a file: the kernel and its library to be."""

    def __init__(self, bench: Bench, stop: Event) -> None:
        self.bench, self.stop = bench, stop
        self._names = map(str, count())
        self._on_the_way: dict[str, tuple[KernelSpec, Future[Path]]] = {}

    def build(self, mod: tvm.IRModule) -> str:
        spec, decisions = annotated_decisions(mod)
        name = next(self._names)
        self._on_the_way[name] = spec, self.bench.build(spec, decisions)
        return name

    def run(self, name: str) -> Future[Sequence[float]]:
        return self.bench.run(*self._on_the_way.pop(name))


@derived_object
class _Builder(PyBuilder):
    def __init__(self, handover: _Handover) -> None:
        super().__init__()
        self.handover = handover

    def build(self, build_inputs: list) -> list:
        return [BuilderResult(self.handover.build(item.mod), None) for item in build_inputs]


@derived_object
class _Runner(PyRunner):
    def __init__(self, handover: _Handover) -> None:
        super().__init__()
        self.handover = handover

    def run(self, runner_inputs: list) -> list:
        running = (self.handover.run(str(item.artifact_path)) for item in runner_inputs)
        return [_Running(future, self.handover.stop) for future in running]


@derived_object
class _Running(PyRunnerFuture):
    def __init__(self, future: Future[Sequence[float]], stop: Event) -> None:
        super().__init__()
        self.future, self.stop = future, stop

    def done(self) -> bool:
        return self.future.done()

    def result(self) -> RunnerResult:
        while not wait([self.future], timeout=0.2).done:
            if self.stop.is_set():
                return RunnerResult(None, _STOPPED)
        try:
            return RunnerResult([float(s) for s in self.future.result()], None)
        except Exception as fault:
            return RunnerResult(None, f"{type(fault).__name__}: {fault}"[:500])


@derived_object
class _Keep(PyMeasureCallback):
    """In the place of MetaSchedule's own callbacks, which store failures as results."""

    def __init__(self, tasks: list[_Task]) -> None:
        super().__init__()
        self.tasks = tasks

    def apply(
        self, task_scheduler: Any, task_id: int, measure_candidates: list, builder_results: list, runner_results: list
    ) -> None:
        task = self.tasks[task_id]
        for candidate, result in zip(measure_candidates, runner_results, strict=True):
            task.keep(candidate, result)
        task.progress(task.spec, task.done)
