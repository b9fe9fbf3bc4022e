"""The charges of a traced step add up to the step, overlap and gaps included."""

from __future__ import annotations

from tvm_sparse.bench.account import charges


def test_charges_add_up():
    step = [("matmul_kernel", 0.0, 10.0), ("norm_kernel", 4.0, 12.0), ("matmul_kernel", 13.0, 20.0)]
    rows = {row["kernel"]: row for row in charges([*step, *((n, s + 20, e + 20) for n, s, e in step)], replays=2)}
    assert sum(row["us a step"] for row in rows.values()) == 20
    assert rows["matmul"]["launches"] == 2 and rows["matmul"]["us a step"] == 10 + 8
    assert rows["norm"]["us each"] == 2 and rows["norm"]["running us"] == 8 and rows["norm"]["idle us"] == 0
    assert rows["matmul"]["idle us"] == 0.5
