"""Folding recurrent layers: the pass, the schedules the command line gives, and what is built from them."""

from __future__ import annotations

import json
import shutil
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch
import tvm
from test_passes import run
from tiny import random_model, write_dense_artefact
from tvm.script import ir as I
from tvm.script import relax as R

from tvm_sparse.build import build
from tvm_sparse.checkpoint.folder import FolderCheckpoint
from tvm_sparse.config import parse_build
from tvm_sparse.engine import Engine
from tvm_sparse.errors import Refusal, run_command
from tvm_sparse.folding.decide import decide_fold
from tvm_sparse.folding.page import fold_lines
from tvm_sparse.folding.ranges import executed_layers, parse_fold, parse_layers, spelled, tied_layers
from tvm_sparse.folding.residence import residence
from tvm_sparse.layout import executed_config, make_layout
from tvm_sparse.library import import_model
from tvm_sparse.models.config import REGISTERED, tensors
from tvm_sparse.passes.fold_recurrent_layers import FoldRecurrentLayers
from tvm_sparse.plan import Plan, declared
from tvm_sparse.pruning import Pattern, select
from tvm_sparse.pruning.pattern import parse_pattern
from tvm_sparse.targets import parse_targets

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
DENSE = EXAMPLES / "tiny-qwen3.5"
_27B = REGISTERED["qwen3.5-27b"]


@I.ir_module
class Before:
    """Three executed layers, each with a state and weights of its own."""

    @R.function
    def main(
        x: R.Tensor((4, 8), "float32"),
        layers_0_state: R.Tensor((4, 8), "float32"),
        layers_1_state: R.Tensor((4, 8), "float32"),
        layers_2_state: R.Tensor((4, 8), "float32"),
        layers_0_w: R.Tensor((8, 8), "float32"),
        layers_1_w: R.Tensor((8, 8), "float32"),
        layers_2_w: R.Tensor((8, 8), "float32"),
        norm: R.Tensor((8,), "float32"),
    ):
        R.func_attr({"num_input": 4})
        with R.dataflow():
            t0 = R.permute_dims(layers_0_w)
            y0 = R.add(R.matmul(x, t0), layers_0_state)
            t1 = R.permute_dims(layers_1_w)
            y1 = R.add(R.matmul(y0, t1), layers_1_state)
            t2 = R.permute_dims(layers_2_w)
            y2 = R.add(R.matmul(y1, t2), layers_2_state)
            y = R.multiply(y2, norm)
            R.output(y)
        return y


@I.ir_module
class Expected:
    """Executed layers 0 and 2 use the weights of layer 1, executed layer 1 those of layer 5."""

    @R.function
    def main(
        x: R.Tensor((4, 8), "float32"),
        layers_0_state: R.Tensor((4, 8), "float32"),
        layers_1_state: R.Tensor((4, 8), "float32"),
        layers_2_state: R.Tensor((4, 8), "float32"),
        layers_1_w: R.Tensor((8, 8), "float32"),
        layers_5_w: R.Tensor((8, 8), "float32"),
        norm: R.Tensor((8,), "float32"),
    ):
        R.func_attr({"num_input": 4})
        with R.dataflow():
            t0 = R.permute_dims(layers_1_w)
            y0 = R.add(R.matmul(x, t0), layers_0_state)
            t1 = R.permute_dims(layers_5_w)
            y1 = R.add(R.matmul(y0, t1), layers_1_state)
            t2 = R.permute_dims(layers_1_w)
            y2 = R.add(R.matmul(y1, t2), layers_2_state)
            y = R.multiply(y2, norm)
            R.output(y)
        return y


def underlined(schedule):
    """The layout's rule for the names of the modules above."""
    stored_name = make_layout(_27B, schedule).stored_name
    return lambda name: stored_name(name.replace("_", ".", 2)).replace(".", "_")


def test_fold_recurrent_layers_ties_weights_and_leaves_states():
    folded = FoldRecurrentLayers(underlined((1, 5, 1)))(Before)
    tvm.ir.assert_structural_equal(folded, Expected)
    names = [param.name for param in folded["main"].params]
    assert names == [param.name for param in Expected["main"].params]


