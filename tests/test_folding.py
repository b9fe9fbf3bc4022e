"""Folding recurrent layers: the pass, the schedules the command line gives, and what is built from them."""

from __future__ import annotations

import pytest
import torch
import tvm
from test_passes import run
from tvm.script import ir as I
from tvm.script import relax as R

from tvm_sparse.errors import Refusal
from tvm_sparse.layout import executed_config, make_layout
from tvm_sparse.library import import_model
from tvm_sparse.models.config import REGISTERED
from tvm_sparse.passes.fold_recurrent_layers import FoldRecurrentLayers
from tvm_sparse.plan import Plan

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
