"""`python -m tvm_sparse.prune`: the papers' formulas, and the same checkpoint with other values."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny import random_model
from transformers import AutoModelForCausalLM

from tvm_sparse.build import build
from tvm_sparse.config import parse_build
from tvm_sparse.errors import Refusal, Stopped, run_command
from tvm_sparse.evaluate import evaluate
from tvm_sparse.models.config import ModelConfig
from tvm_sparse.prune import main, prune
from tvm_sparse.pruning import Pattern, layerwise, parse_pattern, rewrite
from tvm_sparse.pruning.admm import DAMPING, GRADUAL, ITERATIONS, admm
from tvm_sparse.pruning.allocation import by_layer, layer_sparsities, outlier_share
from tvm_sparse.pruning.calibration import calibration
from tvm_sparse.pruning.request import parse_prune
from tvm_sparse.pruning.selection import drop_lowest, keep_highest, spread
from tvm_sparse.pruning.sparsegpt import factorise, sparsegpt
from tvm_sparse.pruning.wanda import wanda_scores

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
DENSE = EXAMPLES / "tiny-qwen3.5"
TEXT = str(EXAMPLES / "calibration.txt")
CALIBRATE = ["--text", TEXT, "--samples", "4", "--length", "40"]


# ---- the papers' formulas ----


def problem(rows=12, columns=20, tokens=60, seed=0):
    """A matrix [N, K] and inputs [T, K] whose features are correlated and of very different size."""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((columns, columns)) * np.exp(rng.standard_normal(columns))
    return rng.standard_normal((rows, columns)), rng.standard_normal((tokens, columns)) @ mix


def wanda_by_the_paper(w, x, sparsity):
    metric = np.abs(w) * np.linalg.norm(x, axis=0)
    order = np.argsort(metric, axis=1, kind="stable")[:, : int(sparsity * w.shape[1])]
    out = w.copy()
    np.put_along_axis(out, order, 0, axis=1)
    return out


def sparsegpt_by_the_paper(w, x, sparsity, block, n=0):
    """Optimal brain surgeon, column by column, on the inverse Hessian of the columns not yet seen (section 3)."""
    h = x.T @ x
    h += 0.01 * np.mean(np.diag(h)) * np.eye(len(h))
    inverses = [np.linalg.inv(h[j:, j:]) for j in range(len(h))]
    w, kept = w.copy(), np.ones(w.shape, bool)
    for j, inverse in enumerate(inverses):
        if j % block == 0:
            stop = min(j + block, len(h))
            score = w[:, j:stop] ** 2 / np.array([inverses[c][0, 0] for c in range(j, stop)])
            zeros = round((sparsity or 0) * w.size)
            axis, drop = (1, block - n) if n else (None, zeros * stop // len(h) - zeros * j // len(h))
            rank = np.argsort(np.argsort(score, axis=axis, kind="stable"), axis=axis).reshape(score.shape)
            kept[:, j:stop] = rank >= drop
        error = np.where(kept[:, j], 0, w[:, j]) / inverse[0, 0]
        w[:, j:] -= np.outer(error, inverse[0])
    return np.where(kept, w, 0)


def admm_by_the_paper(w, x, sparsity):
    norms = np.linalg.norm(x, axis=0)
    h = (x / norms).T @ (x / norms)
    h += DAMPING * np.mean(np.diag(h)) * np.eye(len(h))
    z = w * norms
    w, u, target = z, np.zeros_like(w), z @ h
    for k in range(1, ITERATIONS + 1):
        if k <= GRADUAL:
            drop = int(round(sparsity * w.size) * (1 - (1 - k / GRADUAL) ** 3))
            kept = np.argsort(np.argsort(np.abs(w + u), axis=None)).reshape(w.shape) >= drop
        z = (w + u) * kept
        u = u + w - z
        w = np.linalg.solve(h + np.eye(len(h)), (target + z - u).T).T
    return (w + u) * kept / norms


def tensors(w, x):
    return torch.from_numpy(w), torch.from_numpy(x.T @ x)


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.75])
def test_wanda_is_the_papers(sparsity):
    w, x = problem()
    weight, gram = tensors(w, x)
    kept = keep_highest(wanda_scores(weight, gram.diagonal().sqrt()), round(sparsity * w.size), Pattern(), by_row=True)
    np.testing.assert_array_equal(torch.where(kept, weight, 0), wanda_by_the_paper(w, x, sparsity))


@pytest.mark.parametrize("block", [5, 8, 20, 128])
def test_sparsegpt_is_the_papers(block):
    w, x = problem()
    weight, gram = tensors(w, x)
    ours = sparsegpt(weight, factorise(gram), round(0.6 * w.size), Pattern(), block)
    theirs = sparsegpt_by_the_paper(w, x, 0.6, block)
    np.testing.assert_array_equal(ours == 0, theirs == 0)
    np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("n, m", [(2, 4), (1, 4), (2, 5)])
def test_sparsegpt_n_m_is_the_papers(n, m):
    w, x = problem()
    weight, gram = tensors(w, x)
    ours = sparsegpt(weight, factorise(gram), 0, Pattern("n:m", n=n, m=m), block=8)
    np.testing.assert_allclose(ours, sparsegpt_by_the_paper(w, x, None, m, n), rtol=1e-9, atol=1e-12)
    assert ((ours.view(-1, m) != 0).sum(1) == n).all()


def test_admm_is_the_papers():
    w, x = problem()
    weight, gram = tensors(w, x)
    ours = admm(weight, gram, round(0.6 * w.size), Pattern(), by_row=False)
    np.testing.assert_allclose(ours, admm_by_the_paper(w, x, 0.6), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("sparsity", [0.5, 0.6, 0.75])
def test_each_method_changes_the_outputs_less_than_the_one_before(sparsity):
    w, x = problem(64, 64, 400)
    weight, gram = tensors(w, x)
    zeros = round(sparsity * w.size)
    kept = keep_highest(wanda_scores(weight, gram.diagonal().sqrt()), zeros, Pattern(), by_row=True)
    magnitude = torch.where(keep_highest(weight.abs(), zeros, Pattern(), by_row=False), weight, 0)
    found = [
        magnitude,
        torch.where(kept, weight, 0),
        sparsegpt(weight, factorise(gram), zeros, Pattern()),
        admm(weight, gram, zeros, Pattern(), by_row=False),
    ]
    assert [int((one == 0).sum()) for one in found] == [zeros] * 4
    errors = [float(((one - weight) @ gram * (one - weight)).sum()) for one in found]
    assert errors == sorted(errors, reverse=True)


def test_dead_inputs_lose_their_weights_and_a_singular_hessian_is_damped():
    w, x = problem()
    x[:, [3, 7]] = 0
    x[:, 5] = x[:, 4]
    weight, gram = tensors(w, x)
    factor = factorise(gram)
    assert factor.dead.nonzero()[:, 0].tolist() == [3, 7]
    pruned = sparsegpt(weight, factor, w.size // 2, Pattern())
    assert pruned.isfinite().all() and (pruned == 0).sum() == w.size // 2
    assert (pruned[:, [3, 7]] == 0).all()


def test_a_hessian_that_damping_does_not_mend_is_refused():
    with pytest.raises(Refusal, match="Hessian"):
        factorise(torch.tensor([[1.0, 5.0], [5.0, 1.0]], dtype=torch.float64))
    assert factorise(torch.tensor([[1.0, 1.05], [1.05, 1.0]], dtype=torch.float64)).damping == pytest.approx(0.1)


# ---- how many weights go ----


@given(st.integers(0, 1 << 30), st.integers(1, 8), st.integers(1, 30), st.floats(0, 1))
@settings(max_examples=100, deadline=None)
def test_exactly_the_lowest_go(seed, rows, columns, share):
    rng = np.random.default_rng(seed)
    scores = np.round(np.abs(rng.standard_normal((rows, columns))) * 2) / 2  # many equals
    zeros = spread(int(share * scores.size), rows)
    kept = drop_lowest(torch.from_numpy(scores), zeros)
    for row, count in enumerate(zeros):
        expected = np.ones(columns, bool)
        expected[np.argsort(scores[row], kind="stable")[:count]] = False
        assert kept[row].tolist() == expected.tolist()


def test_blocks_go_whole():
    scores = torch.arange(1.0, 31).view(5, 6)
    kept = keep_highest(scores, 15, parse_pattern("block:2x3"), by_row=True)
    # six blocks, the last two of one row: in order of norm 0,0 and 0,1, then 1,0
    assert kept.tolist() == [[False] * 6] * 2 + [[False] * 3 + [True] * 3] * 2 + [[True] * 6]


def test_outliers_are_counted_against_the_mean_of_the_layer():
    scores = [torch.ones(2, 10), torch.tensor([[40.0, 6.0, 1, 1, 1]])]  # mean 69 / 25 = 2.76
    assert outlier_share(scores, 5) == 1 / 25
    assert outlier_share(scores, 2) == 2 / 25


@given(
    st.lists(st.tuples(st.floats(0, 0.2), st.integers(1, 40)), min_size=1, max_size=12),
    st.floats(0, 0.99),
    st.floats(0.01, 0.9),
)
@settings(max_examples=200, deadline=None)
def test_owl_keeps_the_mean_exactly(layers, sparsity, reach):
    outliers, rows = [share for share, _ in layers], [count for _, count in layers]
    shapes = {f"layers.{layer}.w": (count, 7) for layer, count in enumerate(rows)}
    found = layer_sparsities(outliers, [7 * count for count in rows], sparsity, reach)
    assert all(-1e-9 <= one <= 1 for one in found)
    for one, other in zip(np.argsort(outliers)[:-1], np.argsort(outliers)[1:], strict=True):
        assert found[one] >= found[other] - 1e-12
    zeros = by_layer(shapes, {name: layer for layer, name in enumerate(shapes)}, dict(enumerate(found)), sparsity)
    assert sum(zeros.values()) == int(sparsity * 7 * sum(rows) + 0.5)
    for (name, shape), one in zip(shapes.items(), found, strict=True):
        assert abs(zeros[name] - one * shape[0] * shape[1]) <= 1.01


# ---- the checkpoint ----


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A random model as the published ones are: two shards whose tensors are mixed, MTP and vision, three dtypes."""
    folder = tmp_path_factory.mktemp("model") / "random"
    random_model(vocab_size=2048).bfloat16().save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    state = {name.replace("model.", "model.language_model.", 1): value for name, value in state.items()}
    for name, value in state.items():
        if "A_log" in name or "linear_attn.norm" in name:
            state[name] = value.float()
    prefix = "model.language_model.layers"
    state[f"{prefix}.0.mlp.up_proj.weight"] = state[f"{prefix}.0.mlp.up_proj.weight"].half()
    state[f"{prefix}.1.mlp.up_proj.weight"] = state[f"{prefix}.1.mlp.up_proj.weight"].float() * 1.0001
    state["mtp.fc.weight"] = torch.randn(8, 8).bfloat16()
    state["model.visual.blocks.0.attn.qkv.bias"] = torch.randn(5)
    (folder / "model.safetensors").unlink()
    names = sorted(state)
    weight_map = {}
    for part in range(2):
        file = f"model-0000{part + 1}-of-00002.safetensors"
        save_file({name: state[name].contiguous() for name in names[part::2]}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(names[part::2], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    shutil.copyfile(DENSE / "tokenizer.json", folder / "tokenizer.json")
    (folder / "notes").mkdir()
    (folder / "notes" / "README.md").write_text("kept")
    (folder / "pytorch_model.bin").write_text("the model as it was")
    return folder


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def digest(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def run(model: Path, out: Path, *argv: str, sparsity: str = "0.6") -> dict:
    return prune(parse_prune(["--model", str(model), "--sparsity", sparsity, "--out", str(out), *argv]))


SETTINGS = [
    ["--prune", "magnitude"],
    ["--prune", "magnitude", "--granularity", "row"],
    ["--prune", "magnitude", "--granularity", "global"],
    ["--prune", "magnitude", "--allocation", "owl", *CALIBRATE],
    ["--prune", "wanda", *CALIBRATE],
    ["--prune", "wanda", "--granularity", "matrix", "--allocation", "owl", *CALIBRATE],
    ["--prune", "wanda", "--pattern", "block:8x8", *CALIBRATE],
    ["--prune", "sparsegpt", *CALIBRATE],
    ["--prune", "admm", *CALIBRATE],
    ["--prune", "sparsegpt", "--follow", "0.5", *CALIBRATE],
]


@pytest.mark.parametrize("argv", SETTINGS, ids=lambda argv: " ".join(word for word in argv[1:5] if word != TEXT))
def test_the_same_checkpoint_with_other_values(model, tmp_path, argv):
    out = tmp_path / "out"
    summary = run(model, out, *argv, "--exclude", "in_proj_[ab]")
    before, after, files = state_of(model), state_of(out), digest(out)

    assert not (tmp_path / "out.partial").exists()
    assert set(files) == set(digest(model)) - {"pytorch_model.bin"} | {"sparsity.json"}
    changed = {
        name for name in before if not torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8))
    }
    assert {name.removeprefix("model.language_model.") for name in changed} == set(summary["matrices"])
    assert all(before[name].dtype == after[name].dtype and before[name].shape == after[name].shape for name in before)
    for name, bytes_ in digest(model).items():
        if not name.endswith((".safetensors", ".bin")):
            assert files[name] == bytes_

    assert summary == json.loads((out / "sparsity.json").read_text())
    assert len(summary["matrices"]) == 3 * 6 + 7
    zeros = {name: int((after[f"model.language_model.{name}"] == 0).sum()) for name in summary["matrices"]}
    assert zeros == {name: facts["zeros"] for name, facts in summary["matrices"].items()}
    weights = sum(after[f"model.language_model.{name}"].numel() for name in zeros)
    if "block:8x8" not in argv and "row" not in argv:
        assert sum(zeros.values()) == pytest.approx(0.6 * weights, abs=len(zeros))
    if "--text" in argv:
        assert summary["calibration"]["sha256"] == hashlib.sha256(Path(TEXT).read_bytes()).hexdigest()
        assert summary["calibration"]["samples"] == 4
    assert not any(torch.signbit(after[name][after[name] == 0]).any() for name in changed)

    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(
        loaded.model.layers[3].self_attn.q_proj.weight.float(),
        after["model.language_model.layers.3.self_attn.q_proj.weight"].to(loaded.dtype).float(),
    )


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "admm"])
def test_n_of_m(model, tmp_path, method):
    run(model, tmp_path / "out", "--prune", method, "--pattern", "2:4", *CALIBRATE, sparsity="0.5")
    for name, value in state_of(tmp_path / "out").items():
        if "proj" in name:
            assert ((value.float().view(-1, 4) != 0).sum(1) == 2).all(), name


