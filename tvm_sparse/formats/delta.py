"""The delta stream: one word of 16 or 14 bits per non-zero, index included. The format for batch 1 on a GPU.

How a word becomes a product, how the words are cut for the lanes of a machine, and what the residual holds, stands at
`Delta`. Packing takes two passes over row blocks: the first counts each row's words, which deals the rows to bins; the
second writes the words.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, sqrt

import torch
from torch.nn.functional import pad

from tvm_sparse.errors import Refusal
from tvm_sparse.formats.base import Buffer, FormatChoice, Packed, Shape
from tvm_sparse.formats.bits import as_bits
from tvm_sparse.formats.blocks import over_blocks
from tvm_sparse.formats.delta_bins import WARP, Bins, deal, slots, stream_begin, unweave, weave
from tvm_sparse.formats.delta_chunks import SLOTS, bits_of, fold, unfold, words_of
from tvm_sparse.formats.delta_words import END, Code, Survey, best_code, columns_before, survey, write_rows
from tvm_sparse.formats.residual import put_residual
from tvm_sparse.formats.stats import CHUNK, GAP_BITS, Stats
from tvm_sparse.targets import Machine

_GAPS = {4: GAP_BITS, 8: GAP_BITS, 9: (3, 4)}
"""By unit, how many bits a gap may have."""
_RESIDUAL = 2e-4
"""Share of the values that may be outside the window of words of 14 bits: a kernel adds them one after the other."""
_FIELD = 1 << 16  # a column, a row's rank in its bin, and a part's number fit 16 bits


class Delta:
    """Options `gap_bits` g (3 to 6), `bins` B, `warps` W of a bin, `classes` R of columns, `unit` U (words); `pairs`,
    where it stands, is 1.

    A word of 16 bits (U of 4 or 8), here for g = 4:

        bit   15      14..11     10..7           6..0
              sign    gap - 1    exponent code   bf16 mantissa

    A word of 14 bits (U of 9) has two exponent bits less, so for g = 4 only three exponents: enough for what is
    left of trained weights once the smallest three quarters are zero. `delta_chunks` says how 9 of them fill 16 bytes;
    everywhere else they are 16-bit words whose code is small.

    Placed into a float32, `(w << 16) & 0x87ff0000` (the gap's bits masked), the code is the exponent field itself:
    code c >= 1 means exponent field base + c; code 0 stands with mantissa 0 only and is exactly 0. So value =
    float(that) * 2^base, and y = 2^(base - 96) * sum(float(that) * (2^96 x)).

    Column j belongs to class j mod R, and a row is split into R segments, one for each class: a lane of a GPU that
    keeps to one class keeps to the banks of shared memory where that class of x stands. `gap` counts columns of the
    class since the segment's previous word, 1 to 2^g; a larger one inserts fillers, words of value 0 with the largest
    gap. A segment takes whole units of U words, also where it holds no value: padding (value 0, gap 1) and, as its
    very last word, 0x8000: the value -0.0, with gap 1, which ends it.

    Rows are dealt to bins of nearly equal size: a bin is what one CTA does, and B the CTAs a GPU holds at once. `rank`
    is a row's place in its bin; with `pairs` row r has an even one and row r + N / 2 the next, so that a CTA can
    compute with both. The segments of a class stand one after the other, by rank, and are cut into one stream
    for each lane of the class: lane l of a warp is of class l mod R, so there are S = 32 W / R streams, and stream s is
    lane s * R + class of the bin's 32 W. Warp w has steps [steps * w // W, steps * (w + 1) // W), a chunk, 8 or
    9 words, a step for each lane. A stream begins and ends anywhere in a segment and may touch many; what a class's
    streams leave unused at their end is padding. What stream s has of the segment of rank r is part s + r of the class:
    every number of 0 .. S + rows is one part, those of a segment are neighbours, and adding them in order gives the
    same sum in every run.

        words      uint16 [B, steps, 32, 8]    chunk i of lane l in warp w, 16 bytes: [bin, steps * w // W + i, l]
        lanes      uint32 [B, 32 W]            where a stream begins: rank << 16 | columns of the class already passed
        rows       int32  [B, 2, slots]        by rank: the original row, -1 for none; its first residual value.
                                               The last slot is free, so that the next one's first is a row's end
        scale      int32  [1]                  base
        res_col    int32  [nr]                 residual, by bin, rank, class, column
        res_val    bfloat16 [nr]               bf16 subnormals, and exponents outside the window

    A stream that starts a chunk at most at the end of its class reads no column further than a chunk has words beyond
    it; only the padding at its end would go on, and a kernel holds it there. The residual keeps one triple of value 0
    where a matrix has none, so that no buffer is empty.
    """

    name = "delta"

    def choice(
        self, gap_bits: int = 4, bins: int = 132, warps: int = 24, classes: int = 8, unit: int = 4, pairs: int = 0
    ) -> FormatChoice:
        options = {"gap_bits": gap_bits, "bins": bins, "warps": warps, "classes": classes, "unit": unit}
        if pairs:
            options["pairs"] = 1
        known = gap_bits in _GAPS.get(unit, ()) and bins >= 1 and 1 <= warps <= 32
        if not known or classes not in (1, 2, 4, 8, 16, 32):
            asked = ", ".join(f"{key}={value}" for key, value in options.items())
            limits = "gap_bits is 3 to 6, bins at least 1, warps 1 to 32, classes a power of two up to 32, unit 4 or 8"
            raise Refusal(f"delta {asked}: {limits}, or 9 with gap_bits 3 or 4")
        return FormatChoice(self.name, tuple(options.items()))

    def choices(self, stats: Stats, machine: Machine) -> Sequence[FormatChoice]:
        """One split: the usual one, unless another saves 2 % or more: every split is one more kernel to tune."""
        cut, units = {"bins": 64, "warps": 1, "classes": 1}, [8]
        if machine.is_gpu:
            cut, units = {"bins": machine.cores, "warps": 24, "classes": gpu_classes(stats.shape[1])}, [9, 4]
        every = [self.choice(**cut, unit=unit, gap_bits=g) for unit in units for g in _GAPS[unit]]
        held = [c for c in every if _outside(stats, c) <= _RESIDUAL * stats.nnz or c.option("unit") != 9]
        usual = next(c for c in held if c.option("gap_bits") == 4)
        if not _fits(stats.shape, usual):
            return ()
        best = min(held, key=lambda c: self.nbytes(stats, c))
        return (best if self.nbytes(stats, best) < 0.98 * self.nbytes(stats, usual) else usual,)

    def nbytes(self, stats: Stats, choice: FormatChoice) -> int:
        """An estimate: only packing deals the rows, and a class's gaps are taken to be like those of all columns.

        Random rows leave the fullest class of a bin classes / 4 deviations of a segment above the average, or about so.
        """
        g, bins, warps, classes, unit, *_ = (value for _, value in choice.options)
        n, chunk = stats.shape[0], words_of(unit)
        segment = stats.words[g] / (n * classes) + (unit + 1) / 2  # which ends anywhere in its last unit
        fullest = n / bins * segment + classes / 4 * sqrt(segment * (1 - stats.density))
        steps = ceil(max(fullest * classes, CHUNK * stats.longest[g]) / (WARP * chunk))
        streamed = bins * steps * 2 * WARP * SLOTS
        tables = 4 * bins * WARP * warps + 8 * bins * slots(n, bins) + 4
        return streamed + tables + 6 * max(1, _outside(stats, choice))

    def buffers(self, shape: Shape, choice: FormatChoice) -> tuple[Buffer, ...]:
        bins, warps = choice.option("bins"), choice.option("warps")
        return (
            Buffer("words", (bins, "steps", WARP, SLOTS), "uint16"),
            Buffer("lanes", (bins, WARP * warps), "uint32"),
            Buffer("rows", (bins, 2, slots(shape[0], bins)), "int32"),
            Buffer("scale", (1,), "int32"),
            Buffer("res_col", ("nr",), "int32"),
            Buffer("res_val", ("nr",), "bfloat16"),
        )

    def pack(self, weight: torch.Tensor, choice: FormatChoice) -> Packed:
        bits = as_bits(weight)
        (n, k), device = bits.shape, bits.device
        if not _fits((n, k), choice):
            raise Refusal(f"[{n}, {k}] in {choice}: more than {_FIELD - 1} columns, or rows of a bin: use more bins")
        g, bins, warps, classes, unit, *_ = (value for _, value in choice.options)
        chunk = words_of(unit)
        code, surveys = _surveyed(bits, g, bits_of(unit), classes)
        units = torch.cat([part.words for part in surveys]).view(n, classes) // unit + 1
        dealt = deal(units, bins, in_pairs(choice))
        lanes = WARP // classes
        steps = -(-int(dealt.end[:, :, -1].max()) * unit // (chunk * lanes))
        words = bits.new_zeros(bins, classes, steps * lanes, chunk)
        out = words.view(-1)
        bin, rank = dealt.slot // dealt.row_of.shape[1], dealt.slot % dealt.row_of.shape[1]
        stream = (bin[:, None] * classes + torch.arange(classes, device=device)) * (steps * lanes * chunk)
        ends = stream + dealt.end[bin, :, rank] * unit
        starts = ends - units * unit
        out[ends.view(-1) - 1] = END

        def write(a: int, b: int) -> None:
            write_rows(out, _segments(bits[a:b], classes), starts[a:b].view(-1), code)

        over_blocks(write, n, k, device)
        begin = stream_begin(steps, warps, classes, device)
        rows = (dealt.row_of >= 0).sum(1).view(-1, 1, 1)
        at = (begin * (chunk // unit)).expand(bins, classes, -1).contiguous()
        rank = torch.searchsorted(dealt.end, at, right=True).minimum(rows)
        first = pad(dealt.end, (1, 0)).gather(2, rank)

        def passed(a: int, b: int) -> torch.Tensor:
            before = columns_before(words[a:b].view((b - a) * classes, -1), code, unit).view(b - a, classes, -1)
            return before.gather(2, at[a:b]) - before.gather(2, first[a:b])

        column = torch.cat(over_blocks(passed, bins, words[0].numel(), device)).clamp_(0, -(-k // classes))
        res_start, res_col, res_val = _residual(surveys, dealt, classes)
        buffers = {
            "words": weave(fold(words, g), warps).view(torch.uint16),
            "lanes": (rank << 16 | column).transpose(1, 2).reshape(bins, -1).to(torch.int32).view(torch.uint32),
            "rows": torch.stack([dealt.row_of, res_start], 1).to(torch.int32),
            "scale": torch.tensor([code.base], dtype=torch.int32, device=device),
            "res_col": res_col,
            "res_val": res_val,
        }
        return Packed(choice, (n, k), sum(part.nnz for part in surveys), buffers)

    def unpack(self, packed: Packed) -> torch.Tensor:
        n, k = packed.shape
        g, bins, warps, classes, unit, *_ = (value for _, value in packed.choice.options)
        parts = packed.buffers
        code = Code(g, int(parts["scale"]), bits_of(unit))
        slots = unweave(parts["words"].view(torch.int16), warps, classes)
        words = unfold(slots, g, words_of(unit)).view(bins, classes, -1, unit)
        out = words.new_zeros(n, k)
        row_of, res_start = parts["rows"].long().unbind(1)
        width = -(-k // classes)

        def expand(a: int, b: int) -> None:
            here = words[a:b].reshape((b - a) * classes, -1, unit)
            ended = here[:, :, -1] == END
            rank = ended.cumsum(1) - ended.long()
            before = columns_before(here.view(len(here), -1), code, unit)[:, :-1]
            opens = pad(ended, (1, -1), value=True)
            first = before.masked_fill(~opens, 0).cummax(1).values  # columns only grow
            column = (before - first)[:, :, None] + code.gaps(here).cumsum(2) - 1
            values = code.values(here)
            stream, at, word = values.nonzero(as_tuple=True)
            bin, group = a + stream // classes, stream % classes
            found = column[stream, at, word]
            assert not found.numel() or int(found.max()) < width
            out[row_of[bin, rank[stream, at]], found * classes + group] = values[stream, at, word]

        over_blocks(expand, bins, words[0].numel(), words.device)
        put_residual(out, row_of[:, :-1].reshape(-1), res_start.diff().view(-1), parts)
        return out.view(torch.bfloat16)


def in_pairs(choice: FormatChoice) -> bool:
    return "pairs" in dict(choice.options)


def with_pairs(choice: FormatChoice) -> FormatChoice:
    return FormatChoice(choice.name, (*choice.options, ("pairs", 1)))


def gpu_classes(columns: int) -> int:
    """As few classes as let x stand 32 / classes times in 96 KB of shared memory: fewer pad less, but stage longer."""
    classes = 1
    while classes < WARP and 4 * columns * WARP // classes > 96 << 10:
        classes *= 2
    return classes


def _outside(stats: Stats, choice: FormatChoice) -> int:
    return stats.nnz - best_code(stats.exponents, choice.option("gap_bits"), bits_of(choice.option("unit")))[1]


def _fits(shape: Shape, choice: FormatChoice) -> bool:
    n, k = shape
    parts = choice.option("classes") * slots(n, choice.option("bins")) + WARP * choice.option("warps")
    return k < _FIELD and parts < _FIELD and not (in_pairs(choice) and n % 2)


def _segments(bits: torch.Tensor, classes: int) -> torch.Tensor:
    """int16 [rows, K] -> int16 [rows * classes, ceil(K / classes)]: the columns of each class side by side."""
    if classes == 1:
        return bits
    n, k = bits.shape
    whole = pad(bits, (0, -k % classes))
    return whole.view(n, -1, classes).transpose(1, 2).contiguous().view(n * classes, -1)


def _surveyed(bits: torch.Tensor, gap_bits: int, width: int, classes: int) -> tuple[Code, list[Survey]]:
    """The window, and the survey of each row block under it: only rows with values outside it are read again."""
    n, k = bits.shape

    def first(a: int, b: int) -> tuple[int, Survey]:
        return a, survey(_segments(bits[a:b], classes), gap_bits)

    blind = over_blocks(first, n, k, bits.device)
    code, _ = best_code(torch.stack([part.exponents for _, part in blind]).sum(0).tolist(), gap_bits, width)
    at = dict(blind)
    again = over_blocks(lambda a, b: at[a].under(code, lambda: _segments(bits[a:b], classes)), n, k, bits.device)
    return code, again


def _residual(
    surveys: Sequence[Survey], dealt: Bins, classes: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """First value of each slot, columns and values; one zero outside every row where there is none."""
    count = torch.cat([part.res_count for part in surveys])
    segment = torch.repeat_interleave(torch.arange(len(count), device=count.device), count)
    slot = dealt.slot[segment // classes]
    order = slot.sort(stable=True).indices
    start = pad(slot.bincount(minlength=dealt.row_of.numel()).cumsum(0), (1, -1)).view(dealt.row_of.shape)
    col = (torch.cat([part.res_col for part in surveys]) * classes + segment % classes)[order]
    val = torch.cat([part.res_val for part in surveys])[order]
    if not col.numel():
        col, val = col.new_zeros(1), val.new_zeros(1)
    return start, col.to(torch.int32), val.view(torch.bfloat16)
