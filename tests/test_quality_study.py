"""examples/quality_study.py: its cases are ones that prune takes, and its table and plot show what was found."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from tiny import random_model

from tvm_sparse.pruning.request import parse_prune

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture
def study(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import quality_study

    return quality_study


def test_every_case_is_one_that_prune_takes(study):
    keys = []
    for key, argv in study.cases():
        text = ["--text", "text", "--finetune-text", "text"] if "--finetune" in argv else ["--text", "text"]
        parse_prune([*argv, *text, "--model", "dense", "--out", "out"])
        keys.append(key)
    assert len(keys) == len(set(keys)) > 60


def test_a_model_judged_by_itself_is_the_same(study):
    model, windows = random_model(), torch.arange(40).view(2, 20)
    found = study.judge(model, model, windows)
    assert found["divergence"] == pytest.approx(0, abs=1e-6) and found["same_top"] == 1 and found["tokens"] == 38
    logps = model(windows).logits[:, :-1].log_softmax(-1).gather(2, windows[:, 1:, None])
    assert found["perplexity"] == pytest.approx(float((-logps.detach()).mean().exp()), rel=1e-5)


def test_results_name_no_folder_of_the_machine_they_come_from(study):
    told = {"text": "/somewhere/text/tuning.txt", "teacher": "/somewhere/dense", "rate": 1e-3}
    assert study.by_name(told) == {"text": "tuning.txt", "teacher": "dense", "rate": 1e-3}
    assert study.by_name({"teacher": None}) == {"teacher": None} and study.by_name(None) is None
    for found in json.loads((EXAMPLES.parent / "docs" / "quality.json").read_text()).values():
        assert study.by_name(found.get("finetune")) == found.get("finetune")
        assert "/" not in found.get("argv", "")


def test_table_and_plot(study, tmp_path, capsys, monkeypatch):
    results = {
        key: {"perplexity": 20.0 + number, "divergence": number / 100, "same_top": 1 - number / 1000}
        for number, key in enumerate(["dense @ 0", *(key for key, _ in study.cases())])
    }
    part = dict(list(results.items())[:9])
    for name, found in (("a", part), ("b", results)):
        (tmp_path / name).write_text(json.dumps(found))
    argv = ["table", str(tmp_path / "a"), str(tmp_path / "b"), "--plot", str(tmp_path / "plot.svg")]
    monkeypatch.setattr(sys, "argv", ["quality_study.py", *argv])
    study.main()
    lines = capsys.readouterr().out.splitlines()
    cells = next(line for line in lines if line.startswith("| 75 % | magnitude |")).split(" | ")
    best = [results[f"{name} @ 75"]["perplexity"] for name in ("magnitude", "magnitude, tuned")]  # first: the lowest
    assert (float(cells[2]), float(cells[6])) == tuple(best)
    assert cells[-1] == f"{study.milliseconds(study.SPEEDS)['75']} |"
    assert len({line.count("|") for line in lines if line.startswith("| wanda")}) == 1
    drawn = ElementTree.parse(tmp_path / "plot.svg")
    assert {"magnitude", "admm, follow, tuned"} <= {
        text.text for text in drawn.iter("{http://www.w3.org/2000/svg}text")
    }


def test_the_page_takes_the_tables(study, tmp_path):
    page = (EXAMPLES.parent / "docs" / "quality.md").read_text()
    (tmp_path / "page.md").write_text(page)
    results = EXAMPLES.parent / "docs" / "quality.json"
    options = study.argparse.Namespace(results=[results], speeds=study.SPEEDS, plot=None, page=tmp_path / "page.md")
    study.table(options)
    assert (tmp_path / "page.md").read_text() == page, "docs/quality.md is stale: examples/quality_study.py table"