def test_one_threshold_for_the_whole_model(model, tmp_path):
    run(model, tmp_path / "out", "--prune", "magnitude", "--granularity", "global")
    before, after = state_of(model), state_of(tmp_path / "out")
    names = [name for name in before if "_proj" in name]
    dropped = torch.cat([before[name][after[name] == 0].abs().float() for name in names])
    kept = torch.cat([before[name][after[name] != 0].abs().float() for name in names])
    assert dropped.max() <= kept.min()
    assert len(dropped) == int(0.6 * (len(dropped) + len(kept)) + 0.5)


def test_activations_are_those_of_the_pruned_model_so_far(model, tmp_path):
    """Wanda's masks again, from hooks in transformers' own model with all layers pruned: the first inputs of a layer
    depend on the layers before it only."""
    out = tmp_path / "out"
    run(model, out, "--prune", "wanda", *CALIBRATE)
    dense, pruned = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval() for folder in (model, out)
    )
    request = parse_prune(["--model", str(model), "--sparsity", "0.6", "--out", str(out), *CALIBRATE])
    config = json.loads((model / "config.json").read_text())
    ids = calibration(TEXT, model, ModelConfig.from_json(config), request.samples, request.length, request.seed).ids
    for layer, module in ((1, "linear_attn.in_proj_qkv"), (2, "linear_attn.in_proj_b"), (3, "self_attn.k_proj")):
        path, found = f"model.layers.{layer}.{module}", []
        hook = pruned.get_submodule(path).register_forward_hook(
            lambda _, args, out, to=found: to.append(args[0].detach())
        )
        pruned(ids)
        hook.remove()
        x = found[0].double().flatten(0, 1)
        weight = dense.get_submodule(path).weight.detach().double()
        expected = wanda_by_the_paper(weight.numpy(), x.numpy(), 0.6)
        agree = (pruned.get_submodule(path).weight.detach() != 0).numpy() == (expected != 0)
        assert agree.mean() > 0.98  # int(0.6 K) in every row there, the matrix's exact share here


