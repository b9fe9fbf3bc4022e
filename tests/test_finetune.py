"""`prune --finetune`: nearer to the dense model, zeros where they were, everything else untouched."""

from __future__ import annotations

import errno
import json
import signal
from pathlib import Path

import pytest
import torch
from test_prune import DENSE, TEXT, digest, model, state_of  # noqa: F401

from tvm_sparse.errors import Refusal, Stopped, run_command
from tvm_sparse.prune import main, prune
from tvm_sparse.pruning import finetune, rewrite
from tvm_sparse.pruning.request import parse_prune

TUNE = [
    "--finetune", "20", "--finetune-text", TEXT, "--length", "32", "--finetune-batch", "2", "--finetune-rate", "1e-2",
]  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(folder: Path, out: Path, *argv: str) -> dict:
    return prune(parse_prune(["--model", str(folder), "--out", str(out), *argv]))


@pytest.mark.parametrize("argv", [["--sparsity", "0.6"], ["--sparsity", "0.5", "--pattern", "2:4"]], ids=["60", "2:4"])
def test_nearer_to_the_dense_model_and_zero_stays_zero(model, tmp_path, argv):  # noqa: F811
    plain, tuned, again = tmp_path / "plain", tmp_path / "tuned", tmp_path / "again"
    run(model, plain, "--prune", "magnitude", *argv)
    summary = run(model, tuned, "--prune", "magnitude", *argv, *TUNE)
    facts = summary["finetune"]
    assert facts["divergence_after"] < 0.9 * facts["divergence_before"], facts
    assert facts["steps"] == 20 and facts["samples"] > 100 and facts["budget"] == {"steps": 20, "seconds": None}
    assert summary == json.loads((tuned / "sparsity.json").read_text())
    assert {path.name for path in tmp_path.iterdir()} == {"plain", "tuned"}

    before, after = state_of(plain), state_of(tuned)
    short = {name: name.removeprefix("model.language_model.") for name in before}
    for name, old in before.items():
        new = after[name]
        if short[name] not in summary["matrices"]:
            assert torch.equal(old.view(torch.uint8), new.view(torch.uint8)), name
            continue
        assert old.dtype == new.dtype and not torch.equal(old, new), name
        assert (new[old == 0] == 0).all() and not torch.signbit(new[new == 0]).any(), name
        assert int((new == 0).sum()) == summary["matrices"][short[name]]["zeros"], name
    side = {
        name: value for name, value in digest(plain).items() if not name.endswith((".safetensors", "sparsity.json"))
    }
    assert side.items() <= digest(tuned).items() and set(digest(plain)) == set(digest(tuned))

    # a checkpoint that is pruned already learns the same from the same teacher
    later = run(plain, again, "--prune", "none", "--teacher", str(model), *TUNE)
    assert {name: state_of(again)[name].equal(value) for name, value in after.items()} == dict.fromkeys(after, True)
    assert later["pruned"]["method"] == "magnitude" and later["sparsity"] is None
    assert later["total"] == summary["total"]


@pytest.mark.parametrize("how", ["killed", "interrupted", "full"])
def test_an_interrupted_run_ends_with_the_same_bytes(model, tmp_path, monkeypatch, how):  # noqa: F811
    argv = ["--sparsity", "0.6", "--prune", "magnitude", *TUNE, "--finetune", "6", "--finetune-hidden", "0.5"]
    run(model, tmp_path / "whole", *argv)
    out, step, save, steps = tmp_path / "out", finetune._Run.step, rewrite.save_file, []

    def stopped(self):
        step(self)
        steps.append(self.teaching.steps)
        if self.teaching.steps != 3:
            return
        if how == "killed":  # after a save, in the next step
            self.save()
            self._copy.state.with_name("finetune.state.copying").write_bytes(b"half")
            raise RuntimeError("killed")
        if how == "interrupted":
            signal.raise_signal(signal.SIGINT)
        if how == "full":
            self.save()
            self.saved = float("-inf")

    def full(tensors, path, facts):
        save(tensors, path, facts)
        if len(steps) >= 4:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(finetune._Run, "step", stopped)
    if how == "full":
        monkeypatch.setattr(finetune, "_SAVE_EVERY", 0.0)
        monkeypatch.setattr(rewrite, "save_file", full)
    with pytest.raises({"killed": RuntimeError, "interrupted": KeyboardInterrupt, "full": Stopped}[how]):
        run(model, out, *argv)
    assert not out.exists() and (tmp_path / "out.partial" / "finetune.state").is_file()
    monkeypatch.undo()

    began = []
    monkeypatch.setattr(finetune._Run, "step", lambda self: (began.append(self.teaching.steps), step(self)))
    run(model, out, *argv)
    assert began[0] >= 3
    torch.testing.assert_close(state_of(out), state_of(tmp_path / "whole"), rtol=0, atol=0)
    assert not (tmp_path / "out.partial").exists()


