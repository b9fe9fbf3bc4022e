"""Tunes one kernel: MetaSchedule draws decisions from the kernel's space, `measure` times the kernel they make."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tvm

from tvm_sparse.schedules import fast_parse  # noqa: F401  before MetaSchedule, which parses TVMScript when imported
from tvm_sparse.schedules.records import RECORDS, WORKLOADS
from tvm_sparse.schedules.space import annotated_decisions, schedule_space, workload
from tvm_sparse.schedules.spec import KernelSpec
from tvm_sparse.schedules.table import instantiate

Measure = Callable[[tvm.tirx.PrimFunc, KernelSpec], Sequence[float]]
"""Times a finished kernel on data of its own: seconds of a call, several times over. Raises where it cannot run."""


@dataclass(frozen=True)
class Trial:
    decisions: dict[str, int]
    seconds: tuple[float, ...]
    error: str = ""


def tune(spec: KernelSpec, folder: str | Path, trials: int, measure: Measure, seed: int = 0) -> list[Trial]:
    """Measures up to `trials` different schedules of a kernel and adds them to the records in `folder`.

    The kernel in a trial comes from its decisions alone, so building and running are one step, in this process.
    """
    from tvm.ir.utils import derived_object
    from tvm.s_tir import meta_schedule as ms
    from tvm.s_tir.meta_schedule.builder import BuilderResult, PyBuilder
    from tvm.s_tir.meta_schedule.runner import PyRunner, PyRunnerFuture, RunnerResult

    done: list[Trial] = []

    @derived_object
    class Write(PyBuilder):
        def build(self, build_inputs: list) -> list:
            results = []
            for item in build_inputs:
                _, decisions = annotated_decisions(item.mod)
                path = Path(tempfile.mkdtemp(dir=work)) / "decisions.json"  # MetaSchedule removes its folder
                path.write_text(json.dumps(decisions))
                results.append(BuilderResult(str(path), None))
            return results

    @derived_object
    class Finished(PyRunnerFuture):
        def __init__(self, outcome: Any):
            super().__init__()
            self.outcome = outcome

        def done(self) -> bool:
            return True

        def result(self) -> Any:
            return self.outcome

    @derived_object
    class Run(PyRunner):
        def run(self, runner_inputs: list) -> list:
            results = []
            for item in runner_inputs:
                trial = _try(spec, json.loads(Path(item.artifact_path).read_text()), measure)
                done.append(trial)
                seconds = list(trial.seconds) if not trial.error else None
                results.append(Finished(RunnerResult(seconds, trial.error or None)))
            return results

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    database = ms.database.JSONDatabase(str(folder / WORKLOADS), str(folder / RECORDS))
    with tempfile.TemporaryDirectory() as work:
        ms.tune_tir(
            workload(spec), target=tvm.target.Target({"kind": "llvm", "num-cores": 1}), work_dir=work,
            max_trials_global=trials, num_trials_per_iter=min(trials, 8), builder=Write(), runner=Run(),
            database=database, cost_model="random", strategy="replay-trace", seed=seed, num_tuning_cores=1,
            space=ms.space_generator.ScheduleFn(schedule_space, postprocs=[]),
        )  # fmt: skip
    return done


def _try(spec: KernelSpec, decisions: dict[str, int], measure: Measure) -> Trial:
    try:
        seconds = measure(instantiate(spec, decisions), spec)
    except Exception as fault:
        return Trial(decisions, (), f"{type(fault).__name__}: {fault}"[:500])
    return Trial(decisions, tuple(float(s) for s in seconds))
