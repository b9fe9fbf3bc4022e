"""`bench model` on a small model: its own weights, random ones, results that grow over runs, refusals."""

from __future__ import annotations

import csv
import json

import pytest

from tvm_sparse.bench.__main__ import main
from tvm_sparse.bench.model import _label
from tvm_sparse.bench.results import merge
from tvm_sparse.build import main as build
from tvm_sparse.errors import Refusal

TINY = "examples/tiny-qwen3.5"


@pytest.fixture(scope="module")
def artefact(tmp_path_factory):
    out = tmp_path_factory.mktemp("built") / "sparse"
    build(["--model", TINY, "--sparsity", "0.75", "--target", "cpu", "--context", "128", "--out", str(out)])
    return out


def test_an_artefact_is_measured_with_its_weights_and_with_random_ones(artefact, tmp_path, capsys):
    out = tmp_path / "results"
    flags = ["--tests", "pp16,tg4", "--depth", "0,100", "--repeat", "2", "--out", str(out)]
    main(["model", str(artefact), *flags])
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("lib.so", "library.json", "report.json", "tvm_sparse.json"):
        (bare / name).symlink_to(artefact / name)
    main(["model", str(bare), *flags])
    rows = list(csv.DictReader((out / "model.csv").open()))
    assert [(row["weights"], row["test"], row["depth"]) for row in rows] == [
        (weights, test, depth)
        for weights in ("75% zeros", "75% zeros, random")
        for test, depth in (("pp16", "0"), ("tg4", "0"), ("tg4", "100"))
    ]
    assert all(float(row["tokens/s"]) > 0 for row in rows)
    stored, drawn = (json.loads((folder / "report.json").read_text())["bytes"] for folder in (artefact, bare))
    assert stored == drawn
    assert float(rows[1]["GB/token"]) == pytest.approx(float(rows[4]["GB/token"]), rel=0.01)
    table = (out / "model.md").read_text()
    assert "run 2:" in table and "not measured here" in table
    main(["model", str(artefact), "--tests", "tg4", "--depth", "125", "--out", str(out)])
    assert "over its context" in capsys.readouterr().out


def test_a_row_measured_again_takes_the_place_of_the_old_one(tmp_path):
    merge(tmp_path, "model", [{"test": "tg8", "ms": 2.0}, {"test": "pp8", "ms": 1.0}], ["test"], {"date": "monday"})
    rows = merge(tmp_path, "model", [{"test": "tg8", "ms": 1.5}], ["test"], {"date": "tuesday"})
    assert rows == [{"test": "tg8", "ms": 1.5, "date": "tuesday"}, {"test": "pp8", "ms": 1.0, "date": "monday"}]


def test_what_stands_inside_a_row_is_a_table_of_its_own(tmp_path):
    rows = [
        {"test": "tg8", "ms": 2.0, "by kind": {"head": 0.5, "norms": 0.25}},
        {"test": "tg9", "ms": 3.0, "by kind": {"head": 0.75}},
        {"test": "pp8", "ms": 1.0},
    ]
    merge(tmp_path, "model", rows, ["test"], {"date": "monday"})
    first, second = (tmp_path / "model.md").read_text().split("## by kind")
    assert "head" not in first
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in second.splitlines() if line[:1] == "|"]
    assert [cells[0], *cells[2:]] == [["test", "head", "norms"], ["tg8", "0.5", "0.25"], ["tg9", "0.75", ""]]
    flat = list(csv.DictReader((tmp_path / "model.csv").open()))
    assert flat[0]["by kind: norms"] == "0.25" and flat[2]["by kind: head"] == ""
    assert json.loads((tmp_path / "model.json").read_text())["rows"][0]["by kind"] == rows[0]["by kind"]


def test_a_pattern_says_how_it_is_stored(tmp_path):
    pruning = {"pattern": "2:4", "sparsity": 0.5, "include": []}
    plan = {"embed_tokens.weight": "dense", "q": "delta(gap_bits=3,unit=9)", "o": "delta(gap_bits=3)"}
    facts = {"pruning": pruning, "plan": plan, "layout": {"schedule": [0, 1]}}
    assert _label(facts, tmp_path) == "2:4 as delta, random"
    assert _label(facts | {"plan": {}}, tmp_path) == "2:4 as dense, random"


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["nowhere"], "nowhere is not an artefact"),
        (["nowhere", "--tests", "pg5"], "write ppN or tgN"),
        (["nowhere", "--depth", "-1"], "whole numbers from 0"),
        (["nowhere", "--repeat", "0"], "at least 1"),
        (["synthetic", "--sparsity", "2:x"], "a pattern such as 2:4"),
    ],
)
def test_bad_input(argv, says):
    with pytest.raises(Refusal, match=says):
        main(["model", *argv])
