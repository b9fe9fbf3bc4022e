"""Gather: its size is known before packing, every shape has a cut, and plans take it where it is fastest."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tvm_sparse.errors import Refusal
from tvm_sparse.formats import FORMATS, measure, pack
from tvm_sparse.formats.gather import SHARED, cut_of, cuts_for, shared_bytes, tokens_at_once
from tvm_sparse.plan import decide, expected_stats
from tvm_sparse.targets import MACHINES

GATHER = FORMATS["gather"]


@pytest.mark.parametrize("sparsity", [0.5, 0.75, 0.9])
def test_bytes_are_known_before_packing(sparsity):
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(1024, 2048, generator=generator) * 0.011
    weight = (weight * (weight.abs() > weight.abs().quantile(sparsity, dim=1, keepdim=True))).bfloat16()
    for choice in GATHER.choices(measure(weight), replace(MACHINES["h200"], cores=8)):
        assert GATHER.nbytes(measure(weight), choice) == pytest.approx(pack(weight, choice).nbytes, rel=0.1)


@pytest.mark.parametrize("shape", [(34816, 5120), (5120, 17408), (16480, 5120), (1, 1), (40, 64), (248320, 5120)])
def test_every_shape_has_a_cut(shape):
    cuts = [cut_of(shape, GATHER.choice(4, **cut)) for cut in cuts_for(shape, MACHINES["h200"])]
    assert cuts
    for cut in cuts:
        assert cut.bins * cut.groups * 8 >= shape[0] and cut.columns * cut.spans >= shape[1]
        assert shared_bytes(cut, tokens_at_once(cut)) <= SHARED


def test_what_does_not_fit_is_refused():
    with pytest.raises(Refusal, match="use more spans or classes"):
        pack(torch.ones(1, 4200, dtype=torch.bfloat16), GATHER.choice(classes=1))
    with pytest.raises(Refusal, match="classes 1, 2, 4 or 8"):
        GATHER.choice(classes=16)


def test_results_of_a_bin_lie_side_by_side():
    weight = torch.randn(100, 64) * (torch.rand(100, 1) < torch.rand(100, 64))
    rows = pack(weight.bfloat16(), GATHER.choice(4, 3, 2, 8, 1)).buffers["rows"][0]
    for eight in rows.view(-1, 8).tolist():
        there = [row for row in eight if row >= 0]
        assert there == [row for row in range(eight[0], eight[0] + 8) if row < 100] or not there


def test_a_cpu_never_takes_it():
    assert not GATHER.choices(expected_stats((4096, 4096), 0.25), MACHINES["cpu"])


def test_only_several_sequences_take_it():
    chosen = [decide("w", expected_stats((16480, 5120), 0.1), [MACHINES["h200"]], batch) for batch in (1, 8)]
    assert [entry.choice.name for entry in chosen] == ["delta", "gather"]
