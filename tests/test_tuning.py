"""Tuning: what is tried and kept, how records are found again, and the command on a CPU, alone and over TVM's RPC."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import replace
from math import prod
from threading import Event

import tvm

from tvm_sparse.formats import FORMATS
from tvm_sparse.passes.apply_schedules import ApplySchedules
from tvm_sparse.schedules.records import RECORDS, Log, Records
from tvm_sparse.schedules.space import is_sketch, sketch
from tvm_sparse.schedules.spec import KernelSpec
from tvm_sparse.schedules.table import defaults, read_decisions, space
from tvm_sparse.schedules.tuning import tune
from tvm_sparse.targets import MACHINES

BITMAP = KernelSpec(FORMATS["bitmap"].choice(), 48, 64, 2, "bfloat16", "bfloat16", "avx512")


class Pretend:
    """A bench without a machine: what a schedule takes is told by `cost`, which may raise."""

    def __init__(self, cost):
        self.cost = cost
        self.ran = []

    def build(self, spec, decisions):
        built = Future()
        built.set_result(decisions)
        return built

    def run(self, spec, library):
        done = Future()
        self.ran.append(library.result())
        try:
            done.set_result(self.cost(library.result()))
        except ValueError as fault:
            done.set_exception(fault)
        return done


def far(decisions):
    """Fastest where every decision is at its largest."""
    return [1.0 / (1 + sum(decisions.values()))]


def test_no_schedule_runs_twice_and_the_default_runs_first(tmp_path):
    bench = Pretend(far)
    tune([BITMAP], Log(tmp_path), 6, bench)
    assert bench.ran[0] == defaults(BITMAP)
    assert len(bench.ran) == 6 == len({tuple(point.items()) for point in bench.ran})
    assert len(Log(tmp_path).trials(BITMAP)) == 6


def test_a_second_run_does_what_is_missing_and_a_third_nothing(tmp_path):
    other = replace(BITMAP, n=96)
    tune([BITMAP], Log(tmp_path), 4, Pretend(far))
    bench = Pretend(far)
    tune([BITMAP, other], Log(tmp_path), 6, bench)
    assert len(bench.ran) == 2 + 6
    assert len({tuple(trial.decisions.items()) for trial in Log(tmp_path).trials(BITMAP)}) == 6
    bench = Pretend(far)
    tune([BITMAP, other], Log(tmp_path), 6, bench)
    assert bench.ran == []


def test_a_whole_space_is_enough(tmp_path):
    size = prod(len(decision.choices) for decision in space(BITMAP))
    bench = Pretend(far)
    tune([BITMAP], Log(tmp_path), size + 100, bench)
    assert len(bench.ran) == size
    best = {decision.name: max(decision.choices) for decision in space(BITMAP)}
    assert Log(tmp_path).trials(BITMAP)[0].decisions == best


def test_a_failure_is_told_and_never_stored(tmp_path):
    def cost(decisions):
        if decisions == defaults(BITMAP):
            raise ValueError("does not fit")
        return far(decisions)

    told = []
    tune([BITMAP], Log(tmp_path), 3, Pretend(cost), lambda spec, trials: told.extend(trials))
    assert [trial.error for trial in told if trial.error] == ["ValueError: does not fit"]
    stored = Log(tmp_path).trials(BITMAP)
    assert len(stored) == 2 and defaults(BITMAP) not in [trial.decisions for trial in stored]
    assert len((tmp_path / RECORDS).read_text().splitlines()) == 2


def test_a_stopped_run_keeps_what_has_run(tmp_path):
    bench, stop = Pretend(far), Event()
    tune([BITMAP], Log(tmp_path), 30, bench, lambda *_: stop.set(), stop)
    assert 0 < len(bench.ran) < 30
    assert len(Log(tmp_path).trials(BITMAP)) == len(bench.ran)


def test_apply_schedules_replays_the_fastest_record(tmp_path):
    cpu = MACHINES["cpu"]
    tune([BITMAP], Log(tmp_path / cpu.logs), 6, Pretend(far))
    best = Log(tmp_path / cpu.logs).trials(BITMAP)[0].decisions
    records = Records(cpu, tmp_path)
    assert records.find(BITMAP).decisions == best and records.find(BITMAP).origin == "tuned on cpu"
    assert records.find(replace(BITMAP, n=64)).decisions is None
    assert Records(MACHINES["h200"], tmp_path).find(BITMAP).origin == "default"

    mod = tvm.IRModule({"kernel": sketch(replace(BITMAP, arch="x86-64"))})
    applied = ApplySchedules(records)(mod)["kernel"]
    assert read_decisions(applied) == {"avx512": best}
    assert not is_sketch(applied)


def test_a_b200_takes_what_an_h200_found(tmp_path):
    """For its own cut of the format, and only while it has no record itself."""
    h200, b200 = MACHINES["h200"], MACHINES["b200"]
    lent = KernelSpec(FORMATS["delta"].choice(4, h200.cores), 5120, 6144, 1, "bfloat16", "bfloat16", h200.arch)
    own = replace(lent, choice=FORMATS["delta"].choice(4, b200.cores), arch=b200.arch)
    tune([lent], Log(tmp_path / h200.logs), 4, Pretend(far))
    found = Records(b200, tmp_path).find(own)
    assert found.decisions == Log(tmp_path / h200.logs).trials(lent)[0].decisions
    assert found.origin == "transferred from nvidia-h200"
    assert Records(h200, tmp_path).find(lent).origin == "tuned on nvidia-h200"
    tune([own], Log(tmp_path / b200.logs), 1, Pretend(far))
    assert Records(b200, tmp_path).find(own).origin == "tuned on nvidia-b200"


def test_a_record_of_another_version_of_the_kernel_is_ignored_with_a_word(tmp_path, capsys, monkeypatch):
    from tvm_sparse.schedules import records

    tune([BITMAP], Log(tmp_path / "cpu"), 2, Pretend(far))
    monkeypatch.setattr(records, "space", lambda spec: space(spec)[1:])
    found = Records(MACHINES["cpu"], tmp_path).find(BITMAP)
    assert found.decisions is None and "another version" in found.origin
    assert "another version of the kernel" in capsys.readouterr().err
