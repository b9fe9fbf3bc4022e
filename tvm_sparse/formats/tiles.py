"""Tiles: the delta stream cut for tensor cores, one 16-bit word per non-zero. The format for 2 to 16 tokens on a GPU.

What a lane reads, and why it never needs another lane's words, stands at `Tiles`. Packing works on a few bins at a
time: their rows are laid out as the lanes see them, then tile_words.py writes the streams.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import torch
from torch.nn.functional import pad

from tvm_sparse.errors import Refusal
from tvm_sparse.formats.base import Buffer, FormatChoice, Packed, Shape
from tvm_sparse.formats.bits import MAGNITUDE, as_bits
from tvm_sparse.formats.blocks import over_blocks
from tvm_sparse.formats.delta_words import Code, best_code
from tvm_sparse.formats.residual import exponents_of, put_residual, residual_of
from tvm_sparse.formats.stats import Stats
from tvm_sparse.formats.tile_words import LANES, RING, Lap, nibbles, positions, streams
from tvm_sparse.targets import Machine

GAP_BITS = (4, 5)
ROWS = 8  # of W in a tile
BLOCK = 32  # columns, two steps of mma.m16n8k16
OWN = 8  # neighbouring columns of a block that a lane holds, 4 in each step
_OPTIONS = ("gap_bits", "bins", "parts", "sets", "tiles")
MOST_WARPS, MOST_TILES = 16, 11  # what shared memory and registers hold
UNEVEN = 1.05  # how much more a lane may have to do before rows are sorted


@dataclass(frozen=True)
class Cut:
    """How a matrix [n, k] is shared out: `bins` of rows, one a CTA, and of each to `parts` x `sets` warps."""

    n: int
    k: int
    gap_bits: int
    bins: int
    parts: int
    sets: int
    tiles: int

    @property
    def blocks(self) -> int:
        return ceil(self.k / BLOCK)

    @property
    def step(self) -> int:
        """Registers of two bfloat16 that a lane has in a step."""
        return OWN // 4 * self.tiles

    @property
    def warps(self) -> int:
        """Of a CTA: warp w has set w % sets of the bin's rows and part w // sets of the columns."""
        return self.parts * self.sets

    @property
    def rows(self) -> int:
        """Places for rows in a bin."""
        return self.sets * self.tiles * ROWS

    def begin(self) -> list[int]:
        """Blocks at which the parts begin, and the end."""
        return [self.blocks * part // self.parts for part in range(self.parts + 1)]


def cut_of(shape: Shape, choice: FormatChoice) -> Cut:
    return Cut(*shape, **dict(choice.options))


class Tiles:
    """Options `gap_bits` g (4 or 5), and how the work is cut: `bins` B, `parts` Q, `sets` S, `tiles` R.

    A warp multiplies R tiles of 8 rows by its range of columns, a block of 32 in two steps of mma.m16n8k16. Lane l
    holds row l / 4 of each tile and 8 neighbouring columns of a block, from 8 (l % 4) on, four for each step: which
    columns meet in a product is free as long as x is read in the same order. Block by block, for each step, for each
    tile, these are two registers of two columns. So a lane puts values where its own fragments are read from.

    It has two streams, of the even and of the odd columns: the lower and the upper halves of its registers, and of the
    32-bit words in which it reads both. A word is the delta format's (value, exponent code and scale alike:
    formats/delta.py), except for its gap:

        bit   15      14..11    10..7           6..0        for g = 4
              sign    gap       exponent code   bf16 mantissa

    `gap`, 0 to 2^g - 1, is how many positions the stream moves on before the value is stored there, from 0 at first. A
    larger one inserts words of value 0. Positions are numbers of registers, with a hole wherever a further step would
    not fit into the 64 places of the ring that the streams go round (tile_words.Lap).

    A warp takes 4 words of every stream, a round, then multiplies as many steps as all of them have passed. No stream
    may be 64 positions or more past the first step not yet multiplied: one that would be takes words that store the
    same again, or 0 where that is multiplied already.

        words      uint16 [rounds, 32, 8]      a warp's rounds one after the other, an even number, warp after warp
        counts     uint32 [nc]                 steps to multiply after each round, 4 bits each, 8 rounds a word; two
                                               more words after each warp's
        warps      int32  [B Q S, 4]           a warp's first round, rounds, first word of counts, 0; bin after bin, as
                                               in `Cut.warps`
        rows       int32  [2, B S 8 R]         a bin's rows by set, tile and row of the tile: the original row, -1 for
                                               none; then where its residual values end
        scale      int32  [1]                  base
        res_col    int32  [nr]                 residual, in the order of `rows`: ascending within a row
        res_val    bfloat16 [nr]               bf16 subnormals, and exponents outside the window
    """

    name = "tiles"

    def choice(self, gap_bits: int = 4, bins: int = 132, parts: int = 3, sets: int = 5, tiles: int = 7) -> FormatChoice:
        options = tuple(zip(_OPTIONS, (gap_bits, bins, parts, sets, tiles), strict=True))
        choice = FormatChoice(self.name, options)
        if gap_bits not in GAP_BITS or min(bins, parts, sets, tiles) < 1 or not _fits(parts * sets, tiles):
            limits = f"gap_bits 4 or 5, parts x sets at most {MOST_WARPS}, tiles at most {MOST_TILES}, none below 1"
            raise Refusal(f"{choice}: {limits}")
        return choice

    def choices(self, stats: Stats, machine: Machine) -> Sequence[FormatChoice]:
        """One cut for the machine, with the split that needs fewer bytes; none on a CPU."""
        if not machine.is_gpu:
            return ()
        cut = best_cut(stats.shape, machine)
        made = [self.choice(gap_bits, **cut) for gap_bits in GAP_BITS]
        return (min(made, key=lambda choice: self.nbytes(stats, choice)),)

    def nbytes(self, stats: Stats, choice: FormatChoice) -> int:
        """An estimate: how often a stream must wait for its warp depends on where the zeros are, here at random."""
        cut = cut_of(stats.shape, choice)
        density = stats.density
        waiting = 4.2 * (1 - density) / (RING * density) if density else 0.0
        rounds = ceil(stats.words[cut.gap_bits] * (1 + waiting) / 256) + cut.bins * cut.warps
        residual = stats.nnz - best_code(stats.exponents, cut.gap_bits)[1]
        tables = 16 * cut.bins * cut.warps + 8 * cut.bins * cut.rows
        return rounds * 512 + rounds // 2 + tables + 6 * max(1, residual)

    def buffers(self, shape: Shape, choice: FormatChoice) -> tuple[Buffer, ...]:
        cut = cut_of(shape, choice)
        return (
            Buffer("words", ("rounds", LANES, 8), "uint16"),
            Buffer("counts", ("nc",), "uint32"),
            Buffer("warps", (cut.bins * cut.warps, 4), "int32"),
            Buffer("rows", (2, cut.bins * cut.rows), "int32"),
            Buffer("scale", (1,), "int32"),
            Buffer("res_col", ("nr",), "int32"),
            Buffer("res_val", ("nr",), "bfloat16"),
        )

    def pack(self, weight: torch.Tensor, choice: FormatChoice) -> Packed:
        bits = as_bits(weight)
        (n, k), device = bits.shape, bits.device
        cut = cut_of((n, k), choice)
        if cut.bins * cut.rows < n:
            raise Refusal(f"[{n}, {k}] in {choice}: {cut.bins} bins hold {cut.rows} rows each: use more tiles or sets")
        exponents = torch.stack(over_blocks(lambda a, b: exponents_of(bits[a:b]), n, k, device)).sum(0).tolist()
        code, _ = best_code(exponents, cut.gap_bits)
        values = over_blocks(lambda a, b: (bits[a:b] & MAGNITUDE).count_nonzero(1), n, k, device)
        rows = deal(torch.cat(values), cut)
        begin = torch.tensor(cut.begin(), device=device)
        steps = (2 * begin.diff()).repeat_interleave(cut.sets)

        def write(a: int, b: int) -> tuple[torch.Tensor, ...]:
            lanes = _as_lanes(bits, rows[a:b], cut, code)
            made = streams(lanes, code, cut.step, steps.repeat(b - a))
            return made.words, *nibbles(made), made.rounds

        parts = over_blocks(write, cut.bins, cut.rows * k, device)
        words, counts, needed, rounds = (torch.cat(kind) for kind in zip(*parts, strict=True))
        res_end, res_col, res_val = residual_of(bits, rows, code)
        warps = [rounds.cumsum(0) - rounds, rounds, needed.cumsum(0) - needed, torch.zeros_like(rounds)]
        buffers = {
            "words": words.view(torch.uint16),
            "counts": counts.view(torch.uint32),
            "warps": torch.stack(warps, 1).to(torch.int32),
            "rows": torch.stack([rows.view(-1), res_end]).to(torch.int32),
            "scale": torch.tensor([code.base], dtype=torch.int32, device=device),
            "res_col": res_col,
            "res_val": res_val,
        }
        return Packed(choice, (n, k), sum(exponents), buffers)

    def unpack(self, packed: Packed) -> torch.Tensor:
        (n, k), parts = packed.shape, packed.buffers
        cut = cut_of((n, k), packed.choice)
        code = Code(cut.gap_bits, int(parts["scale"]))
        words = parts["words"].view(torch.int16)
        rounds, rows = parts["warps"][:, 1].long(), parts["rows"].long()
        out = words.new_zeros(n, k)
        own = cut.warps  # warps of a bin
        ends = [0, *rounds.view(cut.bins, own).sum(1).cumsum(0).tolist()]
        begin = torch.tensor(cut.begin(), device=out.device)

        def expand(a: int, b: int) -> None:
            if ends[a] == ends[b]:
                return
            counts = rounds[a * own : b * own]
            place, values = positions(words[ends[a] : ends[b]], counts, code)
            turn, lane, word = (values != 0).nonzero(as_tuple=True)
            place, values = place[turn, lane, word], values[turn, lane, word]
            warp = torch.repeat_interleave(torch.arange(len(counts), device=out.device), counts)[turn]
            bin, part, set = a + warp // own, warp % own // cut.sets, warp % cut.sets
            register = Lap(cut.step).register(place)
            step, tile = register // cut.step, register // 2 % cut.tiles
            row = rows[0][((bin * cut.sets + set) * cut.tiles + tile) * ROWS + lane // 4]
            column = (begin[part] + step // 2) * BLOCK + lane % 4 * OWN + step % 2 * 4 + register % 2 * 2 + word % 2
            out[row, column] = values

        over_blocks(expand, cut.bins, cut.rows * k, out.device)
        put_residual(out, rows[0], rows[1].diff(prepend=rows.new_zeros(1)), parts)
        return out.view(torch.bfloat16)


def best_cut(shape: Shape, machine: Machine) -> dict[str, int]:
    """A bin for each SM (more where a bin would be too high), as few sets as fit, columns in parts for 16 warps."""
    tiles = ceil(shape[0] / ROWS)
    at_once = machine.cores * ceil(tiles / (64 * machine.cores))
    of_bin = ceil(tiles / at_once)
    sets = ceil(of_bin / 8)
    return {"bins": ceil(tiles / of_bin), "parts": MOST_WARPS // sets, "sets": sets, "tiles": ceil(of_bin / sets)}


def _fits(warps: int, tiles: int) -> bool:
    return warps <= MOST_WARPS and tiles <= MOST_TILES


def deal(weights: torch.Tensor, cut: Cut) -> torch.Tensor:
    """int64 [N], values of each row -> int64 [bins, rows]: the row at each place, by set, tile and row; -1 for none.

    In their own order where that is even enough: neighbours are then stored side by side. Else heaviest first, to the
    bins in turn and back again, and within a bin to its lanes' rows likewise: whatever a lane's tiles hold together
    comes out nearly equal. The last tiles stay empty, warp by warp.
    """
    n, device = len(weights), weights.device
    at = torch.arange(n, device=device)
    in_order = _places(at * cut.bins // n, at - (at * cut.bins // n * n + cut.bins - 1) // cut.bins, at, cut)
    rank, bin = at // cut.bins, at % cut.bins
    bin = torch.where(rank % 2 == 1, cut.bins - 1 - bin, bin)
    sorted_rows = weights.sort(descending=True, stable=True).indices
    dealt = _places(bin, rank, sorted_rows, cut)
    return in_order if _fullest(in_order, weights, cut) <= UNEVEN * _fullest(dealt, weights, cut) else dealt


def _places(bin: torch.Tensor, rank: torch.Tensor, row: torch.Tensor, cut: Cut) -> torch.Tensor:
    """Rows by bin and rank -> by bin, set, tile and row: across the lanes of all sets, and back again."""
    across = cut.sets * ROWS
    tile, place = rank // across, rank % across
    place = torch.where((tile % 2 == 1) & (tile < cut.tiles - 1), across - 1 - place, place)
    rows = row.new_full((cut.bins, cut.sets, cut.tiles, ROWS), -1)
    rows[bin, place // ROWS, tile, place % ROWS] = row
    return rows.view(cut.bins, -1)


def _fullest(rows: torch.Tensor, weights: torch.Tensor, cut: Cut) -> float:
    """Values of the lane that has most."""
    held = torch.where(rows >= 0, weights[rows.clamp_min(0)], 0)
    return float(held.view(cut.bins, cut.sets, cut.tiles, ROWS).sum(2).max())


def _as_lanes(bits: torch.Tensor, rows: torch.Tensor, cut: Cut, code: Code) -> torch.Tensor:
    """Rows of a few bins, [bins, places] -> value bits as the lanes have them, int16 [warps, 64, registers].

    Warps as the buffer `warps` has them. Parts are as long as the longest, with zeros at their ends.
    """
    bins = len(rows)
    chosen = bits[rows.clamp_min(0).view(-1)]
    held = code.holds(chosen & 0x7FFF) & (rows.view(-1, 1) >= 0)
    chosen = torch.where(held, code.value_bits(chosen), 0)
    chosen = pad(chosen, (0, (cut.blocks + 1) * BLOCK - cut.k))  # and a block of zeros
    begin = torch.tensor(cut.begin(), device=bits.device)
    longest = int(begin.diff().max())
    block = begin[:-1, None] + torch.arange(longest, device=bits.device)
    block = block.where(block < begin[1:, None], cut.blocks)
    fours = chosen.view(torch.int64).view(bins, cut.sets, cut.tiles, ROWS, cut.blocks + 1, 4, 2)[:, :, :, :, block]
    # bin, set, tile, row, part, block, lane's columns, step -> warps by bin, part, set; lanes by row, columns
    lanes = fours.permute(0, 4, 1, 3, 6, 5, 7, 2).contiguous()
    halves = lanes.view(torch.int16).view(-1, LANES, longest * 2 * cut.step, 2)
    return halves.transpose(2, 3).reshape(-1, LANES * 2, longest * 2 * cut.step)