def test_layer_by_layer_too(model, tmp_path, monkeypatch):  # noqa: F811
    """Every layer nearer to the dense one; interrupted between layers and while writing, the same bytes."""
    argv = ["--sparsity", "0.6", "--prune", "magnitude", *TUNE, "--samples", "6", "--finetune-by", "layer"]
    run(model, tmp_path / "plain", *argv[:4])
    facts = run(model, tmp_path / "whole", *argv)["finetune"]
    assert [layer["steps"] for layer in facts["layers"].values()] == [20] * 4 and facts["samples"] == 6
    assert all(layer["after"] < 0.9 * layer["before"] for layer in facts["layers"].values()), facts
    before, after = state_of(tmp_path / "plain"), state_of(tmp_path / "whole")
    assert all(((after[name] == 0) >= (before[name] == 0)).all() for name in before)
    touched = {
        name for name in before if not torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8))
    }
    assert len(touched) == 3 * 8 + 7

    write = rewrite.CheckpointCopy._append

    def full(self, line):
        if "layers.2.mlp.up_proj.weight" in line.get("matrices", {}) and self.state.is_file():
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, line)

    monkeypatch.setattr(rewrite.CheckpointCopy, "_append", full)
    with pytest.raises(Stopped, match="disk is full"):
        run(model, tmp_path / "out", *argv)
    monkeypatch.undo()
    tuned = []
    step = finetune.Teaching.step
    monkeypatch.setattr(
        finetune.Teaching, "step", lambda self, loss: tuned.append(min(self.weights)) or step(self, loss)
    )
    run(model, tmp_path / "out", *argv)
    assert {name.split(".")[1] for name in tuned} == {"3"}  # layer 2 had been saved
    torch.testing.assert_close(state_of(tmp_path / "out"), after, rtol=0, atol=0)


def test_a_time_as_budget_and_interruption_while_writing(model, tmp_path, monkeypatch):  # noqa: F811
    argv = ["--sparsity", "0.6", "--prune", "magnitude", *TUNE, "--finetune", "0.5s", "--include", "in_proj"]
    write = rewrite.CheckpointCopy._append

    def full(self, line):
        if "layers.0.linear_attn.in_proj_qkv.weight" in line.get("matrices", {}) and self.state.is_file():
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, line)

    monkeypatch.setattr(rewrite.CheckpointCopy, "_append", full)
    with pytest.raises(Stopped, match="disk is full"):
        run(model, tmp_path / "out", *argv)
    monkeypatch.undo()
    facts = run(model, tmp_path / "out", *argv)["finetune"]
    assert facts["seconds"] >= 0.5 and facts["steps"] >= 1
    assert not (tmp_path / "out" / "finetune.state").exists()


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--prune", "none"], "without --finetune"),
        (["--prune", "none", *TUNE], "pass --teacher"),
        (["--prune", "none", *TUNE, "--teacher", str(DENSE), "--sparsity", "0.5"], "leave --sparsity"),
        (["--prune", "none", *TUNE, "--teacher", str(DENSE)], "other sizes"),
        (["--prune", "none", *TUNE, "--teacher", "nowhere/at/all"], "nowhere/at/all"),
        (["--prune", "magnitude", *TUNE], "--sparsity is missing"),
        (["--prune", "magnitude", "--sparsity", "0.5", "--teacher", str(DENSE)], "pass --finetune"),
        (["--prune", "magnitude", "--sparsity", "0.5", "--finetune", "8"], "pass --finetune-text"),
        (["--prune", "magnitude", "--sparsity", "0.5", *TUNE, "--finetune", "soon"], "no budget"),
        (["--prune", "magnitude", "--sparsity", "0.5", *TUNE, "--finetune", "0"], "no budget"),
        (["--prune", "magnitude", "--sparsity", "0.5", *TUNE, "--finetune-batch", "0"], "at least 1"),
        (["--prune", "magnitude", "--sparsity", "0.5", *TUNE, "--finetune-rate", "0"], "--finetune-rate"),
        (["--prune", "magnitude", "--sparsity", "0.5", *TUNE, "--length", "4096"], "2048 positions"),
        (
            ["--prune", "magnitude", "--sparsity", "0.5", *TUNE, "--finetune-by", "layer", "--samples", "99999"],
            "--samples",
        ),
        (["--prune", "magnitude", "--sparsity", "0.5", *TUNE, "--finetune-text", "none.txt"], "none.txt"),
        (["--prune", "magnitude", "--sparsity", "0.5", *TUNE, "--include", "lm_head"], "lm_head.weight is in no layer"),
    ],
)
def test_bad_input_is_told_in_one_line(model, tmp_path, capsys, argv, said):  # noqa: F811
    assert run_command(main, ["--model", str(model), "--out", str(tmp_path / "out"), *argv]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1, error
    assert list(tmp_path.iterdir()) == []


def test_a_model_too_large_for_the_memory_is_refused(model, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(finetune.os, "sysconf", lambda _: 1000)
    with pytest.raises(Refusal, match="take a larger device"):
        run(model, tmp_path / "out", "--sparsity", "0.6", "--prune", "magnitude", *TUNE)
    assert list(tmp_path.iterdir()) == []


def test_a_rate_that_diverges_is_refused(model, tmp_path, monkeypatch):  # noqa: F811
    def lost(student, *_):
        loss = next(weight for weight in student.parameters() if weight.requires_grad).sum() * torch.nan
        return loss, loss

    monkeypatch.setattr(finetune._Run, "_check", lambda self: None)
    monkeypatch.setattr(finetune, "distance", lost)
    with pytest.raises(Refusal, match="lower --finetune-rate"):
        run(model, tmp_path / "out", "--sparsity", "0.6", "--prune", "magnitude", *TUNE)
