"""Tuning records: MetaSchedule's own JSON database in `tuning_logs/<target>/`, looked up by kernel spec."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tvm

from tvm_sparse.schedules import fast_parse  # noqa: F401  before MetaSchedule, which parses TVMScript when imported
from tvm_sparse.schedules.space import annotated_decisions, workload
from tvm_sparse.schedules.spec import KernelSpec
from tvm_sparse.schedules.table import space

WORKLOADS, RECORDS = "database_workload.json", "database_tuning_record.json"

# MetaSchedule stores a failed trial as 1e10 seconds; no kernel here takes a minute.
_FAILED = 60.0


class Records:
    """The records of one folder; a folder without records answers None to everything."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._database: Any = None
        self._found: dict[KernelSpec, dict[str, int] | None] = {}

    def find(self, spec: KernelSpec) -> dict[str, int] | None:
        """The decisions of the fastest successful trial for exactly this spec.

        None too where the kernel's template has changed since: a decision that is no longer in its space.
        """
        if spec not in self._found:
            self._found[spec] = self._look_up(spec)
        return self._found[spec]

    def _look_up(self, spec: KernelSpec) -> dict[str, int] | None:
        if self._database is None:
            if not (self.folder / RECORDS).is_file():
                return None
            self._database = open_database(self.folder)
        mod = workload(spec)
        if not self._database.has_workload(mod):
            return None
        # commit_workload only returns the workload where it is known
        for record in self._database.get_top_k(self._database.commit_workload(mod), 1):
            if float(sum(record.run_secs)) / len(record.run_secs) < _FAILED:
                return _replay(record, mod)
        return None


def open_database(folder: Path) -> Any:
    from tvm.s_tir.meta_schedule.database import JSONDatabase

    return JSONDatabase(str(folder / WORKLOADS), str(folder / RECORDS))


def _replay(record: Any, mod: tvm.IRModule) -> dict[str, int] | None:
    schedule = tvm.s_tir.Schedule(mod)
    record.trace.apply_to_schedule(schedule, remove_postproc=False)
    try:
        spec, decisions = annotated_decisions(schedule.mod)
    except KeyError:
        return None
    fits = all(decisions[decision.name] in decision.choices for decision in space(spec))
    return decisions if fits else None
