"""The kernel benchmark on a small shape: checked results, every output format, refusals."""

from __future__ import annotations

import csv
import io
import json

import pytest
import torch

from tvm_sparse.bench import cpu_race
from tvm_sparse.bench.__main__ import main
from tvm_sparse.bench.timing import Times, ratio
from tvm_sparse.errors import Refusal

SMALL = ["kernels", "--shapes", "96x160,64x64", "--sparsity", "0.75", "--threads", "1"]
SMALL += ["--copies", "0.0001", "--rounds", "2"]


def test_json_has_a_row_for_each_shape_and_batch_and_their_geometric_mean(capsys):
    main([*SMALL, "--batch", "1,8", "--format", "json"])
    found = json.loads(capsys.readouterr().out)
    assert found["machine"] and found["torch"] == torch.__version__
    measured = [row for row in found["rows"] if row["shape"] != "geometric mean"]
    assert [f"{row['shape']} {row['batch']}" for row in measured] == ["96x160 1", "96x160 8", "64x64 1", "64x64 8"]
    for row in measured:
        assert row["us"] > 0 and row["GB/s"] > 0 and row["ratio"] > 0
    assert [row["batch"] for row in found["rows"] if row["shape"] == "geometric mean"] == [1, 8]


def test_markdown_and_csv_hold_the_same_rows(capsys):
    main([*SMALL, "--batch", "1", "--format", "md"])
    table = capsys.readouterr().out
    assert table.startswith("| shape") and "geometric mean" in table and "machine:" in table
    main([*SMALL, "--batch", "1", "--format", "csv"])
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["shape"] for row in rows] == ["96x160", "64x64", "geometric mean"]


def test_a_wrong_kernel_is_never_timed(monkeypatch):
    monkeypatch.setattr(cpu_race.CpuKernel, "__call__", lambda self, x, packed: torch.zeros(1, 96))
    with pytest.raises(RuntimeError, match="wrong result"):
        main([*SMALL, "--batch", "1"])


@pytest.mark.parametrize(
    "flags",
    [
        ["--shapes", "12"], ["--sparsity", "1"], ["--sparsity", "half"], ["--batch", "0"],
        ["--library", "x.so"], ["--packed", "csr"],
    ],
)  # fmt: skip
def test_bad_flags_are_refused(flags):
    with pytest.raises(Refusal):
        main(["kernels", *flags])
    with pytest.raises(Refusal, match="kernels"):
        main(["nothing"])


def test_the_ratio_is_taken_round_by_round():
    ours, dense = Times("ours", 1, (1.0, 3.0, 1.0)), Times("dense", 2, (2.0, 6.0, 4.0))
    assert ratio(dense, ours) == 2.0
