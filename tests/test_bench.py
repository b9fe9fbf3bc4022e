"""The kernel benchmark on a small shape: checked results, every output format, refusals."""

from __future__ import annotations

import csv
import io
import json
import re
from xml.etree import ElementTree

import pytest
import torch

from tvm_sparse.bench import cpu_race, gpu_library, gpu_race
from tvm_sparse.bench.__main__ import main
from tvm_sparse.bench.kernels import publish
from tvm_sparse.bench.options import parse
from tvm_sparse.bench.timing import Times, ratio
from tvm_sparse.codegen.cuda import images
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


def test_rows_before_a_failure_are_kept(tmp_path, capsys):
    def rows():
        yield {"shape": "64x64", "sparsity": 0.5, "batch": 1, "format": "delta", "ratio": 2.0}
        raise RuntimeError("wrong result")

    with pytest.raises(RuntimeError):
        publish(parse(["--target", "h200", "--out", str(tmp_path)]), rows(), {"machine": "NVIDIA H200"})
    assert "64x64" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "kernels.json").read_text())["rows"]) == 1


def test_rows_of_several_runs_are_merged_by_key(tmp_path):
    """A row measured again replaces the old one, with its own command and date; the means and the plot see them all."""
    options = parse(["--target", "h200", "--out", str(tmp_path)])

    def run(command, *rows):
        kept = [dict(zip(("shape", "sparsity", "batch", "format", "ratio"), row, strict=True)) for row in rows]
        publish(options, kept, {"command": command, "date": "2026-11-22", "machine": "NVIDIA H200"})

    run("first", ("64x64", 0.5, 1, "delta", 1.0), ("96x96", 0.5, 1, "delta", 4.0), ("64x64", 0.5, 8, "tiles", 1.5))
    run("second", ("64x64", 0.5, 1, "delta", 9.0))
    rows = json.loads((tmp_path / "kernels.json").read_text())["rows"]
    told = {(row["shape"], row["batch"]): (row["ratio"], row["command"]) for row in rows}
    assert told == {("64x64", 1): (9.0, "second"), ("96x96", 1): (4.0, "first"), ("64x64", 8): (1.5, "first")}
    table = (tmp_path / "kernels.md").read_text()
    assert "first" in table and "second" in table and "NVIDIA H200" in table and "2026-11-22" in table
    assert re.search(r"geometric mean \| 0\.5 +\| 1 .*\| 6 ", table)
    assert len(list(csv.DictReader((tmp_path / "kernels.csv").open()))) == 3
    drawing = ElementTree.parse(tmp_path / "kernels.svg").getroot()
    texts = [text.text for text in drawing.iter("{http://www.w3.org/2000/svg}text")]
    assert {"batch 1", "batch 8", "1 / (1 - s)"} <= set(texts)


def test_a_gpu_runs_every_format_that_the_plan_chooses():
    options = parse(["--target", "h200", "--shapes", "5120x6144"])
    assert options.batches == (1, 2, 4, 8, 16, 2048)
    found = gpu_race.specs(options)
    assert len({spec.name for spec in found}) == len(found)
    assert {spec.m for spec in found} == {1, 2, 4, 8, 16, None}
    assert all(any(spec.m == m and spec.choice.name == "dense" for spec in found) for m in (1, 2, 4, 8, 16, None))


def test_a_gpu_library_says_how_each_kernel_is_called(toolkit, tmp_path):
    library = tmp_path / "kernels.so"
    shape = ["--shapes", "64x64", "--sparsity", "0.75", "--packed", "bitmap"]
    main(["kernels", "--target", "h200", *shape, "--batch", "1,100", "--build-library", str(library)])
    built = gpu_library.read(library)
    one, many = (next(facts for name, facts in built.items() if f"bitmap_64x64_m{m}_" in name) for m in (1, "n"))
    assert one.scratch == 0 and many.scratch > 0 and many.symbol.endswith("_product")
    assert "floor_kernel" in images(library)["sm_90a"]


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