def test_the_folded_graph_computes_what_equal_weights_do(tmp_path):
    torch.manual_seed(0)
    x, s0, s1, s2 = (torch.randn(4, 8) for _ in range(4))
    first, second, norm = torch.randn(8, 8), torch.randn(8, 8), torch.randn(8)
    folded = FoldRecurrentLayers(underlined((1, 5, 1)))(Before)
    for name in ("before", "after"):
        (tmp_path / name).mkdir()
    whole = run(Before, tmp_path / "before", x, s0, s1, s2, first, second, first, norm)
    assert torch.equal(run(folded, tmp_path / "after", x, s0, s1, s2, first, second, norm), whole)


def test_layers_of_different_kinds_are_never_one():
    with pytest.raises(Refusal, match=r"layers\.1\.\S+ cannot use the weights layers\.0\."):
        layout = make_layout(_27B, (0, 3))
        mod = import_model(_27B, layout, Plan(), "bfloat16", 1, "cpu")
        FoldRecurrentLayers(lambda name: name.replace("layers.1.self_attn.q_", "layers.0.mlp.up_"))(mod)


def test_a_schedule_leaves_unused_layers_out():
    layout = make_layout(_27B, (*range(8), *(8, 8, 8, 11) * 4, *range(24, 64)))
    used = {param.name.split(".")[1] for param in layout.params if param.name.startswith("layers.")}
    assert len(used) == 50 and {"8", "11"} < used and not {"9", "10", "12", "23"} & used
    assert executed_config(_27B, layout) == _27B
    mod = import_model(_27B, layout, Plan(), "bfloat16", 1, "cpu")
    folded = FoldRecurrentLayers(layout.stored_name)(mod)
    for name in ("prefill", "decode", "score"):
        before, after = mod[name], folded[name]
        count = int(before.attrs["num_input"])
        assert [p.name for p in after.params[:count]] == [p.name for p in before.params[:count]]
        sources = {source for param in layout.params for source in param.sources}
        assert {p.name for p in after.params[count:]} == sources
        assert len(after.params) - count == len(sources)


def test_layers_as_the_command_line_names_them():
    assert tied_layers(_27B, parse_fold("8:24")) == ((8, 9, 10, 12, 13, 14, 16, 17, 18, 20, 21, 22), (11, 15, 19, 23))
    assert tied_layers(_27B, parse_fold("0:3,4:8")) == ((0, 1, 2), (4, 5, 6))
    assert executed_layers(_27B, parse_layers("0-33,26-63")) == (*range(34), *range(26, 64))
    assert executed_layers(_27B, parse_layers("0,0,0,3")) == (0, 0, 0, 3)
    assert spelled((*range(8), 8, 8, 8, 11)) == "0-8,8,8,11"


