"""Tuning records: MetaSchedule's own JSON database, a folder for each machine that ran, looked up by kernel spec."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import tvm

from tvm_sparse.schedules import fast_parse  # noqa: F401  before MetaSchedule, which parses TVMScript when imported
from tvm_sparse.schedules.space import annotated_decisions, workload
from tvm_sparse.schedules.spec import CPU_ISAS, KernelSpec
from tvm_sparse.schedules.table import SPEC_ATTR, space
from tvm_sparse.targets import MACHINES, Machine

TUNING_LOGS = Path(__file__).resolve().parent.parent / "tuning_logs"
WORKLOADS, RECORDS = "database_workload.json", "database_tuning_record.json"

# MetaSchedule's own callback stores a failed trial as 1e10 seconds; no kernel here takes a minute.
_FAILED = 60.0

_BY_THE_MATRIX = {"gap_bits", "width", "rows", "cols"}  # options of formats; all others are a machine's cut


@dataclass(frozen=True)
class Trial:
    """One schedule of a kernel and what a call with it takes: seconds, one number for each kind of data it was given.

    `error` says why there is no number.
    """

    decisions: dict[str, int]
    seconds: tuple[float, ...]
    error: str = ""

    @property
    def mean(self) -> float:
        return fmean(self.seconds)


class Log:
    """The records of one folder; one without records has no trials."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._database: Any = None

    def trials(self, spec: KernelSpec) -> list[Trial]:
        """Everything that ran for exactly this spec, fastest first; of another version of the kernel, too."""
        if self._database is None and not (self.folder / RECORDS).is_file():
            return []
        mod = workload(spec)
        if not self._open().has_workload(mod):
            return []
        # commit_workload only returns the workload where it is known
        found = self._open().get_top_k(self._open().commit_workload(mod), 1 << 20)
        trials = (Trial(_replay(record, mod), tuple(float(s) for s in record.run_secs)) for record in found)
        return [trial for trial in trials if trial.seconds and trial.mean < _FAILED]

    def specs(self) -> tuple[KernelSpec, ...]:
        """Every kernel there is a record of, in the order of their first ones."""
        if self._database is None and not (self.folder / RECORDS).is_file():
            return ()
        records = self._open().get_all_tuning_records()
        return tuple(dict.fromkeys(KernelSpec.from_json(r.workload.mod["main"].attrs[SPEC_ATTR]) for r in records))

    def add(self, spec: KernelSpec, candidate: Any, target: tvm.target.Target, seconds: tuple[float, ...]) -> None:
        """Writes a trial that ran: `candidate` is MetaSchedule's, of the spec's `workload`."""
        from tvm.s_tir.meta_schedule.database import TuningRecord

        known = self._open().commit_workload(workload(spec))
        record = TuningRecord(candidate.sch.trace, known, list(seconds), target, candidate.args_info)
        self._open().commit_tuning_record(record)

    def _open(self) -> Any:
        if self._database is None:
            from tvm.s_tir.meta_schedule.database import JSONDatabase

            self.folder.mkdir(parents=True, exist_ok=True)
            self._database = JSONDatabase(str(self.folder / WORKLOADS), str(self.folder / RECORDS))
        return self._database


@dataclass(frozen=True)
class Found:
    """What the records say of a kernel: decisions, None for the default schedule, and in words where from."""

    decisions: dict[str, int] | None
    origin: str


class Records:
    """What a build for `machine` looks up: its own folder in `root` first, then that of its lender."""

    def __init__(self, machine: Machine, root: str | Path = TUNING_LOGS):
        self._machine = machine
        lenders = [MACHINES[machine.lender]] if machine.lender else []
        self._logs = [(owner, Log(Path(root) / owner.logs)) for owner in (machine, *lenders)]
        self._found: dict[KernelSpec, Found] = {}

    def find(self, spec: KernelSpec) -> Found:
        """The fastest trial whose decisions this version of the kernel has; others are ignored with a word."""
        if spec not in self._found:
            self._found[spec] = self._look_up(spec)
        return self._found[spec]

    def tuned(self, spec: KernelSpec) -> dict[str, dict[str, int]]:
        """The decisions of records by architecture: a CPU library has a kernel for each of its instruction sets."""
        archs = CPU_ISAS if spec.device == "cpu" else (spec.arch,)
        found = {arch: self.find(replace(spec, arch=arch)).decisions for arch in archs}
        return {arch: decisions for arch, decisions in found.items() if decisions is not None}

    def _look_up(self, spec: KernelSpec) -> Found:
        product = _alone(spec)
        alone = "" if spec == product else ", the product alone"
        origin = "default"
        for owner, log in self._logs:
            how = "tuned on" if owner == self._machine else "transferred from"
            lent = product if owner == self._machine else _lent(product, owner, log)
            trials = log.trials(lent)
            for trial in trials:
                if fits(spec, trial.decisions):
                    return Found(trial.decisions, f"{how} {owner.logs}{alone}")
            if trials:
                origin = f"default: the records in {owner.logs} are of another version of the kernel"
                print(f"  {spec.name}: {origin}", file=sys.stderr)
        return Found(None, origin)


def fits(spec: KernelSpec, decisions: dict[str, int]) -> bool:
    """Whether these are decisions of the kernel's template as it is now."""
    choices = {decision.name: decision.choices for decision in space(spec)}
    return decisions.keys() == choices.keys() and all(value in choices[name] for name, value in decisions.items())


def _alone(spec: KernelSpec) -> KernelSpec:
    """The product by itself: what a kernel does besides, and which rows are neighbours, changes no decision."""
    options = tuple(option for option in spec.choice.options if option[0] != "pairs")
    return replace(spec.alone, choice=replace(spec.choice, options=options))


def _lent(spec: KernelSpec, owner: Machine, log: Log) -> KernelSpec:
    """The kernel in `owner`'s log that does the same there: its architecture, its cut of the format.

    Options that a matrix decides are the same; of several cuts the one that agrees in the most options.
    """

    def same(other: KernelSpec) -> bool:
        own, its = dict(spec.choice.options), dict(other.choice.options)
        decided = own.keys() == its.keys() and all(own[key] == its[key] for key in own.keys() & _BY_THE_MATRIX)
        return decided and other.arch == owner.arch and replace(other, choice=spec.choice, arch=spec.arch) == spec

    def agreement(other: KernelSpec) -> int:
        return len(set(other.choice.options) & set(spec.choice.options))

    candidates = [other for other in log.specs() if other.choice.name == spec.choice.name and same(other)]
    return max(candidates, key=agreement, default=spec)


def _replay(record: Any, mod: tvm.IRModule) -> dict[str, int]:
    schedule = tvm.s_tir.Schedule(mod)
    record.trace.apply_to_schedule(schedule, remove_postproc=False)
    return annotated_decisions(schedule.mod)[1]
