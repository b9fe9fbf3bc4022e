"""Pruning: an exact number of zeros, the smallest first, the same for every block size."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tvm_sparse.checkpoint import open_checkpoint
from tvm_sparse.errors import Refusal
from tvm_sparse.layout import make_layout
from tvm_sparse.models.config import REGISTERED, ModelConfig
from tvm_sparse.pruning import Pattern, PrunedWeights, Pruner, parse_pattern, select
from tvm_sparse.pruning import pruner as streaming

CONFIG = ModelConfig.from_json(
    REGISTERED["qwen3.5-0.8b"].to_json()
    | {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4,
       "layer_types": ["linear_attention"] * 3 + ["full_attention"], "tie_word_embeddings": False}
)  # fmt: skip


ANY_COLUMNS = st.integers(1, 40)


@st.composite
def matrices(draw, columns=ANY_COLUMNS):
    """Ragged shapes; few distinct values, so that thresholds fall among equals; zeros of both signs."""
    shape = draw(st.integers(1, 30)), draw(columns)
    rng = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    kind = draw(st.sampled_from(["normal", "few values", "mostly zero", "subnormal"]))
    values = rng.standard_normal(shape)
    if kind == "few values":
        values = np.round(values * 2) / 2
    if kind == "mostly zero":
        values *= rng.random(shape) < 0.2
    if kind == "subnormal":
        values *= 1e-39
    weight = torch.from_numpy(np.copysign(values, rng.standard_normal(shape)).astype(np.float32))
    return weight.bfloat16() if draw(st.booleans()) else weight


shares = st.one_of(st.sampled_from([0.0, 0.5, 0.75, 0.999]), st.floats(0, 0.999))


def smallest_dropped(values: torch.Tensor, zeros: int) -> torch.Tensor:
    """The specification: a stable sort by magnitude, the first `zeros` of it dropped."""
    out = values.clone()
    out[values.abs().double().sort(stable=True).indices[:zeros]] = 0
    return out + 0.0  # -0.0 is +0.0


def same_bits(one, two):
    kind = torch.int16 if one.dtype == torch.bfloat16 else torch.int32
    return one.dtype == two.dtype and torch.equal(one.view(kind), two.view(kind))


@given(matrices(), shares)
@settings(max_examples=200, deadline=None)
def test_whole_matrix_is_exact(weight, sparsity):
    zeros = int(sparsity * weight.numel() + 0.5)
    expected = smallest_dropped(weight.view(-1), zeros).view(weight.shape)
    pruned = weight.clone()
    found = Pruner(sparsity=sparsity).matrix("w", pruned)
    assert same_bits(pruned, expected)
    assert found.nnz == int(expected.count_nonzero())
    assert found.negative_zeros == int(((weight == 0) & weight.signbit()).sum())
    assert weight.numel() - found.nnz == max(zeros, int((weight == 0).sum()))


@given(matrices(), shares)
@settings(max_examples=200, deadline=None)
def test_every_row_is_exact(weight, sparsity):
    zeros = int(sparsity * weight.shape[1] + 0.5)
    expected = torch.stack([smallest_dropped(row, zeros) for row in weight])
    pruned = weight.clone()
    Pruner(sparsity=sparsity, granularity="row").matrix("w", pruned)
    assert same_bits(pruned, expected)


@given(st.data(), st.integers(1, 7), st.integers(1, 5))
@settings(max_examples=200, deadline=None)
def test_n_of_m_keeps_the_largest(data, n, more):
    m = n + more
    weight = data.draw(matrices(st.integers(1, 5).map(lambda groups: groups * m)))
    groups = weight.reshape(-1, m)
    expected = torch.stack([smallest_dropped(group, m - n) for group in groups]).reshape(weight.shape)
    pruned = weight.clone()
    Pruner(pattern=parse_pattern(f"{n}:{m}")).matrix("w", pruned)
    assert same_bits(pruned, expected)


@given(matrices(), st.integers(1, 9), st.integers(1, 9), shares)
@settings(max_examples=200, deadline=None)
def test_blocks_go_by_their_norm(weight, rows, cols, share):
    corners = [(i, j) for i in range(0, weight.shape[0], rows) for j in range(0, weight.shape[1], cols)]
    tiles = [weight[i : i + rows, j : j + cols].double().square().sum().item() for i, j in corners]
    expected = weight + 0.0
    for index in np.argsort(tiles, kind="stable")[: int(share * len(tiles) + 0.5)]:
        i, j = corners[index]
        expected[i : i + rows, j : j + cols] = 0
    pruned = weight.clone()
    Pruner(sparsity=share, pattern=parse_pattern(f"block:{rows}x{cols}")).matrix("w", pruned)
    assert same_bits(pruned, expected)


@given(matrices(st.just(24)), st.sampled_from(["unstructured", "row", "2:4", "block:4x8"]), st.integers(1, 40))
@settings(max_examples=100, deadline=None)
def test_block_size_does_not_matter(weight, how, rows):
    pattern = Pattern() if how == "row" else parse_pattern(how)
    pruner = Pruner(sparsity=0.5, pattern=pattern, granularity="row" if how == "row" else "matrix")
    whole, streamed = weight.clone(), weight.clone()
    expected = pruner.matrix("w", whole)
    before, streaming.READ_ROWS = streaming.READ_ROWS, rows
    try:
        assert pruner.matrix("w", streamed) == expected
    finally:
        streaming.READ_ROWS = before
    assert same_bits(whole, streamed)


@pytest.mark.parametrize("method", ["none", "magnitude"])
@pytest.mark.parametrize("how", ["unstructured", "2:4", "block:4x4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_are_refused_by_name(method, how, dtype, bad):
    weight = torch.ones(8, 8, dtype=dtype)
    weight[5, 3] = bad
    with pytest.raises(Refusal, match=r"layers\.7\.mlp\.up_proj\.weight holds NaN"):
        Pruner(method, sparsity=0.5, pattern=parse_pattern(how)).matrix("layers.7.mlp.up_proj.weight", weight)


def test_none_measures_and_cleans():
    weight = torch.tensor([[1.0, -0.0, 0.0, 2.0]]).bfloat16()
    found = Pruner("none").matrix("w", weight)
    assert (found.nnz, found.negative_zeros, found.density) == (2, 1, 0.5)
    assert not weight.signbit().any()


def test_patterns():
    assert parse_pattern("2:4", 0.5) == Pattern("n:m", n=2, m=4) and str(parse_pattern("2:4")) == "2:4"
    assert parse_pattern("block:16x8") == Pattern("block", rows=16, cols=8)
    assert parse_pattern("2:3", 0.33).sparsity == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    "text, sparsity, named",
    [
        ("2:4", 0.75, "sparsity of 0.5, not 0.75"),
        ("4:4", None, "0 < N < M"),
        ("0:4", None, "0 < N < M"),
        ("block:0x4", None, "not known"),
        ("diagonal", None, "not known"),
    ],
)
def test_bad_patterns(text, sparsity, named):
    with pytest.raises(Refusal, match=named):
        parse_pattern(text, sparsity)


@pytest.mark.parametrize(
    "settings",
    [
        {"sparsity": 1.0},
        {"sparsity": -0.1},
        {"sparsity": None},
        {"sparsity": 0.5, "method": "lottery"},
        {"sparsity": 0.5, "granularity": "column"},
        {"sparsity": 0.5, "granularity": "row", "pattern": Pattern("n:m", n=2, m=4)},
        {"sparsity": 0.75, "pattern": Pattern("n:m", n=2, m=4)},
    ],
)
def test_contradicting_settings(settings):
    with pytest.raises(Refusal):
        Pruner(**settings)


def test_pattern_that_does_not_divide_names_the_matrix():
    checkpoint = open_checkpoint("synthetic", CONFIG)
    with pytest.raises(Refusal, match=r"2:6 does not divide the 64 columns of layers\.0\."):
        PrunedWeights(checkpoint, Pruner(pattern=Pattern("n:m", n=2, m=6)), select(CONFIG))


def test_all_projections_are_selected():
    chosen = select(CONFIG)
    assert len(chosen) == 3 * (5 + 3) + (4 + 3)
    assert "layers.0.linear_attn.in_proj_a.weight" in chosen and "layers.3.self_attn.o_proj.weight" in chosen
    assert not {"lm_head.weight", "embed_tokens.weight"} & set(chosen)


def test_include_adds_exclude_removes_and_wins():
    assert "lm_head.weight" in select(CONFIG, include=["lm_head"])
    assert "lm_head.weight" not in select(CONFIG, include=["lm_head"], exclude=["head"])
    for anchored in (r"^layers\.0\.", r"^model\.layers\.0\.", r"^model\.language_model\.layers\.0\."):
        assert not any(name.startswith("layers.0.") for name in select(CONFIG, exclude=[anchored]))


@pytest.mark.parametrize("bad", ["(", "mpl"])
def test_useless_expressions_are_refused(bad):
    with pytest.raises(Refusal, match="--exclude"):
        select(CONFIG, exclude=[bad])


def test_runtime_parameters():
    """Each source pruned by itself, then stacked; streamed or whole, the same; unselected ones untouched."""
    checkpoint = open_checkpoint("synthetic", CONFIG)
    weights = PrunedWeights(checkpoint, Pruner(sparsity=0.75), select(CONFIG, exclude=["q_proj"]))
    for param in make_layout(CONFIG).params:
        if param.kind == "vector":
            assert weights.vector(param).dtype == torch.float32 and tuple(weights.vector(param).shape) == param.shape
            continue
        whole = weights.matrix(param)
        assert whole.dtype == torch.bfloat16 and tuple(whole.shape) == param.shape
        assert torch.equal(torch.cat(list(weights.blocks(param))), whole)
    for name in select(CONFIG, exclude=["q_proj"]):
        assert weights.zeros[name].sparsity == pytest.approx(0.75, abs=1e-3)
    assert weights.zeros["layers.3.self_attn.q_proj.weight"].sparsity < 0.01
    layout = make_layout(CONFIG).by_name
    head = checkpoint.tensor("lm_head.weight")
    assert torch.equal(weights.matrix(layout["lm_head.weight"]), head)
    norm = checkpoint.tensor("norm.weight").float()
    assert torch.equal(weights.vector(layout["norm.weight"]), 1 + norm)