REFUSED = {
    "no range": (["--fold", "8-24"], "'8-24' is no range of layers: write 8:24"),
    "backwards": (["--fold", "8:4"], "8:4 goes backwards: write 4:8"),
    "mixed kinds": (["--fold", "1:8"], "layers 1 to 7 out of the pattern [DeltaNet, DeltaNet, DeltaNet, attention]"),
    "nearest": (["--fold", "1:8"], "nearest is 0:8"),
    "out of the model": (["--fold", "4:12"], "4:12 is out of the model, which has layers 0 to 7; nearest is 4:8"),
    "overlap": (["--fold", "0:8,4:8"], "0:8 and 4:8 overlap, layers 4 to 7 would be folded twice: write 0:8"),
    "one layer": (["--fold", "3:4"], "3:4 has no two layers to make one of; nearest is 0:4"),
    "no list of layers": (["--layers", "0:7"], "'0:7' is no range of layers: write 0-33,26-63"),
    "layers backwards": (["--layers", "7-0"], "7-0 goes backwards"),
    "layers out of the model": (
        ["--layers", "0-8"],
        "0-8 is out of the model, which has layers 0 to 7; nearest is 0-7",
    ),
    "layers off the pattern": (
        ["--layers", "0-3,5-7"],
        "layer 7 (attention) would run where DeltaNet is due, after 6 layers; nearest is 4-7",
    ),
    "threshold": (["--fold", "auto", "--fold-threshold", "2"], "outside (0, 1]"),
    "threshold of nothing": (["--fold", "0:8", "--fold-threshold", "0.9"], "--fold-threshold is for --fold auto"),
    "best without a text": (["--fold", "0:8", "--fold-weights", "best"], "pass --calibration FILE"),
    "weights of nothing": (["--fold-weights", "mean"], "--fold-weights without --fold"),
    "text of nothing": (["--fold", "0:8", "--calibration", "x"], "--calibration is for --fold auto"),
    "no text": (["--fold", "auto", "--calibration", "/nowhere"], "no calibration text /nowhere"),
    "too short a text": (
        ["--fold", "auto", "--calibration", str(EXAMPLES / "train_tiny.py"), "--calibration-samples", "9999"],
        "--calibration-samples",
    ),
    "text without weights": (["--weights", "synthetic", "--fold", "auto", "--calibration", "x"], "no trained weights"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_folds_are_refused_in_one_line(case, tmp_path, capsys):
    words, says = REFUSED[case]
    argv = ["--model", str(DENSE), "--sparsity", "0.5", "--target", "cpu", *words, "--out", str(tmp_path / "out")]
    assert run_command(lambda given: build(parse_build(given)), argv) == 2
    message = capsys.readouterr().err
    assert says in message and message.count("\n") == 1 and not (tmp_path / "out").exists()


def test_the_27b_folded_is_as_much_smaller_as_arithmetic_says():
    """Layers 8 to 23 become one DeltaNet layer and one attention layer: 11 and 3 layers less."""
    shapes = tensors(_27B)
    size = {
        layer: sum(prod(s.shape) for n, s in shapes.items() if n.startswith(f"layers.{layer}.")) for layer in (8, 11)
    }
    fold = decide_fold(read("--fold", "8:24"), _27B, None, "cpu")
    layout = make_layout(_27B, fold.schedule)
    parameters = sum(prod(param.shape) for param in layout.params)
    assert parameters == 26_895_998_464 - 11 * size[8] - 3 * size[11] == 21_563_227_744
    machines = parse_targets("h200")
    whole, folded = (
        declared(_27B, each, select(_27B), 0.75, Pattern(), machines, 1) for each in (make_layout(_27B), layout)
    )
    layer = {i: sum(e.nbytes for name, e in whole.items() if name.startswith(f"layers.{i}.")) for i in (8, 11)}
    assert whole.nbytes - folded.nbytes == 11 * layer[8] + 3 * layer[11]
    assert set(folded) == {name for name in whole if not name.startswith("layers.") or _left(int(name.split(".")[1]))}


def _left(layer):
    return layer in (8, 11) or not 8 <= layer < 24


def read(*words):
    return parse_build(["--model", "qwen3.5-27b", "--sparsity", "0.75", "--target", "cpu", *words]).fold


SCHEDULES = {
    "repeated": (0, 1, 2, 1, 2, 3),
    "tied, left out": (2, 1, 2, 1),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_is_transformers_with_that_list_of_layers(name, tmp_path):
    """Prefill in pieces, decode and score; every executed layer has caches and states of its own."""
    schedule = SCHEDULES[name]
    model = random_model(seed=len(name), num_hidden_layers=4, full_attention_interval=2)
    engine = Engine(write_dense_artefact(model, tmp_path, lowered=name == "repeated", schedule=schedule))
    model.model.layers = torch.nn.ModuleList(model.model.layers[layer] for layer in schedule)
    model.config.num_hidden_layers = len(schedule)
    model.config.layer_types = [model.config.layer_types[layer] for layer in schedule]
    ids = np.random.default_rng(0).integers(0, engine.vocab_size, 120).tolist()
    with torch.inference_mode():
        wanted = model(torch.tensor([ids]), use_cache=False).logits[0].double()
    close = 1e-4 * float(wanted.abs().max())
    logits = [engine.prefill(ids[:100]), *(engine.decode(token) for token in ids[100:])]
    assert np.abs(np.stack(logits) - wanted[99:].numpy()).max() < close
    engine.reset()
    scores = wanted[:-1].log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0].numpy()
    assert np.abs(engine.score(ids) - scores).max() < 1e-4 * np.abs(scores).max()


def save(model, folder):
    """As transformers writes it, every layer with tensors of its own; the shipped tokenizer beside it."""
    model.to(torch.bfloat16).save_pretrained(folder)
    shutil.copyfile(DENSE / "tokenizer.json", folder / "tokenizer.json")
    return FolderCheckpoint(folder, None)


def equal_layers(groups, **sizes):
    """A random model of eight layers; those of a group are equal."""
    model = random_model(num_hidden_layers=8, vocab_size=2048, **sizes)
    for first, *others in groups:
        for other in others:
            model.model.layers[other].load_state_dict(model.model.layers[first].state_dict())
    return model


def fold_of(checkpoint, *words):
    return decide_fold(read("--fold", *words), checkpoint.config, checkpoint, "cpu")


CALIBRATION = ("--calibration", str(EXAMPLES / "calibration.txt"), "--calibration-samples", "2",
               "--calibration-length", "40")  # fmt: skip


def test_auto_folds_neighbours_that_are_equal(tmp_path):
    """Layers 0 and 1, 5 and 6, 3 and 7 are equal; 2 is twice layer 0: the cosine alone would not tell."""
    model = equal_layers([(0, 1, 2), (5, 6), (3, 7)])
    with torch.no_grad():
        for parameter in model.model.layers[2].parameters():
            parameter *= 2
    checkpoint = save(model, tmp_path)
    for words in ((), CALIBRATION):
        fold = fold_of(checkpoint, "auto", *words)
        assert fold.schedule == (0, 0, 2, 3, 4, 5, 5, 3)
        assert [tie.layers for tie in fold.ties] == [(0, 1), (3, 7), (5, 6)]
        assert fold.facts["similarity"]["attention"] == {"layers": [3, 7], "cosine": pytest.approx(1)}
    assert fold.facts["outputs"]["similarity"] == pytest.approx(1)


def test_auto_leaves_layers_alone_that_are_not_alike(capsys):
    checkpoint = FolderCheckpoint(DENSE, None)
    fold = fold_of(checkpoint, "auto", *CALIBRATION)
    assert fold.schedule == tuple(range(8)) and not fold.ties
    said = capsys.readouterr().err
    highest = fold.facts["similarity"]["DeltaNet"]["cosine"]
    assert 0 < highest < 0.95 and f"cosine {highest:.3f} of DeltaNet layers" in said and "it takes 0.95" in said
    assert f"{fold.facts['outputs']['similarity']:.3f} of the outputs of layers" in said
    assert fold_of(checkpoint, "auto", "--fold-threshold", str(highest - 0.001)).ties


def test_the_best_weights_are_those_whose_reuse_changes_least(tmp_path):
    """Layer 1 is nearly layers 0 and 2, which are further from each other."""
    model = equal_layers([(1, 0, 2)])
    with torch.no_grad():
        for layer, sign in ((0, 1), (2, -1)):
            for parameter in model.model.layers[layer].mlp.parameters():
                parameter += sign * 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    fold = fold_of(save(model, tmp_path), "0:3", "--fold-weights", "best", *CALIBRATION)
    assert [tie.weights for tie in fold.ties] == [1] and fold.schedule == (1, 1, 1, 3, 4, 5, 6, 7)
    errors = fold.facts["ties"][0]["errors"]
    assert errors["1"] == min(errors.values()) > 0


def test_the_mean_of_layers_stands_in_the_first_ones_place():
    checkpoint = FolderCheckpoint(DENSE, None)
    fold = fold_of(checkpoint, "0:8", "--fold-weights", "mean")
    weights = fold.weights(checkpoint)
    name = "layers.{}.mlp.up_proj.weight"
    mean = sum(checkpoint.tensor(name.format(layer)).double() for layer in (0, 1, 2, 4, 5, 6)) / 6
    assert torch.equal(weights.tensor(name.format(0)), mean.bfloat16()) and weights.exact_bf16(name.format(0))
    assert torch.equal(weights.rows(name.format(0), 3, 9), mean[3:9].bfloat16())
    assert weights.tensor("layers.3.self_attn.q_norm.weight").dtype == torch.bfloat16
    assert weights.tensor("layers.0.linear_attn.A_log").dtype == torch.float32  # as stored
    assert torch.equal(weights.tensor("norm.weight"), checkpoint.tensor("norm.weight"))
    assert weights.fingerprint() != checkpoint.fingerprint() and weights.side_files() == checkpoint.side_files()


def folded_27b(sparsity, machines):
    schedule = decide_fold(read("--fold", "8:24"), _27B, None, "cpu").schedule
    plan = declared(_27B, make_layout(_27B, schedule), select(_27B), sparsity, Pattern(), machines, 1)
    return residence(_27B.layer_types, schedule, plan, machines, 1)


def test_a_layer_of_the_27b_does_not_stay_in_the_cache_at_75_per_cent():
    deltanet, attention = folded_27b(0.75, parse_targets("h200"))
    assert (deltanet["layer"], deltanet["uses"], attention["layer"], attention["uses"]) == (8, 12, 11, 4)
    assert 170e6 < deltanet["bytes"] < 210e6
    both = deltanet["bytes"] + attention["bytes"]
    assert deltanet["between"] == {str(deltanet["bytes"]): 8, str(both): 3} and attention["between"] == {str(both): 3}
    facts = deltanet["machines"]["h200"]
    assert facts["found"] == facts["saved"] == 0 and facts["later"] < facts["first"] < 1e-4
    assert facts["part"] == pytest.approx(facts["holds"] / deltanet["bytes"]) and facts["from_sparsity"] > 0.9


def test_times_of_layers_in_blocks_are_the_plan_s():
    machines = parse_targets("cpu")
    schedule = decide_fold(read("--fold", "8:24"), _27B, None, "cpu").schedule
    plan = declared(_27B, make_layout(_27B, schedule), select(_27B), 0.75, parse_pattern("block:16x16", 0.75),
                    machines, 1)  # fmt: skip
    assert "block" in {entry.choice.name for entry in plan.values()}
    wanted = sum(e.seconds["cpu"] for name, e in plan.items() if name.startswith("layers.8."))
    deltanet, _ = residence(_27B.layer_types, schedule, plan, machines, 1)
    assert deltanet["machines"]["cpu"]["first"] == pytest.approx(wanted, rel=1e-3)


def test_a_layer_with_few_weights_stays_in_a_large_cache():
    deltanet, attention = folded_27b(0.95, parse_targets("b200"))
    facts = deltanet["machines"]["b200"]
    assert facts["found"] == 8 and facts["saved"] > 0
    assert facts["saved"] == pytest.approx(8 * (facts["first"] - facts["later"]))
    assert attention["machines"]["b200"]["found"] == 0
    page = "\n".join(fold_lines({"executed": 64, "layers": 50, "schedule": "0-8,8", "asked": {"weights": "first"},
                                 "residence": [deltanet, attention]}))  # fmt: skip
    assert "| DeltaNet 8 | 12 |" in page and "| 8 of 11 |" in page and "does not fit" in page and fold_lines({}) == []


@pytest.mark.slow
def test_equal_layers_fold_to_the_same_bits_in_half_the_bytes(tmp_path):
    """`build --fold auto` on layers saved apart: prefill, decode and score as of the model that was not folded."""
    model = random_model(num_hidden_layers=4, full_attention_interval=2, vocab_size=2048)
    for first in (0, 1):
        model.model.layers[first + 2].load_state_dict(model.model.layers[first].state_dict())
    save(model, tmp_path / "model")
    argv = ["--model", str(tmp_path / "model"), "--sparsity", "0.5", "--target", "cpu"]
    build(parse_build([*argv, "--out", str(tmp_path / "whole")]))
    build(parse_build([*argv, "--fold", "auto", "--out", str(tmp_path / "folded")]))
    whole, folded = (Engine(tmp_path / name, verify=True) for name in ("whole", "folded"))
    ids = np.random.default_rng(0).integers(0, 2048, 70).tolist()
    for engine in (whole, folded):
        engine.results = [engine.prefill(ids), engine.decode(5), engine.decode(6)]
        engine.reset()
        engine.results.append(engine.score(ids))
    assert all(np.array_equal(*pair) for pair in zip(whole.results, folded.results, strict=True))

    reports = [json.loads((tmp_path / name / "report.json").read_text()) for name in ("whole", "folded")]
    layers = [sum(row["bytes"] for row in report["matrices"] if "layers." in row["param"]) for report in reports]
    assert layers[0] == 2 * layers[1] and reports[0]["bytes"] - reports[1]["bytes"] == layers[1]
    assert reports[1]["fold"]["schedule"] == "0-1,0-1" and reports[0]["fold"] == {}
    assert "- DeltaNet layers 0,2 run with the weights of layer 0" in (tmp_path / "folded" / "report.md").read_text()