@pytest.mark.parametrize("method", ["sparsegpt", "admm"])
def test_a_hessian_of_fewer_tokens_than_columns(model, tmp_path, method):
    """Singular as it is; damped, it makes numbers and the exact share of zeros."""
    summary = run(model, tmp_path / "out", "--prune", method, "--text", TEXT, "--samples", "1", "--length", "8")
    assert all(bool(value.isfinite().all()) for value in state_of(tmp_path / "out").values())
    assert summary["total"]["sparsity"] == pytest.approx(0.6, abs=1e-3)


def test_a_hessian_that_stays_singular_is_told_by_the_matrix(model, tmp_path, monkeypatch, capsys):
    before = digest(model)
    monkeypatch.setattr(layerwise, "factorise", lambda gram: factorise(-gram))
    words = ["--model", str(model), "--sparsity", "0.6", "--prune", "sparsegpt", *CALIBRATE]
    assert run_command(main, [*words, "--exclude", "in_proj", "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("tvm_sparse: layers.0.linear_attn.out_proj.weight") and "--exclude it" in error
    assert digest(model) == before and list(tmp_path.iterdir()) == []


# ---- interrupted ----


@pytest.mark.parametrize(
    "argv", [SETTINGS[0], SETTINGS[2], SETTINGS[5], SETTINGS[7], SETTINGS[9]], ids=lambda argv: argv[1]
)
def test_an_interrupted_run_goes_on_and_ends_the_same(model, tmp_path, monkeypatch, argv):
    whole, out = tmp_path / "whole", tmp_path / "out"
    run(model, whole, *argv)
    write, writes = rewrite.CheckpointCopy._append, []

    def full(self, line):
        writes.append(line)
        if len(writes) == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, line)

    monkeypatch.setattr(rewrite.CheckpointCopy, "_append", full)
    with pytest.raises(Stopped, match="disk is full"):
        run(model, out, *argv)
    assert not out.exists()
    assert not list((tmp_path / "out.partial").rglob("*.copying"))
    with (tmp_path / "out.partial" / "prune.journal").open("a") as journal:
        journal.write('{"matrices": {"layers.')  # as a kill leaves it
    monkeypatch.setattr(rewrite.CheckpointCopy, "_append", write)
    run(model, out, *argv)
    assert digest(out) == digest(whole)


def test_other_settings_do_not_go_on_and_a_finished_one_is_not_done_again(model, tmp_path, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setattr(rewrite.CheckpointCopy, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(model, out, "--prune", "magnitude")
    monkeypatch.undo()
    run(model, out, "--prune", "magnitude", sparsity="0.3")
    first = digest(out)
    assert json.loads((out / "sparsity.json").read_text())["total"]["sparsity"] == pytest.approx(0.3, abs=1e-3)
    run(model, out, "--prune", "magnitude", sparsity="0.3")
    assert digest(out) == first
    with pytest.raises(Refusal, match="exists already"):
        run(model, out, "--prune", "magnitude", sparsity="0.4")


def test_a_full_disk_while_copying(model, tmp_path, monkeypatch):
    def full(source, target):
        Path(target).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(rewrite.shutil, "copyfile", full)
    with pytest.raises(Stopped, match="make room"):
        run(model, tmp_path / "out", "--prune", "magnitude")
    assert [path.name for path in (tmp_path / "out.partial").iterdir()] == ["prune.journal"]


def test_a_disk_that_is_too_small_is_refused_before_any_work(model, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(rewrite.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(Refusal, match="make room"):
        run(model, tmp_path / "out", "--prune", "magnitude")
    assert list(tmp_path.iterdir()) == []


# ---- bad input ----


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--prune", "wanda"], "pass --text FILE"),
        (["--prune", "magnitude", "--allocation", "owl"], "pass --text FILE"),
        (["--prune", "wanda", "--text", "nowhere.txt"], "no calibration text nowhere.txt"),
        (["--prune", "wanda", "--text", "owner/data"], "name a file"),
        (["--prune", "wanda", "--text", TEXT, "--length", "4096"], "2048 positions"),
        (["--prune", "wanda", "--text", TEXT, "--length", "1024"], "--samples 33"),
        (["--prune", "wanda", *CALIBRATE, "--include", "lm_head"], "lm_head.weight is in no layer"),
        (["--prune", "wanda", *CALIBRATE, "--device", "cuda:7"], "--device cpu"),
        (["--prune", "wanda", *CALIBRATE, "--device", "tpu"], "--device"),
        (["--prune", "wanda", *CALIBRATE, "--granularity", "global"], "row or matrix"),
        (["--prune", "sparsegpt", *CALIBRATE, "--granularity", "row"], "leave --granularity out"),
        (["--prune", "sparsegpt", *CALIBRATE, "--pattern", "block:8x8"], "choose wanda or magnitude"),
        (["--prune", "wanda", *CALIBRATE, "--pattern", "2:5"], "does not divide"),
        (["--prune", "wanda", *CALIBRATE, "--pattern", "2:4"], "--sparsity 0.5"),
        (["--prune", "wanda", *CALIBRATE, "--samples", "0"], "at least 1"),
        (["--prune", "magnitude", "--exclude", "proj"], "nothing is left"),
        (["--prune", "magnitude", "--exclude", "nothing_like_it"], "matches no weight"),
        (["--prune", "magnitude", "--sparsity", "1"], "outside"),
        (["--prune", "wanda", *CALIBRATE, "--follow", "0.5"], "sparsegpt or admm"),
        (["--prune", "admm", *CALIBRATE, "--follow", "2"], "outside"),
        (["--prune", "gradual"], "invalid choice"),
    ],
)
def test_bad_input_is_told_in_one_line(model, tmp_path, capsys, argv, said):
    command = ["--model", str(model), "--sparsity", "0.6", "--out", str(tmp_path / "out"), *argv]
    assert run_command(main, command) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1, error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("where, said", [(".", "the model itself"), ("inside", "the model itself")])
def test_the_model_is_never_written_to(model, where, said):
    before = digest(model)
    with pytest.raises(Refusal, match=said):
        run(model, model / where, "--prune", "magnitude")
    assert digest(model) == before


def test_out_below_a_file_is_refused(model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(Refusal, match="no folder to write to"):
        run(model, tmp_path / "file" / "out", "--prune", "magnitude")


def test_a_folder_with_other_things_is_left_alone(model, tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine.txt").write_text("mine")
    with pytest.raises(Refusal, match="in the way"):
        run(model, tmp_path / "out", "--prune", "magnitude")
    assert (tmp_path / "out.partial" / "mine.txt").exists()


@pytest.mark.parametrize("method", ["magnitude", "sparsegpt"])
def test_nan_is_refused_by_name(model, tmp_path, method):
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    name = "model.language_model.layers.2.mlp.down_proj.weight"
    for file in broken.glob("*.safetensors"):
        state = load_file(file)
        if name in state:
            state[name][3, 4] = float("nan")
            save_file(state, file, {"format": "pt"})
    with pytest.raises(Refusal, match=r"layers\.2\.mlp\.down_proj"):
        run(broken, tmp_path / "out", "--prune", method, *CALIBRATE)
    assert {path.name for path in tmp_path.iterdir()} == {"broken"}


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("text.txt", b"too short", "give more text or --length"),
        ("text.txt", b"", "give more text"),
        ("text.txt", b"\xff\xfe", "not UTF-8"),
        ("text.jsonl", b'{"text": "fine"}\n{"body": 1}\n', "line 2"),
        ("text.txt.gz", b"not gzip", "cannot read"),
    ],
)
def test_texts_that_do_not_serve(model, tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(Refusal, match=said):
        run(model, tmp_path / "out", "--prune", "wanda", "--text", str(tmp_path / name))


def test_json_lines_and_seeds(model, tmp_path):
    config = ModelConfig.from_json(json.loads((model / "config.json").read_text()))
    lines = Path(TEXT).read_text().split("<|endoftext|>")
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    one, same, other = (calibration(str(tmp_path / "text.jsonl"), model, config, 8, 64, seed) for seed in (0, 0, 1))
    assert one.ids.shape == (8, 64)
    assert torch.equal(one.ids, same.ids) and not torch.equal(one.ids, other.ids)
    assert len({tuple(row) for row in one.ids.tolist()}) == 8


def test_a_text_from_the_hub(model, tmp_path, monkeypatch):
    """OWNER/DATASET/FILE is a file of that data set, folders in its name included; without a hub, one line."""
    config = ModelConfig.from_json(json.loads((model / "config.json").read_text()))
    asked = []

    def download(*where, repo_type):
        asked.append((*where, repo_type))
        if where[0] == "owner/gone":
            raise OSError("no network")
        return TEXT

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    found = calibration("owner/data/en/part-0.json.gz", model, config, 2, 16, 0)
    assert asked == [("owner/data", "en/part-0.json.gz", "dataset")] and found.ids.shape == (2, 16)
    with pytest.raises(Refusal, match="the hub does not give it"):
        calibration("owner/gone/text.txt", model, config, 2, 16, 0)


def test_build_names_the_way_on(tmp_path):
    with pytest.raises(Refusal, match=r"python -m tvm_sparse\.prune .* --prune none"):
        build(parse_build(["--model", str(DENSE), "--sparsity", "0.6", "--prune", "sparsegpt", "--target", "cpu"]))


# ---- what it is for ----


@pytest.mark.slow
def test_on_the_shipped_model_sparsegpt_beats_wanda_and_wanda_magnitude(tmp_path):
    heldout = (EXAMPLES / "heldout.txt").read_text()
    text = ["--text", TEXT, "--samples", "32", "--length", "512"]
    found = []
    for number, argv in enumerate((["admm"], ["sparsegpt"], ["wanda", "--granularity", "matrix"], ["magnitude"])):
        run(DENSE, tmp_path / str(number), "--prune", *argv, *text)
        found.append(evaluate(tmp_path / str(number), heldout, window=512).perplexity)
    assert found == sorted(found), found


def test_the_command(model, tmp_path):
    out = tmp_path / "out"
    words = ["--model", str(model), "--sparsity", "0.5", "--prune", "wanda", *CALIBRATE, "--out", str(out)]
    done = subprocess.run([sys.executable, "-m", "tvm_sparse.prune", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(out)
    assert "50.00% zeros" in done.stdout
    assert done.stderr == "  left out: pytorch_model.bin, the model as it was in another file\n"
