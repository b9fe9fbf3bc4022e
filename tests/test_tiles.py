"""Tiles: every bfloat16 matrix comes back bit for bit, and a lane's ring never loses what is not multiplied yet."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tvm_sparse.errors import Refusal
from tvm_sparse.formats import FORMATS, measure, pack, unpack
from tvm_sparse.formats.tile_words import RING
from tvm_sparse.formats.tiles import best_cut, cut_of
from tvm_sparse.plan import decide, expected_stats
from tvm_sparse.targets import MACHINES

TILES = FORMATS["tiles"]
# gap bits, bins, parts, sets, tiles: bins are added until the rows fit
CUTS = ((4, 1, 2, 2, 3), (5, 1, 4, 1, 1), (4, 1, 1, 3, 2), (5, 1, 7, 1, 5), (4, 1, 3, 1, 11))


def bits_of(weight: torch.Tensor) -> torch.Tensor:
    bits = weight.view(torch.int16)
    return bits.masked_fill((bits & 0x7FFF) == 0, 0)


@st.composite
def packings(draw):
    """Rows of very different density; values normal, or any finite bit pattern; a cut with room for the rows."""
    n, k = draw(st.integers(1, 70)), draw(st.sampled_from([1, 7, 31, 33, 100, 257, 700]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    density = rng.choice([0.0, *draw(st.lists(st.floats(0, 1), min_size=1, max_size=4))], size=(n, 1))
    values = torch.from_numpy(rng.normal(0, 0.01, (n, k))).bfloat16().view(torch.int16).numpy()
    if draw(st.booleans()):
        wild = rng.integers(-(1 << 15), 1 << 15, (n, k)).astype(np.int16)
        wild[(wild & 0x7F80) == 0x7F80] = -0x8000
        values = np.where(rng.random((n, k)) < draw(st.sampled_from([0.01, 0.5, 1.0])), wild, values)
    values = np.where(rng.random((n, k)) < density, values, rng.choice([0, -0x8000], (n, k))).astype(np.int16)
    g, _, parts, sets, tiles = draw(st.sampled_from(CUTS))
    bins = -(-n // (8 * sets * tiles)) + draw(st.integers(0, 2))
    return torch.from_numpy(values).view(torch.bfloat16), TILES.choice(g, bins, parts, sets, tiles)


@settings(max_examples=30, deadline=None)
@given(packings())
def test_round_trip_is_bit_exact(packing):
    weight, choice = packing
    packed = pack(weight, choice)
    assert torch.equal(unpack(packed).view(torch.int16), bits_of(weight))
    assert packed.nnz == int((bits_of(weight) != 0).sum())
    sizes: dict[str, int] = {}
    for buffer in TILES.buffers(tuple(weight.shape), choice):
        tensor = packed.buffers[buffer.name]
        assert str(tensor.dtype) == f"torch.{buffer.dtype}"
        named = zip(buffer.shape, tensor.shape, strict=True)
        assert list(tensor.shape) == [sizes.setdefault(d, real) if isinstance(d, str) else d for d, real in named]


def walk(packed) -> np.ndarray:
    """The matrix as the kernel sees it: words stored into rings, rings read step by step and zeroed; no residual."""
    cut = cut_of(packed.shape, packed.choice)
    parts = {name: tensor.numpy() for name, tensor in packed.buffers.items() if name != "res_val"}
    words = parts["words"].astype(np.int64)
    shift, base = 15 - cut.gap_bits, int(parts["scale"][0])
    rows, out = parts["rows"][0].reshape(cut.bins, cut.sets, cut.tiles, 8), np.zeros(packed.shape, np.int64)
    lanes = np.arange(32)
    for index, (first, rounds, count, _) in enumerate(parts["warps"]):
        bin, warp = divmod(index, cut.warps)
        ring, position, step = np.zeros((32, RING, 2), np.int64), np.zeros((32, 2), np.int64), 0
        for turn in range(rounds):
            for word in words[first + turn].reshape(32, 4, 2).transpose(1, 0, 2):
                position += (word >> shift) & ((1 << cut.gap_bits) - 1)
                for half in range(2):
                    value = word[:, half] & (0x8000 | ((1 << shift) - 1))
                    ring[lanes, position[:, half] % RING, half] = value
            for _ in range(int(parts["counts"][count + turn // 8]) >> (4 * (turn % 8)) & 15):
                column = (cut.begin()[warp // cut.sets] + step // 2) * 32 + step % 2 * 4
                for register in range(cut.step):
                    slot, tile = step % (RING // cut.step) * cut.step + register, register // 2
                    for lane, half in zip(*np.nonzero(ring[:, slot]), strict=True):
                        row = rows[bin, warp % cut.sets, tile, lane // 4]
                        at = column + lane % 4 * 8 + register % 2 * 2 + half
                        assert out[row, at] == 0 and row >= 0
                        value = ring[lane, slot, half]
                        out[row, at] = value & 0x8000 | (value & 0x7FFF) + (base << 7)
                    ring[:, slot] = 0
                step += 1
        assert not ring.any()
    return out


@settings(max_examples=15, deadline=None)
@given(packings())
def test_rings_give_back_what_words_hold(packing):
    weight, choice = packing
    packed = pack(weight, choice)
    found = walk(packed).astype(np.uint16).view(np.int16)
    want = bits_of(weight).numpy()
    assert ((found == want) | (found == 0)).all()
    residual = packed.buffers["res_val"].count_nonzero()
    assert int((found != want).sum()) == int(residual)


def test_sorted_rows_and_rows_in_their_order_come_back():
    generator = torch.Generator().manual_seed(0)
    even = torch.randn(64, 96, generator=generator) * (torch.rand(64, 96, generator=generator) < 0.3)
    steep = even * (torch.rand(64, 96, generator=generator) < torch.linspace(0, 1, 64)[:, None])
    choice = TILES.choice(4, 2, 2, 2, 2)
    for weight in (even.bfloat16(), steep.bfloat16(), torch.zeros(64, 96).bfloat16()):
        packed = pack(weight, choice)
        assert torch.equal(unpack(packed).view(torch.int16), bits_of(weight))
        assert packed.buffers["rows"][0].sort().values.tolist() == [*range(64)]


def test_what_does_not_fit_is_refused():
    with pytest.raises(Refusal, match="use more tiles or sets"):
        pack(torch.ones(100, 8, dtype=torch.bfloat16), TILES.choice(4, 1, 1, 1, 1))
    with pytest.raises(Refusal, match="parts x sets"):
        TILES.choice(4, 1, 9, 9, 1)
    weight = torch.zeros(8, 8, dtype=torch.bfloat16)
    weight[3, 3] = float("nan")
    with pytest.raises(Refusal, match="NaN or infinite"):
        pack(weight, TILES.choice(4, 1, 1, 1, 1))


@pytest.mark.parametrize("sparsity", [0.5, 0.75, 0.9])
def test_bytes_are_known_before_packing(sparsity):
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(1024, 2048, generator=generator) * 0.011
    weight = (weight * (weight.abs() > weight.abs().quantile(sparsity, dim=1, keepdim=True))).bfloat16()
    machine = replace(MACHINES["h200"], cores=8)
    (choice,) = TILES.choices(measure(weight), machine)
    assert TILES.nbytes(measure(weight), choice) == pytest.approx(pack(weight, choice).nbytes, rel=0.08)


@pytest.mark.parametrize("shape", [(34816, 5120), (5120, 17408), (16480, 5120), (1, 1), (40, 64), (248320, 5120)])
def test_every_shape_has_a_cut(shape):
    cut = cut_of(shape, TILES.choice(4, **best_cut(shape, MACHINES["h200"])))
    assert cut.bins * cut.rows >= shape[0] and cut.begin()[-1] * 32 >= shape[1]
    assert cut.bins <= 132 or shape[0] > 1 << 16


def test_a_cpu_never_takes_tiles():
    assert not TILES.choices(expected_stats((4096, 4096), 0.25), MACHINES["cpu"])
    assert decide("w", expected_stats((4096, 4096), 0.25), [MACHINES["cpu"]], batch=16).choice.name != "tiles"


def test_a_gpu_takes_tiles_for_many_sequences_only():
    chosen = [decide("w", expected_stats((16480, 5120), 0.25), [MACHINES["h200"]], batch) for batch in (1, 16)]
    assert [entry.choice.name for entry in chosen] == ["delta", "tiles"]
