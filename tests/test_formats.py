"""Formats: every bfloat16 matrix comes back bit for bit; a kernel can walk the delta stream without bounds checks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tvm_sparse.errors import Refusal
from tvm_sparse.formats import FORMATS, measure, pack, unpack
from tvm_sparse.formats.delta_bins import deal
from tvm_sparse.formats.delta_chunks import bits_of as word_bits
from tvm_sparse.formats.delta_chunks import unfold, words_of

DELTA = FORMATS["delta"]
ANY = [FORMATS["dense"].choice(), FORMATS["bitmap"].choice(), FORMATS["block"].choice(rows=3, cols=5)]
CUTS = ((3, 2, 1, 1, 8), (4, 132, 16, 8, 4), (4, 1, 1, 32, 4), (5, 5, 3, 2, 8), (6, 40, 2, 16, 4), (4, 64, 1, 1, 8))
CUTS += ((4, 7, 2, 8, 9), (3, 3, 1, 16, 9))  # words of 14 bits
ANY += [DELTA.choice(*cut) for cut in CUTS]
GATHERS = ((4, 3, 2, 8, 1), (3, 1, 24, 4, 2), (6, 132, 1, 1, 3), (5, 2, 5, 2, 1))
ANY += [FORMATS["gather"].choice(*cut) for cut in GATHERS]
TWO_FOUR = FORMATS["2:4"].choice()


def bits_of(weight: torch.Tensor) -> torch.Tensor:
    bits = weight.view(torch.int16)
    return bits.masked_fill((bits & 0x7FFF) == 0, 0)


def from_bits(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.uint16).view(np.int16)).view(torch.bfloat16)


@st.composite
def matrices(draw) -> torch.Tensor:
    """Rows of very different density; values normal, or any finite bit pattern: subnormals, -0.0, 2^127."""
    n, k = draw(st.integers(1, 70)), draw(st.sampled_from([1, 2, 7, 16, 31, 33, 100, 257, 700]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    density = rng.choice([0.0, *draw(st.lists(st.floats(0, 1), min_size=1, max_size=4))], size=(n, 1))
    values = torch.from_numpy(rng.normal(0, 0.01, (n, k))).bfloat16().view(torch.int16).numpy().view(np.uint16)
    if draw(st.booleans()):
        wild = rng.integers(0, 1 << 16, (n, k)).astype(np.uint16)
        wild[(wild & 0x7F80) == 0x7F80] = 0x8000
        values = np.where(rng.random((n, k)) < draw(st.sampled_from([0.01, 0.5, 1.0])), wild, values)
    return from_bits(np.where(rng.random((n, k)) < density, values, rng.choice([0, 0x8000], (n, k))))


@settings(max_examples=120, deadline=None)
@given(matrices(), st.sampled_from(ANY))
def test_round_trip_is_bit_exact(weight, choice):
    packed = pack(weight, choice)
    assert torch.equal(unpack(packed).view(torch.int16), bits_of(weight))
    assert packed.nnz == int((bits_of(weight) != 0).sum())
    fmt = FORMATS[choice.name]
    sizes = {}
    for buffer in fmt.buffers(tuple(weight.shape), choice):
        tensor = packed.buffers[buffer.name]
        assert str(tensor.dtype) == f"torch.{buffer.dtype}" and tensor.numel() > 0
        named = zip(buffer.shape, tensor.shape, strict=True)
        assert list(tensor.shape) == [sizes.setdefault(d, real) if isinstance(d, str) else d for d, real in named]


@settings(max_examples=40, deadline=None)
@given(matrices())
def test_two_of_four(weight):
    keep = torch.rand(weight.shape[0], -(-weight.shape[1] // 4), 4).argsort(2) < 2
    weight = weight.masked_fill(~keep.flatten(1)[:, : weight.shape[1]], 0)
    packed = pack(weight, TWO_FOUR)
    assert torch.equal(unpack(packed).view(torch.int16), bits_of(weight))
    meta = packed.buffers["meta"].view(torch.int16).to(torch.int64) & 0xFFFF
    for shift in range(0, 16, 4):
        assert bool(((meta >> shift & 3) < (meta >> shift + 2 & 3)).all())


def test_three_of_four_are_refused():
    with pytest.raises(Refusal, match="not a 2:4 matrix"):
        pack(torch.tensor([[1.0, 2.0, 3.0, 0.0]], dtype=torch.bfloat16), TWO_FOUR)


@pytest.mark.parametrize("choice", [*ANY, TWO_FOUR], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_are_refused(choice, value):
    weight = torch.zeros(40, 64, dtype=torch.bfloat16)
    weight[33, 7] = value
    with pytest.raises(Refusal, match="NaN or infinite"):
        pack(weight, choice)


def walk(packed, x: np.ndarray) -> np.ndarray:
    """y = W x the way a bin's lanes do it: chunk by chunk, parts added in order, no check of any column in a chunk.

    Each class of x ends in the zeros of a chunk: an IndexError would say that a lane runs too far.
    """
    part = {name: t.view(torch.int16 if t.itemsize == 2 else t.dtype).numpy() for name, t in packed.buffers.items()}
    g, bins, warps, classes, unit, *_ = (value for _, value in packed.choice.options)
    base, value_mask = int(part["scale"][0]), 0x80000000 | ((1 << word_bits(unit) - 1 - g) - 1) << 16
    res_val = packed.buffers["res_val"].double().numpy()
    words = unfold(torch.from_numpy(part["words"]), g, words_of(unit)).numpy().view(np.uint16).astype(np.uint32)
    steps = words.shape[1]
    columns = np.pad(x, (0, -len(x) % classes)).reshape(-1, classes)
    width = len(columns)
    columns = np.pad(columns, ((0, words_of(unit)), (0, 0)))
    y = np.full(packed.shape[0], np.nan)
    for bin in range(bins):
        parts, begins = [{} for _ in range(classes)], [{} for _ in range(classes)]
        for warp, lane in np.ndindex(warps, 32):
            stream, group = divmod(warp * 32 + lane, classes)
            start = int(part["lanes"][bin, warp * 32 + lane])
            rank, column, total = start >> 16, (start & 0xFFFF) - 1, 0.0
            begins[group][stream] = rank
            for step in range(steps * warp // warps, steps * (warp + 1) // warps):
                column = min(column, width - 1)
                for j, word in enumerate(words[bin, step, lane]):
                    column += int(word >> 15 - g) % (1 << g) + 1
                    value = float(((word << 16) & value_mask).astype(np.uint32).view(np.float32))
                    total += value * columns[column, group]
                    if j % unit == unit - 1 and word == 0x8000:
                        assert parts[group].setdefault(stream + rank, total) is total
                        rank, column, total = rank + 1, -1, 0.0
            assert parts[group].setdefault(stream + rank, total) is total
        row_of, res_begin = part["rows"][bin]
        for rank, row in enumerate(row_of[:-1]):
            if row >= 0:
                y[row] = 0.0
                for group in range(classes):
                    streams = sorted(begins[group])
                    first, end = (
                        r + max(s for s in streams if s == 0 or begins[group][s] < r) for r in (rank, rank + 1)
                    )
                    y[row] += sum(parts[group][p] for p in range(first, end)) * 2.0**base
                rest = range(res_begin[rank], res_begin[rank + 1])
                y[row] += sum(float(res_val[i]) * x[part["res_col"][i]] for i in rest)
    return y


def check_walk(weight: torch.Tensor, choice) -> None:
    x = np.random.default_rng(0).normal(size=weight.shape[1])
    expected = weight.double().numpy() @ x
    np.testing.assert_allclose(walk(pack(weight, choice), x), expected, rtol=1e-9, atol=1e-9 * np.abs(expected).max())


@settings(max_examples=15, deadline=None)
@given(matrices(), st.sampled_from([c for c in ANY if c.name == "delta"]))
def test_a_lane_walks_the_delta_stream(weight, choice):
    check_walk(weight, choice)


@pytest.mark.parametrize("gap_bits", [3, 4, 5, 6])
def test_no_lane_runs_further_than_the_zeros_after_x(gap_bits):
    """Sparse rows that end in the last column beside a dense one, in bins that end in long padding."""
    weight = torch.zeros(34, 2500, dtype=torch.bfloat16)
    weight[0] = 1.0
    weight[1:, -1] = torch.arange(1, 34).bfloat16()
    weight[5, ::9] = 3.0
    cuts = [{"bins": 132, "warps": 2}, {"bins": 3, "warps": 1, "classes": 1, "unit": 8}]
    for cut in cuts + [{"bins": 3, "warps": 2, "unit": 9}] * (gap_bits < 5):
        choice = DELTA.choice(gap_bits=gap_bits, **cut)
        check_walk(weight, choice)
        assert torch.equal(unpack(pack(weight, choice)), weight)


@settings(max_examples=15, deadline=None)
@given(matrices(), st.sampled_from(CUTS))
def test_pairs_of_rows_stand_side_by_side(weight, cut):
    weight = torch.cat([weight, weight.flip(0)])
    choice = DELTA.choice(*cut, pairs=1)
    packed = pack(weight, choice)
    assert torch.equal(unpack(packed).view(torch.int16), bits_of(weight))
    gate, up = packed.buffers["rows"][:, 0].reshape(-1, 2).unbind(1)
    assert torch.equal(up[gate >= 0], gate[gate >= 0] + len(weight) // 2) and bool((up[gate < 0] < 0).all())
    with pytest.raises(Refusal):
        pack(weight[1:], choice)


@pytest.mark.parametrize("pairs", [False, True])
def test_bins_are_of_equal_size_whatever_the_rows_are(pairs):
    """Long rows stand with short ones: the fullest class of a bin is hardly longer than the average."""
    lengths = torch.randint(40, 60, (2000, 4), generator=torch.Generator().manual_seed(0))
    lengths[:30] = 640
    dealt = deal(lengths, 16, pairs)
    assert int(dealt.end[:, :, -1].max()) <= lengths.sum() / (16 * 4) * 1.005
    assert sorted(dealt.row_of[dealt.row_of >= 0].tolist()) == list(range(2000))


def test_residual_and_window():
    """The window takes what is most frequent; what it cannot hold, and subnormals, are residual, in order."""
    weight = torch.zeros(2, 40, dtype=torch.bfloat16)
    weight[0, :20] = 0.01
    weight[0, 30], weight[1, 3], weight[1, 39] = 2.0**127, 2.0**-130, -(2.0**100)
    packed = pack(weight, DELTA.choice(bins=1, warps=1))
    row_of, res_start = packed.buffers["rows"][0].tolist()
    assert row_of == [0, 1, -1, -1] and res_start == [0, 1, 3, 3]
    assert packed.buffers["res_col"].tolist() == [30, 3, 39]
    assert packed.buffers["res_val"].tolist() == [2.0**127, 2.0**-130, -(2.0**100)]
    assert 0 <= int(packed.buffers["scale"]) <= 223


@settings(max_examples=60, deadline=None)
@given(matrices())
def test_stats_foretell_the_packed_size(weight):
    stats = measure(weight, blocks=((16, 16), (3, 5)))
    assert stats.nnz == int((bits_of(weight) != 0).sum())
    two_four = [TWO_FOUR] if stats.two_four else []
    for choice in [*ANY, *two_four, FORMATS["block"].choice(rows=16, cols=16)]:
        packed = pack(weight, choice)
        if choice.name in ("delta", "gather"):
            continue  # how evenly rows can be dealt to bins is known once they are dealt: test_plan.py, test_gather.py
        assert FORMATS[choice.name].nbytes(stats, choice) == packed.nbytes, choice


def test_sizes_beyond_int32_are_refused():
    weight = torch.zeros(1, dtype=torch.bfloat16).expand(2**16, 2**15)
    for choice in [*ANY, TWO_FOUR]:
        with pytest.raises(Refusal, match=r"2\^31"):
            pack(weight, choice)
