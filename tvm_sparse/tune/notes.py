"""What stands beside MetaSchedule's database: who ran what and when, and per kernel what came of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

from tvm_sparse.artefact.versions import installed
from tvm_sparse.artefact.writer import write_json
from tvm_sparse.bench.tables import Row, render
from tvm_sparse.errors import Refusal
from tvm_sparse.schedules.records import Trial
from tvm_sparse.schedules.spec import KernelSpec
from tvm_sparse.schedules.table import defaults

NOTES, TABLE = "machine.json", "tuning.md"


class Notes:
    """machine.json of one folder: the machine's name, TVM's version, runs, kernels by name and architecture."""

    def __init__(self, folder: Path):
        self._folder = folder
        path = folder / NOTES
        self._facts: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"runs": [], "kernels": {}}

    def begin(self, machine: str, command: str) -> None:
        """Notes a run. Raises Refusal where the folder is another machine's: its numbers would stand side by side."""
        there = self._facts.get("machine", machine)
        if there != machine:
            raise Refusal(f"{self._folder} holds records of {there}, this is {machine}: give --out another folder")
        versions = {name: str(version) for name, version in installed().items() if name != "artefact"}
        self._facts = {"machine": machine, **self._facts}
        self._facts["runs"].append({"date": date.today().isoformat(), "command": command, **versions})

    def other_data(self, spec: KernelSpec, sparsities: Sequence[float]) -> str:
        """What the kernel's records were timed on, in words; empty where it is this. Other times would not compare."""
        known = self._facts["kernels"].get(_key(spec))
        return f"sparsity {_list(known['sparsity'])}" if known and known["sparsity"] != list(sparsities) else ""

    def put(self, spec: KernelSpec, sparsities: Sequence[float], trials: Sequence[Trial]) -> None:
        """What the records of a kernel say: `trials` are all of this version of it, fastest first."""
        default = next((trial for trial in trials if trial.decisions == defaults(spec)), None)
        self._facts["kernels"][_key(spec)] = {
            "sparsity": list(sparsities),
            "trials": len(trials),
            "default us": [round(s * 1e6, 3) for s in default.seconds] if default else None,
            "best us": [round(s * 1e6, 3) for s in trials[0].seconds],
            "gain": round(default.mean / trials[0].mean, 4) if default else None,
            "decisions": trials[0].decisions,
        }
        self.write()

    def write(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        write_json(self._folder / NOTES, self._facts)
        if self._facts["kernels"]:
            (self._folder / TABLE).write_text(self._table(), encoding="utf-8")

    def _table(self) -> str:
        rows: list[Row] = [{
            "kernel": key, "sparsity": _list(facts["sparsity"]), "trials": facts["trials"],
            "default us": _list(facts["default us"] or []), "best us": _list(facts["best us"]),
            "gain": facts["gain"] or "", "decisions": _spelled(facts["decisions"]),
        } for key, facts in self._facts["kernels"].items()]  # fmt: skip
        runs = {f"run {i + 1}": ", ".join(map(str, run.values())) for i, run in enumerate(self._facts["runs"])}
        head = "Best and default schedules; where a kernel serves several shares of zeros, a time for each of them."
        return f"{head}\n\n{render(rows, 'md', {'machine': self._facts['machine'], **runs})}\n"


def _key(spec: KernelSpec) -> str:
    return f"{spec.name} {spec.arch}"


def _list(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _spelled(decisions: dict[str, int]) -> str:
    return ", ".join(f"{name} {value}" for name, value in decisions.items())
