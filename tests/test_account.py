"""The charges of a traced step add up to the step, overlap and gaps included."""

from __future__ import annotations

import pytest

from tvm_sparse.bench.account import by_class, charges, product_names
from tvm_sparse.layout import make_layout
from tvm_sparse.models.config import REGISTERED


def test_charges_add_up():
    step = [("matmul_kernel", 0.0, 10.0), ("norm_kernel", 4.0, 12.0), ("matmul_kernel", 13.0, 20.0)]
    rows = {row["kernel"]: row for row in charges([*step, *((n, s + 20, e + 20) for n, s, e in step)], steps=2)}
    assert sum(row["us a step"] for row in rows.values()) == 20
    assert rows["matmul"]["launches"] == 2 and rows["matmul"]["us a step"] == 10 + 8
    assert rows["norm"]["us each"] == 2 and rows["norm"]["running us"] == 8 and rows["norm"]["idle us"] == 0
    assert rows["matmul"]["idle us"] == 0.5


def test_no_kernels_no_charges():
    assert charges([], steps=2) == [] and by_class([], {}) == {}


def test_kernels_by_class():
    names = product_names(make_layout(REGISTERED["qwen3.5-27b"]).params)
    assert names[34816, 5120] == "mlp.gate_up_proj"
    assert names[5120, 6144] == "linear_attn.out_proj and self_attn.o_proj"
    spent = {
        "matmul_delta_gap_bits4_bins132_warps24_classes8_unit4_34816x5120_m1_bf16_bf16": 1600.0,
        "matmul_dense_248320x5120_m1_bf16_f32": 550.0,
        "add_rms_norm_decode": 200.0,
        "rms_norm_decode": 2.0,
        "attention_part_decode": 120.0,
        "attention_join_decode": 20.0,
        "delta_step_decode": 130.0,
        "embedding_decode": 3.0,
        "something_5x7": 1.0,
        "nvjet_sm90_tst_64x16_64x13_4x1_v_bz_splitK_TNT": 40.0,
        "void cublasLt::splitKreduce_kernel<32, 16, int, float>": 2.0,
    }
    split = by_class([{"kernel": name, "us a step": us} for name, us in spent.items()], names)
    assert list(split) == [
        "mlp.gate_up_proj", "lm_head", "products by cuBLASLt", "attention", "delta rule", "norms", "others",
    ]  # fmt: skip
    assert list(split.values()) == pytest.approx([1.6, 0.55, 0.042, 0.14, 0.13, 0.202, 0.004])
