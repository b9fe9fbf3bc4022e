"""The plan: the fastest format for a matrix, a machine and a batch; dense where dense wins; a table and JSON."""

from __future__ import annotations

import pytest
import torch

from tvm_sparse.formats import FORMATS, measure, pack
from tvm_sparse.layout import make_layout
from tvm_sparse.models.config import REGISTERED
from tvm_sparse.plan import Plan, decide, declared, expected_stats
from tvm_sparse.pruning import Pattern, select
from tvm_sparse.targets import parse_targets

CPU, GPU = parse_targets("cpu"), parse_targets("b200,h200")
WIDE = (34816, 5120)


def name(density, machines, batch=1, pattern=None, shape=WIDE):
    return decide("w", expected_stats(shape, density, pattern), machines, batch).choice.name


@pytest.mark.parametrize("density", [0.5, 0.25, 0.1])
def test_bitmap_on_a_cpu_and_delta_on_a_gpu(density):
    assert name(density, CPU) == "bitmap" and name(density, CPU, batch=8) == "bitmap"
    assert name(density, GPU) == "delta"


@pytest.mark.parametrize("machines", [CPU, GPU])
def test_dense_where_dense_wins(machines):
    entry = decide("w", expected_stats(WIDE, 0.97), machines, 1)
    assert entry.choice.name == "dense" and entry.reason.startswith("dense: ")


@pytest.mark.parametrize(
    ("pattern", "density"), [(Pattern("n:m", n=2, m=4), 0.5), (Pattern("block", rows=16, cols=16), 0.25)]
)
def test_structure_gets_its_own_format_on_a_cpu_and_the_faster_delta_on_a_gpu(pattern, density):
    assert name(density, CPU, pattern=pattern) == {"n:m": "2:4", "block": "block"}[pattern.kind]
    assert name(density, GPU, pattern=pattern) == "delta"


def test_a_matrix_without_zeros_has_no_structure_to_keep():
    assert decide("w", measure(torch.ones(64, 96).bfloat16()), CPU, 1).choice.name == "dense"


def test_more_gap_bits_for_more_zeros():
    choices = [decide("w", expected_stats(WIDE, d), GPU, 1).choice for d in (0.5, 0.25, 0.1)]
    splits = [choice.option("gap_bits") for choice in choices]
    assert splits[:2] == [3, 4] and splits[2] > 4
    assert [choice.option("unit") for choice in choices] == [9, 9, 4]  # 14 bits hold no gap of more than 4


def test_expected_statistics_are_those_of_a_random_matrix():
    torch.manual_seed(0)
    weight = torch.randn(512, 2048) * 0.011
    weight = weight.masked_fill_(weight.abs() < weight.abs().quantile(0.75), 0).bfloat16()
    stats, expected = measure(weight), expected_stats((512, 2048), 0.25)
    for choice, close in (
        (FORMATS["bitmap"].choice(), 0.001),
        (FORMATS["delta"].choice(bins=20, warps=2), 0.02),
        (FORMATS["delta"].choice(bins=20, warps=2, unit=9), 0.02),
    ):
        fmt = FORMATS[choice.name]
        assert fmt.nbytes(expected, choice) == pytest.approx(fmt.nbytes(stats, choice), rel=0.02)
        assert fmt.nbytes(stats, choice) == pytest.approx(pack(weight, choice).nbytes, rel=close)


def test_plan_of_a_build_without_weights():
    config = REGISTERED["qwen3.5-27b"]
    layout = make_layout(config)
    plan = declared(config, layout, select(config), 0.75, Pattern(), parse_targets("b200"), 1)
    assert Plan.from_json(plan.to_json()) == plan
    assert plan["layers.0.mlp.gate_up_proj.weight"].choice == FORMATS["delta"].choice(
        gap_bits=4, bins=148, unit=9, pairs=1
    )
    assert plan["embed_tokens.weight"].choice == plan["lm_head.weight"].choice == FORMATS["dense"].choice()
    assert plan.nbytes == pytest.approx(16.6e9, rel=0.01)
    table = str(plan).splitlines()
    assert len(table) == len(plan) + 2 and "times as fast as dense" in table[2]
