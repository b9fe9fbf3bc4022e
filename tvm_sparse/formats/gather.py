"""Gather: the delta stream for 3 to 16 tokens on a GPU, one 16-bit word per non-zero.

What a lane reads, and how tensor cores multiply what 32 lanes have gathered, stands at `Gather`. Packing takes three
passes over row blocks: exponents, then how long each row is, which deals the rows to bins, then the words.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import ceil, sqrt

import torch
from torch.nn.functional import pad

from tvm_sparse.errors import Refusal
from tvm_sparse.formats.base import Buffer, FormatChoice, Packed, Shape
from tvm_sparse.formats.bits import as_bits
from tvm_sparse.formats.blocks import over_blocks
from tvm_sparse.formats.delta_words import Code, best_code
from tvm_sparse.formats.gather_words import LANES, Entries, Lanes, entries, lanes, lengths
from tvm_sparse.formats.residual import exponents_of, put_residual, residual_of
from tvm_sparse.formats.stats import GAP_BITS, Stats
from tvm_sparse.targets import Machine

ROWS = 8  # of a group: a warp walks them side by side
UNIT = 16  # bytes of a column of x in shared memory: 8 tokens
FEW = 8  # groups of a bin
START = 0xFFF  # bits of a head's columns
SHARED = 225 << 10  # bytes a CTA
_OPTIONS = ("gap_bits", "bins", "warps", "classes", "spans")
_FULLEST = {8: 1.42, 4: 1.03, 2: 0.56, 1: 0.0}  # of so many normal numbers, the expected largest


@dataclass(frozen=True)
class Cut:
    """How a matrix [n, k] is shared out: groups of 8 rows to `bins`, columns to `spans`; a CTA has a span of a bin."""

    n: int
    k: int
    gap_bits: int
    bins: int
    warps: int
    classes: int
    spans: int

    @property
    def columns(self) -> int:
        """Columns of a span, whole units of 8."""
        return ceil(self.k / (8 * self.spans)) * 8

    @property
    def groups(self) -> int:
        """Of a bin."""
        return ceil(self.n / (ROWS * self.bins))

    @property
    def pieces(self) -> int:
        """Runs of a group's chunks that one warp takes, at most, in a CTA."""
        return self.groups + self.warps - 1

    @property
    def x_bytes(self) -> int:
        """Of 8 tokens of a span in shared memory, each class column on all banks once."""
        return self.columns // self.classes * 8 * UNIT

    def cuts(self, chunks: int) -> list[int]:
        """Chunks of a bin's span at which each warp begins, and the end."""
        return [chunks * warp // self.warps for warp in range(self.warps + 1)]


def cut_of(shape: Shape, choice: FormatChoice) -> Cut:
    return Cut(*shape, **dict(choice.options))


class Gather:
    """Options `gap_bits` g (3 to 6), `bins` B, `warps` W of a bin, `classes` R of columns (1, 2, 4, 8), `spans` P.

    x of 8 tokens stands in shared memory column by column, 16 bytes each. `ldmatrix` brings 32 columns of any
    addresses, one a lane, as fragments of mma.m16n8k16: without a conflict where the 8 lanes of a matrix lie on
    different banks. So column j is of class j mod R, lane l keeps to class l mod R, and with R < 8 x stands 8 / R times
    side by side. The columns are P spans of equal size, each for a CTA of its own.

    A warp walks a group of 8 rows side by side, one word a lane and row at a step, and sums each row over all its
    lanes. Of a row's words in a span those of a class are cut into 32 / R equal runs, lane i R + c takes the i-th of
    class c. A row takes as many steps as its longest run, a group as many as its longest row; rows are sorted by this.
    The words a lane does not need are 0, which moves nowhere and multiplies by 0. A chunk is a step of a group. Lane l
    has 16 bytes of it, two fields a word, which belong to different non-zeros:

        bit   15      14..11    10..7           6..0        for g = 4
              sign    gap       exponent code   bf16 mantissa

    The gap of word w is that of row w and lane l: how many columns of its class the lane moves on, 0 to 2^g - 1; a
    larger one inserts words of value 0. The value of row 4 h + a and lane 16 u + 8 o + 2 j + e (h, u, o, e: 0 or 1; a,
    j: 0 to 3) stands in word 4 h + 2 u + e of lane 8 a + 4 o + j, which is where it is part of a fragment. Values,
    exponent code and scale are the delta format's (formats/delta.py).

    Of a bin's chunks in a span, group after group, warp w takes [chunks * w // W, chunks * (w + 1) // W). What it has
    of one group is a piece; before a piece's chunks stands its head, in each lane 8 words with 12 bits of the class
    column where the lane stands before its first word, plus 1. The upper 4 bits of words 0 to 2 are its chunks, lowest
    first. Those of a group are neighbours.

        words      uint16 [chunks, 32, 8]      warp after warp, span after span, bin after bin, heads included
        warps      int32  [B P W + 1, 2]       a warp's first chunk, the number of its first piece in the CTA
        groups     int32  [B, P, groups + 1]   a group's first piece, and the end
        rows       int32  [3, 8 B groups]      by bin, ascending: the original row, -1 for none, last; where its
                                               residual values end; 8 x its group in the bin + its place there
        scale      int32  [1]                  base
        res_col    int32  [nr]                 residual, in the order of `rows`: ascending within a row
        res_val    bfloat16 [nr]               bf16 subnormals, and exponents outside the window
    """

    name = "gather"

    def choice(
        self, gap_bits: int = 4, bins: int = 132, warps: int = 24, classes: int = 8, spans: int = 1
    ) -> FormatChoice:
        choice = FormatChoice(self.name, tuple(zip(_OPTIONS, (gap_bits, bins, warps, classes, spans), strict=True)))
        if gap_bits not in GAP_BITS or classes not in _FULLEST or min(bins, warps, spans) < 1 or warps > 32:
            raise Refusal(f"{choice}: gap_bits 3 to 6, classes 1, 2, 4 or 8, warps at most 32, none below 1")
        return choice

    def choices(self, stats: Stats, machine: Machine) -> Sequence[FormatChoice]:
        """The cuts for 8 and for 16 tokens at once, with the split that needs fewer bytes; none on a CPU."""
        if not machine.is_gpu:
            return ()
        made = []
        for cut in cuts_for(stats.shape, machine):
            split = [self.choice(gap_bits, **cut) for gap_bits in GAP_BITS]
            made.append(min(split, key=lambda choice: self.nbytes(stats, choice)))
        return made

    def nbytes(self, stats: Stats, choice: FormatChoice) -> int:
        """An estimate: a row is as long as its fullest class, zeros taken to stand at random."""
        cut = cut_of(stats.shape, choice)
        runs = LANES // cut.classes
        of_class = stats.words[cut.gap_bits] / (cut.n * cut.spans * cut.classes)
        fullest = of_class + _FULLEST[cut.classes] * sqrt(of_class * (1 - stats.density))
        chunks = ceil(ceil(cut.n / ROWS) * cut.spans * (fullest / runs + 1) + 1)
        chunks += cut.bins * cut.spans * cut.pieces
        residual = stats.nnz - best_code(stats.exponents, cut.gap_bits)[1]
        tables = 8 * (cut.bins * cut.spans * cut.warps + 1) + 4 * cut.bins * cut.spans * (cut.groups + 1)
        return 512 * chunks + tables + 12 * ROWS * cut.bins * cut.groups + 4 + 6 * max(1, residual)

    def buffers(self, shape: Shape, choice: FormatChoice) -> tuple[Buffer, ...]:
        cut = cut_of(shape, choice)
        return (
            Buffer("words", ("chunks", LANES, 8), "uint16"),
            Buffer("warps", (cut.bins * cut.spans * cut.warps + 1, 2), "int32"),
            Buffer("groups", (cut.bins, cut.spans, cut.groups + 1), "int32"),
            Buffer("rows", (3, ROWS * cut.bins * cut.groups), "int32"),
            Buffer("scale", (1,), "int32"),
            Buffer("res_col", ("nr",), "int32"),
            Buffer("res_val", ("nr",), "bfloat16"),
        )

    def pack(self, weight: torch.Tensor, choice: FormatChoice) -> Packed:
        bits = as_bits(weight)
        (n, k), device = bits.shape, bits.device
        cut = cut_of((n, k), choice)
        if not _countable(cut):
            raise Refusal(f"[{n}, {k}] in {choice}: {START} columns of a class or more: use more spans or classes")
        exponents = torch.stack(over_blocks(lambda a, b: exponents_of(bits[a:b]), n, k, device)).sum(0).tolist()
        code, _ = best_code(exponents, cut.gap_bits)

        def words_of(chosen: torch.Tensor) -> Entries:
            return entries(chosen, cut.classes, cut.spans, cut.columns, code)

        steps = over_blocks(lambda a, b: lengths(words_of(bits[a:b]), cut.classes, cut.spans), n, k, device)
        rows, longest = deal(torch.cat(steps), cut)
        pieces, warps, groups = _shared_out(longest.tolist(), cut)
        pieces = pieces.to(device)
        ends = warps[:: cut.spans * cut.warps, 0].tolist()  # chunks before each bin, and all

        def write(a: int, b: int) -> torch.Tensor:
            chosen = rows[a:b].reshape(-1)
            kept = torch.where(chosen[:, None] >= 0, bits[chosen.clamp_min(0)], 0)
            held = lanes(words_of(kept), cut.classes, cut.spans, code)
            own = pieces[(pieces[:, 1] >= a) & (pieces[:, 1] < b)] - pieces.new_tensor([ends[a], a, 0, 0, 0, 0])
            return _written(held, own, ends[b] - ends[a], cut, code)

        words = torch.cat(over_blocks(write, cut.bins, ROWS * cut.groups * k, device))
        table, slots = torch.where(rows >= 0, rows, n).sort(1)
        table = torch.where(table < n, table, -1)
        res_end, res_col, res_val = residual_of(bits, table, code)
        buffers = {
            "words": words.view(torch.uint16),
            "warps": warps.to(device, torch.int32),
            "groups": groups.to(device, torch.int32),
            "rows": torch.stack([table.view(-1), res_end, slots.view(-1)]).to(torch.int32),
            "scale": torch.tensor([code.base], dtype=torch.int32, device=device),
            "res_col": res_col,
            "res_val": res_val,
        }
        return Packed(choice, (n, k), sum(exponents), buffers)

    def unpack(self, packed: Packed) -> torch.Tensor:
        (n, k), parts = packed.shape, packed.buffers
        cut = cut_of((n, k), packed.choice)
        code = Code(cut.gap_bits, int(parts["scale"]))
        words, rows = parts["words"].view(torch.int16), parts["rows"].long()
        slots = rows[2].view(cut.bins, -1)
        places = torch.empty_like(slots).scatter_(1, slots, rows[0].view(cut.bins, -1)).view(-1, cut.groups, ROWS)
        warps, groups = parts["warps"].long(), parts["groups"].long().view(cut.bins, cut.spans, -1)
        out = words.new_zeros(n, cut.spans * cut.columns)
        of_bin = cut.spans * cut.warps
        lane = torch.arange(LANES, device=words.device)

        def expand(a: int, b: int) -> None:
            begin, end = int(warps[a * of_bin, 0]), int(warps[b * of_bin, 0])
            here = words[begin:end]
            heads, jobs, numbers = _heads(here, warps[a * of_bin : b * of_bin + 1] - warps.new_tensor([begin, 0]))
            if not len(heads):
                return
            is_head = torch.zeros(len(here), dtype=torch.bool, device=words.device)
            is_head[heads] = True
            piece = is_head.long().cumsum(0) - 1
            gaps = (code.gaps(here) - 1).long().masked_fill(is_head[:, None, None], 0).cumsum(0)
            column = gaps - gaps[heads][piece] + (here[heads][piece] & START) - 1  # [chunks, lanes, rows]
            values = code.values(here).masked_fill(is_head[:, None, None], 0)
            # lane a o j, word h u e -> lane u o j e, row h a
            values = values.view(-1, 4, 2, 4, 2, 2, 2).permute(0, 5, 2, 3, 6, 4, 1).reshape(-1, LANES, ROWS)
            bin, span = a + jobs // of_bin, jobs % of_bin // cut.warps
            group = (groups[bin, span] <= numbers[:, None]).sum(1) - 1
            at, by, row = values.nonzero(as_tuple=True)
            found = column[at, by, row] * cut.classes + lane[by] % cut.classes + span[piece[at]] * cut.columns
            out[places[bin, group][piece[at], row], found] = values[at, by, row]

        over_blocks(expand, cut.bins, ROWS * cut.groups * k, words.device)
        put_residual(out, rows[0], rows[1].diff(prepend=rows.new_zeros(1)), parts)
        return out[:, :k].contiguous().view(torch.bfloat16)


def cuts_for(shape: Shape, machine: Machine) -> list[dict[str, int]]:
    """As few spans as let x of 8 tokens stand in an SM's shared memory; and a cut for 16 tokens where x of all columns
    fits. With 4 classes rows are 4 to 8 % shorter, but x takes twice the stores: not for few rows. 16 warps need fewer
    heads than 24, which are faster where there is more to do than a group each.
    """
    made = []
    for tile, most_spans in ((8, 8), (16, 1)):
        for spans in (1, 2, 4, 8):
            bins = max(1, machine.cores // spans)
            many = tile == 8 and Cut(*shape, 4, bins, 16, 8, spans).groups * spans > 16
            cuts = [Cut(*shape, 4, bins, 24 if many else 16, classes, spans) for classes in (4, 8)]
            cuts = [cut for cut in cuts if cut.classes == 8 or cut.groups >= FEW]
            fits = [cut for cut in cuts if shared_bytes(cut, tile) <= SHARED and _countable(cut)]
            if fits and spans <= most_spans:
                made.append({"bins": bins, "warps": fits[0].warps, "classes": fits[0].classes, "spans": spans})
                break
    return [cut for i, cut in enumerate(made) if cut not in made[:i]]


def _countable(cut: Cut) -> bool:
    """Whether a head has bits for every class column."""
    return cut.columns // cut.classes < START


def tokens_at_once(cut: Cut, tokens: int | None = None) -> int:
    """8; of more, or of any number (None), 16 where their x fits and a thread has registers for their sums."""
    many = tokens is None or tokens > 8
    return 16 if many and cut.warps <= 16 and shared_bytes(cut, 16) <= SHARED else 8


def shared_bytes(cut: Cut, tile: int = 8) -> int:
    """Shared memory of a CTA that multiplies `tile` tokens: x, the sums of its pieces, its tables."""
    numbers = ROWS * 8 * 4 * (tile // 8)  # bytes of a group's sums
    tables = cut.groups + 1 + 3 * ROWS * cut.groups + 1
    received = (cut.spans - 1) * cut.groups
    return tile // 8 * cut.x_bytes + (cut.pieces + received) * numbers + -(-tables // 4) * 16


def deal(steps: torch.Tensor, cut: Cut) -> tuple[torch.Tensor, torch.Tensor]:
    """int64 [N, P], steps of each row -> the row at each place, -1 for none, and the longest of each group.

    int64 [bins, groups * 8] and [bins, P, groups]. Eight neighbours go to the same bin, so that a CTA's results fill
    whole sectors of memory: longest eights first, to the bins in turn and back again. Of a bin the longest rows are
    the first group.
    """
    n = len(steps)
    length = pad(steps.sum(1), (0, ROWS * cut.groups * cut.bins - n), value=-1)
    eights = length.view(-1, ROWS).sum(1).sort(descending=True, stable=True).indices.view(cut.groups, cut.bins)
    eights[1::2] = eights[1::2].flip(1)
    rows = (eights.T[..., None] * ROWS + torch.arange(ROWS, device=steps.device)).reshape(cut.bins, -1)
    rows = rows.gather(1, length[rows].sort(dim=1, descending=True, stable=True).indices)
    rows = torch.where(rows < n, rows, -1)
    longest = torch.where(rows[..., None] >= 0, steps[rows.clamp_min(0)], 0)
    return rows, longest.view(cut.bins, cut.groups, ROWS, -1).amax(2).transpose(1, 2)


def _shared_out(longest: list[list[list[int]]], cut: Cut) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Chunks of each group, [bins][P][groups] -> pieces and the buffers `warps` and `groups`, int64.

    A piece: its head's place, bin, span, group, first step, steps.
    """
    pieces: list[tuple[int, ...]] = []
    warps: list[tuple[int, int]] = []
    groups: list[list[int]] = []
    place = 0
    for bin, spans in enumerate(longest):
        for span, chunks in enumerate(spans):
            begins = list(accumulate(chunks, initial=0))
            cuts = cut.cuts(begins[-1])
            marks = {chunk: i for i, chunk in enumerate(sorted({*begins, *cuts}))}  # a piece between every two
            warps += [(place + chunk + marks[chunk], marks[chunk]) for chunk in cuts[:-1]]
            groups.append([marks[chunk] for chunk in begins])
            for begin, end in pairwise(marks):
                group = bisect_right(begins, begin) - 1
                pieces.append((place + begin + marks[begin], bin, span, group, begin - begins[group], end - begin))
            place += begins[-1] + len(marks) - 1
    warps.append((place, 0))
    shape = (cut.bins, cut.spans, cut.groups + 1)
    return torch.tensor(pieces).view(-1, 6), torch.tensor(warps), torch.tensor(groups).view(shape)


def _written(held: Lanes, pieces: torch.Tensor, chunks: int, cut: Cut, code: Code) -> torch.Tensor:
    """The lanes of a few bins' rows -> int16 [chunks, 32, 8]; pieces count chunks and bins from the first of these."""
    out = held.gaps.new_zeros(chunks, LANES, ROWS)
    head, bin, span, group, first, steps = pieces.unbind(1)
    if not len(head):
        return out
    eight = torch.arange(ROWS, device=out.device)
    rows = (bin * cut.groups + group)[:, None] * ROWS + eight  # [pieces, 8]
    passed = pad(held.gaps.cumsum(3, dtype=torch.int32), (1, 0))[rows, span[:, None], :, first[:, None]]
    heads = (held.starts[rows, span[:, None]] + passed).transpose(1, 2).contiguous()
    for word in range(3):
        heads[:, :, word] |= (steps >> 4 * word & 15)[:, None] << 12
    out[head] = heads.to(torch.int32).to(torch.int16)  # which drops what does not fit 16 bits
    piece = torch.repeat_interleave(torch.arange(len(steps), device=out.device), steps)
    nth = torch.arange(len(piece), device=out.device) - (steps.cumsum(0) - steps)[piece]
    at = rows[piece], span[piece, None], slice(None), (first[piece] + nth)[:, None]
    # row h a, lane u o j e -> lane a o j, word h u e
    values = held.values[at].view(-1, 2, 4, 2, 2, 4, 2).permute(0, 2, 4, 5, 1, 3, 6).reshape(-1, LANES, ROWS)
    out[head[piece] + 1 + nth] = values | held.gaps[at].transpose(1, 2) << code.gap_shift
    return out


def _heads(words: torch.Tensor, warps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """int16 [chunks, 32, 8] and their `warps` -> where heads stand, ascending; of which warp, which piece of a CTA."""
    first = words[:, 0, :3].to(torch.int32) >> 12 & 15
    steps = (first << 4 * torch.arange(3, device=words.device)).sum(1)
    at, job, number = warps[:-1, 0], torch.arange(len(warps) - 1, device=words.device), warps[:-1, 1]
    end = warps[1:, 0]
    found = []
    while len(at):
        some = at < end
        at, job, number, end = at[some], job[some], number[some], end[some]
        found.append(torch.stack([at, job, number]))
        at, number = at + 1 + steps[at], number + 1
    together = torch.cat(found, 1)
    return tuple(together[:, together[0].sort().indices])
