"""Tuning: what is tried and kept, how records are found again, and the command on a CPU, alone and over TVM's RPC."""

from __future__ import annotations

import json
import os
import time
from concurrent.futures import Future
from dataclasses import replace
from math import prod
from threading import Event

import pytest
import tvm

from tvm_sparse.errors import Refusal, Stopped
from tvm_sparse.formats import FORMATS
from tvm_sparse.formats.delta import with_pairs
from tvm_sparse.library import schedule_origins
from tvm_sparse.passes.apply_schedules import ApplySchedules
from tvm_sparse.schedules.records import RECORDS, Log, Records
from tvm_sparse.schedules.space import is_sketch, sketch
from tvm_sparse.schedules.spec import KernelSpec
from tvm_sparse.schedules.table import defaults, read_decisions, space
from tvm_sparse.schedules.tuning import tune
from tvm_sparse.targets import MACHINES
from tvm_sparse.tune.__main__ import main, tune_kernels
from tvm_sparse.tune.options import parse, workloads
from tvm_sparse.tune.worker import Crashed, Worker

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
    delta = replace(BITMAP, choice=FORMATS["delta"].choice(), m=8)
    size = prod(len(decision.choices) for decision in space(delta))
    bench = Pretend(far)
    tune([delta], Log(tmp_path), size + 100, bench)
    assert len(bench.ran) == size > 1
    best = {decision.name: max(decision.choices) for decision in space(delta)}
    assert Log(tmp_path).trials(delta)[0].decisions == best


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
    assert Records(b200, tmp_path).find(replace(own, choice=FORMATS["delta"].choice(5, b200.cores))).decisions is None
    assert Records(h200, tmp_path).find(lent).origin == "tuned on nvidia-h200"
    fused = replace(own, choice=with_pairs(own.choice), norm_eps=1e-6, after="silu_mul")
    assert Records(b200, tmp_path).find(fused).decisions == found.decisions
    assert Records(b200, tmp_path).find(fused).origin == "transferred from nvidia-h200, the product alone"
    shallow = Records(b200, tmp_path).find(replace(own, norm_eps=1e-6))  # has not all of the product's decisions
    assert shallow.decisions is None or shallow.decisions["depth"] <= 4
    records = Records(b200, tmp_path)
    applied = ApplySchedules(records)(tvm.IRModule({"kernel": sketch(own)}))
    said = schedule_origins(applied, records)[own.name]  # what the report says of it
    assert said == f"transferred from nvidia-h200: {json.dumps({own.arch: found.decisions}, sort_keys=True)}"
    tune([own], Log(tmp_path / b200.logs), 1, Pretend(far))
    assert Records(b200, tmp_path).find(own).origin == "tuned on nvidia-b200"


def test_a_record_of_another_version_of_the_kernel_is_ignored_with_a_word(tmp_path, capsys, monkeypatch):
    from tvm_sparse.schedules import records

    tune([BITMAP], Log(tmp_path / "cpu"), 2, Pretend(far))
    monkeypatch.setattr(records, "space", lambda spec: space(spec)[1:])
    found = Records(MACHINES["cpu"], tmp_path).find(BITMAP)
    assert found.decisions is None and "another version" in found.origin
    assert "another version of the kernel" in capsys.readouterr().err


SMALL = ["--target", "cpu", "--shapes", "96x160", "--batch", "2", "--sparsity", "0.75", "--trials", "2", "--jobs", "1"]


def test_the_command_on_this_cpu(tmp_path, capsys):
    """Real builds and real times."""
    main([*SMALL, "--out", str(tmp_path)])
    told = capsys.readouterr().out
    assert "1 kernels to tune, 0 have" in told and "[1/1" in told and "2 of 2 trials" in told and "default" in told
    facts = json.loads((tmp_path / "machine.json").read_text())
    (kernel,) = facts["kernels"].values()
    assert facts["machine"] and facts["runs"][0]["tvm"] and facts["runs"][0]["date"]
    assert kernel["trials"] == 2 and kernel["sparsity"] == [0.75]
    assert 0 < kernel["best us"][0] <= kernel["default us"][0]
    assert len((tmp_path / RECORDS).read_text().splitlines()) == 2


