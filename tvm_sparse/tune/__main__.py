"""`python -m tvm_sparse.tune --target h200`: measures schedules of a model's kernels, and keeps what it measured.

    options -> the machine that measures -> the kernels the plan would use -> trials -> records, notes beside them
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import exp, log
from statistics import fmean
from threading import Event

from tvm_sparse.errors import Refusal, Stopped, run_command
from tvm_sparse.schedules.records import Log, Trial, fits
from tvm_sparse.schedules.spec import KernelSpec
from tvm_sparse.schedules.table import defaults
from tvm_sparse.tune.bench import WorkBench
from tvm_sparse.tune.measuring import meter_for
from tvm_sparse.tune.notes import Notes
from tvm_sparse.tune.options import TuneOptions, parse, workloads


def main(argv: Sequence[str]) -> None:
    began = time.perf_counter()
    options = parse(argv)
    if options.machine.is_gpu:
        from tvm_sparse.codegen.cuda_toolkit import find_toolkit

        find_toolkit()
    apart = not options.machine.is_gpu and options.server is None
    meter, stop = meter_for(options.machine, options.server), Event()
    with _interrupts(stop), WorkBench(options.machine, meter, options.jobs, apart) as bench:
        import tvm.s_tir.tensor_intrin  # noqa: F401  what MetaSchedule loads first: while other processes begin

        name = bench.machine()
        if options.machine.is_gpu and options.machine.name.upper() not in name.upper():
            raise Refusal(f"--target {options.machine.name}: this is {name}, and records are only of what ran")
        bench.data = workloads(options, bench.arch())
        tune_kernels(options, bench, name, " ".join(["python -m tvm_sparse.tune", *argv]), stop, began)


def tune_kernels(
    options: TuneOptions, bench: WorkBench, name: str, command: str, stop: Event, began: float = 0.0
) -> None:
    from tvm_sparse.schedules.tuning import missing, tune

    records, notes = Log(options.out), Notes(options.out)
    notes.begin(name, command)
    if not options.resume and (known := [spec.name for spec in bench.data if records.trials(spec)]):
        raise Refusal(
            f"{options.out} has records of {known[0]} and {len(known) - 1} other kernels of these: "
            "go on with --resume, or give --out another folder"
        )
    todo = []
    for spec, sparsities in bench.data.items():
        if other := notes.other_data(spec, sparsities):
            print(f"{spec.name}: left as it is, its records are of {other}", flush=True)
        elif missing(spec, records, options.trials):
            todo.append(spec)
    print(f"{name}: {len(todo)} kernels to tune, {len(bench.data) - len(todo)} have their trials", flush=True)
    report = _Progress(records, options.trials, todo, began or time.perf_counter())

    def turn(spec: KernelSpec, done: list[Trial]) -> None:
        report(spec, done)
        if trials := trials_of(records, spec):
            notes.put(spec, bench.data[spec], trials)

    # Kernels take turns where builds do not disturb what is measured.
    for group in ([spec] for spec in todo) if bench.apart else [todo]:
        tune(group, records, options.trials, bench, turn, stop)
        if stop.is_set():
            done = sum(not missing(spec, records, options.trials) for spec in bench.data)
            raise Stopped(
                f"{done} of {len(bench.data)} kernels are done and kept in {options.out}: "
                "the same command with --resume goes on"
            )
    report.close(bench.data)
    if failed := [spec.name for spec in bench.data if not records.trials(spec)]:
        raise Stopped(f"no schedule of {', '.join(failed)} ran: their first errors stand above")


def trials_of(records: Log, spec: KernelSpec) -> list[Trial]:
    """The records of a kernel as it is now, fastest first."""
    return [trial for trial in records.trials(spec) if fits(spec, trial.decisions)]


class _Progress:
    """A line for each turn of a kernel."""

    def __init__(self, records: Log, wanted: int, todo: Sequence[KernelSpec], began: float):
        self._records, self._wanted, self._todo, self._began = records, wanted, todo, began

    def __call__(self, spec: KernelSpec, done: Sequence[Trial]) -> None:
        trials = trials_of(self._records, spec)
        failed = [trial for trial in done if trial.error]
        parts = [f"{len(trials)} of {self._wanted} trials"]
        if trials:
            chosen = ", ".join(f"{name} {value}" for name, value in trials[0].decisions.items())
            parts.append(f"best {trials[0].mean * 1e6:.2f} us ({chosen})")
        if default := _default(spec, trials):
            parts.append(f"default {default.mean * 1e6:.2f} us, {default.mean / trials[0].mean:.3f} times")
        if failed:
            parts.append(f"{len(failed)} failed, the first: {failed[0].error}")
        place = f"[{self._todo.index(spec) + 1}/{len(self._todo)}, {time.perf_counter() - self._began:.0f} s]"
        print(f"{place} {spec.name}: {', '.join(parts)}", flush=True)

    def close(self, data: Mapping[KernelSpec, object]) -> None:
        gains = []
        for spec in data:
            trials = trials_of(self._records, spec)
            if default := _default(spec, trials):
                gains.append(log(default.mean / trials[0].mean))
        if gains:
            print(f"the best over the default schedule: {exp(fmean(gains)):.3f} times (geometric mean of {len(gains)})")


def _default(spec: KernelSpec, trials: Sequence[Trial]) -> Trial | None:
    return next((trial for trial in trials if trial.decisions == defaults(spec)), None)


@contextmanager
def _interrupts(stop: Event) -> Iterator[None]:
    """Ctrl-C and SIGTERM set `stop`: what has run is still to be written."""
    former = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(run_command(main))
