"""The layout: every checkpoint tensor goes into exactly one runtime parameter, and the shapes add up."""

from math import prod

import pytest

from tvm_sparse.layout import make_layout
from tvm_sparse.models.config import REGISTERED, tensors


@pytest.mark.parametrize("name", REGISTERED)
def test_every_tensor_is_used_once(name):
    config = REGISTERED[name]
    layout, table = make_layout(config), tensors(config)
    used = [source for param in layout.params for source in param.sources]
    assert sorted(used) == sorted(table)
    for param in layout.params:
        assert prod(param.shape) == sum(prod(table[source].shape) for source in param.sources)
    assert layout.schedule == tuple(range(config.num_hidden_layers))


def test_fused_projections_of_the_27b():
    shapes = {param.name: param.shape for param in make_layout(REGISTERED["qwen3.5-27b"]).params}
    assert shapes["layers.0.linear_attn.in_proj.weight"] == (16480, 5120)
    assert shapes["layers.3.self_attn.qkv_proj.weight"] == (14336, 5120)
    assert shapes["layers.0.mlp.gate_up_proj.weight"] == (34816, 5120)
    assert shapes["layers.0.linear_attn.conv1d.weight"] == (10240, 4)


def test_fusions_keep_the_order_of_rows():
    fusions = make_layout(REGISTERED["qwen3.5-0.8b"]).fusions
    assert [name.split(".")[-2] for name in fusions["layers.0.linear_attn.in_proj.weight"]] == [
        "in_proj_qkv",
        "in_proj_z",
        "in_proj_b",
        "in_proj_a",
    ]
    assert fusions["layers.3.self_attn.qkv_proj.weight"] == tuple(
        f"layers.3.self_attn.{part}_proj.weight" for part in "qkv"
    )
    assert not any("o_proj" in name for name in fusions)


def test_tied_models_have_no_head():
    assert "lm_head.weight" not in make_layout(REGISTERED["qwen3.5-0.8b"]).by_name
    assert make_layout(REGISTERED["qwen3.5-9b"]).by_name["lm_head.weight"].kind == "head"


def test_norms_scale_by_one_plus_weight_but_for_the_gated_one():
    params = make_layout(REGISTERED["qwen3.5-27b"]).by_name
    plain = {name.split(".", 2)[2] for name, param in params.items() if param.kind == "vector" and not param.transform}
    assert plain == {"linear_attn.A_log", "linear_attn.dt_bias", "linear_attn.norm.weight"}
    assert params["norm.weight"].transform == "one_plus"
    assert params["layers.3.self_attn.q_norm.weight"].transform == "one_plus"