def test_a_folder_of_records_is_gone_on_with_or_left_alone(tmp_path, capsys):
    def run(machine, bench, *more):
        options = parse(["--target", "cpu", "--trials", "2", "--out", str(tmp_path), *more])
        bench.data, bench.apart = {BITMAP: (0.5, 0.75)}, True
        tune_kernels(options, bench, machine, "tune", Event())

    run("this", Pretend(far))
    with pytest.raises(Refusal, match="go on with --resume"):
        run("this", Pretend(far))
    bench = Pretend(far)
    run("this", bench, "--resume")
    assert bench.ran == [] and "0 kernels to tune, 1 have" in capsys.readouterr().out
    with pytest.raises(Refusal, match="holds records of this, this is that"):
        run("that", Pretend(far), "--resume")
    run("this", bench, "--resume", "--trials", "3")
    assert len(bench.ran) == 1
    facts = json.loads((tmp_path / "machine.json").read_text())
    facts["kernels"] = {key: {**kernel, "sparsity": [0.9]} for key, kernel in facts["kernels"].items()}
    (tmp_path / "machine.json").write_text(json.dumps(facts))
    capsys.readouterr()
    run("this", bench, "--resume", "--trials", "4")
    assert len(bench.ran) == 1 and "left as it is, its records are of sparsity 0.9" in capsys.readouterr().out


def test_a_run_in_which_nothing_works_says_why(tmp_path, capsys):
    def cost(decisions):
        raise ValueError("too many registers")

    bench = Pretend(cost)
    bench.data, bench.apart = {BITMAP: (0.5,)}, False
    options = parse(["--target", "cpu", "--trials", "2", "--out", str(tmp_path)])
    with pytest.raises(Stopped, match="no schedule of matmul_bitmap"):
        tune_kernels(options, bench, "this", "tune", Event())
    assert "2 failed, the first: ValueError: too many registers" in capsys.readouterr().out


@pytest.mark.slow
def test_the_command_over_rpc(tmp_path, capsys):
    """A tracker and a server of TVM's on this machine; the server runs the kernels."""
    from tvm.rpc.server import Server
    from tvm.rpc.tracker import Tracker

    tracker = Tracker(host="127.0.0.1", port=9300, port_end=9400)
    server = Server("127.0.0.1", port=9400, port_end=9500, tracker_addr=("127.0.0.1", tracker.port), key="box")
    try:
        main([*SMALL, "--out", str(tmp_path), "--rpc", f"127.0.0.1:{tracker.port}/box"])
    finally:
        server.terminate()
        tracker.terminate()
    assert "the CPU of box: 1 kernels to tune" in capsys.readouterr().out
    assert len((tmp_path / RECORDS).read_text().splitlines()) == 2


def test_a_crash_or_a_hang_fails_one_call():
    worker = Worker()
    try:
        with pytest.raises(Crashed, match="ended the process"):
            worker.call(os.abort, timeout=60)
        with pytest.raises(Crashed, match="no answer"):
            worker.call(time.sleep, 60, timeout=2)
        assert worker.call(len, "abc", timeout=60) == 3
        with pytest.raises(ZeroDivisionError):
            worker.call(divmod, 1, 0, timeout=60)
    finally:
        worker.end()


@pytest.mark.parametrize(
    "flags",
    [
        ["--target", "h200,b200"], ["--target", "cpu", "--trials", "0"], ["--target", "cpu", "--formats", "csr"],
        ["--target", "cpu", "--rpc", "here"], ["--target", "cpu", "--shapes", "12"], [],
    ],
)  # fmt: skip
def test_bad_flags_are_refused(flags):
    with pytest.raises(Refusal):
        main(flags)


def test_the_kernels_of_the_27b():
    """The projections' shapes come from the model; a kernel that serves two shares of zeros is timed on both."""
    found = workloads(parse(["--target", "h200", "--batch", "1"]), "sm_90a")
    assert {(spec.n, spec.k) for spec in found} == {
        (34816, 5120), (16480, 5120), (14336, 5120), (5120, 6144), (5120, 17408),
    }  # fmt: skip
    assert all(spec.arch == "sm_90a" and spec.m == 1 for spec in found)
    assert sorted(share for shares in found.values() for share in shares) == sorted([0.5, 0.75, 0.9] * 5)
