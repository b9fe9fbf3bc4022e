"""The words of the delta stream: which values they can hold, how many a row needs, and where each one stands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch.nn.functional import pad

from tvm_sparse.formats.bits import MAGNITUDE, SIGN, magnitude
from tvm_sparse.formats.stats import row_gaps

# x is staged times 2^96 and the sum multiplied by 2^(base - 96), which must itself be a finite float32.
MAX_BASE = 223
END = -0x8000  # -0.0: the last word of a segment


@dataclass(frozen=True)
class Code:
    """How many bits a word and its gap have, and which exponent fields the others reach: base + 1 to base + width."""

    gap_bits: int
    base: int
    bits: int = 16

    @property
    def width(self) -> int:
        return code_width(self.gap_bits, self.bits)

    @property
    def gap_mask(self) -> int:
        return (1 << self.gap_bits) - 1

    @property
    def gap_shift(self) -> int:
        return 15 - self.gap_bits

    @property
    def filler(self) -> int:
        """The word of value 0 that advances furthest."""
        return self.gap_mask << self.gap_shift

    def holds(self, absolute: torch.Tensor) -> torch.Tensor:
        lowest = (self.base + 1) << 7
        return (absolute >= lowest) & (absolute <= lowest + (self.width << 7) - 1)

    def value_bits(self, values: torch.Tensor) -> torch.Tensor:
        """bf16 bits of values the window holds -> sign, exponent code and mantissa of a word."""
        return (values & SIGN) | ((values & MAGNITUDE) - (self.base << 7))

    def values(self, words: torch.Tensor) -> torch.Tensor:
        """The way back; 0 for fillers and padding."""
        low = words & ((1 << (self.bits - 1 - self.gap_bits)) - 1)
        return torch.where(low == 0, low, (words & SIGN) | (low + (self.base << 7)))

    def gaps(self, words: torch.Tensor) -> torch.Tensor:
        """int16 words -> int16 columns that each advances, 1 to 2^gap_bits."""
        return ((words >> self.gap_shift) & self.gap_mask) + 1


def code_width(gap_bits: int, bits: int) -> int:
    return (1 << (bits - 8 - gap_bits)) - 1


def best_code(exponents: Sequence[int], gap_bits: int, bits: int = 16) -> tuple[Code, int]:
    """The window over the exponent histogram that leaves least to the residual (lowest of equals), what it holds."""
    width = code_width(gap_bits, bits)
    below = [0, *accumulate(exponents)]
    bases = range(min(MAX_BASE, 254 - width) + 1)
    base = max(bases, key=lambda b: (below[b + width + 1] - below[b + 1], -b))
    return Code(gap_bits, base, bits), below[base + width + 1] - below[base + 1]


@dataclass(frozen=True)
class Survey:
    """A row block before its place is known: words each row needs, and what no word can hold."""

    words: torch.Tensor  # int64 [rows]
    nnz: int
    exponents: torch.Tensor  # int64 [256]
    res_count: torch.Tensor  # int64 [rows]
    res_col: torch.Tensor  # int64 [nr]
    res_val: torch.Tensor  # int16 [nr]

    def under(self, code: Code, read: Callable[[], torch.Tensor]) -> Survey:
        """The same block once the window is known: rows with values outside it are surveyed again."""
        outside = self.exponents.clone()
        outside[code.base + 1 : code.base + code.width + 1] = 0
        if not bool(outside.any()):
            return self
        bits = read()
        absolute = magnitude(bits)
        rows = ((absolute != 0) & ~code.holds(absolute)).any(1).nonzero().view(-1)
        again = survey(bits[rows], code.gap_bits, code)
        return replace(
            self,
            words=self.words.index_copy(0, rows, again.words),
            res_count=self.res_count.index_copy(0, rows, again.res_count),
            res_col=again.res_col,
            res_val=again.res_val,
        )


def survey(bits: torch.Tensor, gap_bits: int, code: Code | None = None) -> Survey:
    """int16 [rows, K] -> Survey; without a code every value is taken to be held. Raises Refusal for NaN, infinity."""
    absolute = magnitude(bits)
    present = absolute != 0
    held = present if code is None else code.holds(absolute)
    per_row = held.sum(1)
    flat = held.view(-1).nonzero().view(-1)
    gap = row_gaps(flat, per_row, bits.shape[1])
    long = (gap > 1 << gap_bits).nonzero().view(-1)
    fillers = pad(((gap[long] - 1) >> gap_bits).cumsum(0), (1, 0))
    fillers = fillers[torch.searchsorted(long, per_row.cumsum(0))]
    res_row, res_col = (present & ~held if code else held[:0]).nonzero(as_tuple=True)
    return Survey(
        words=per_row + fillers.diff(prepend=fillers.new_zeros(1)),
        nnz=flat.numel() + res_col.numel(),
        exponents=(absolute.view(-1)[flat] >> 7).bincount(minlength=256),
        res_count=res_row.bincount(minlength=bits.shape[0]),
        res_col=res_col,
        res_val=bits[res_row, res_col],
    )


def write_rows(out: torch.Tensor, bits: torch.Tensor, starts: torch.Tensor, code: Code) -> None:
    """int16 [rows, K] -> the words of each row, fillers included, in `out` from `starts` [rows] on."""
    held = code.holds(bits & MAGNITUDE)
    per_row = held.sum(1)
    flat = held.view(-1).nonzero().view(-1)
    values = code.value_bits(bits.view(-1)[flat])
    gap = row_gaps(flat, per_row, bits.shape[1]) - 1
    fillers = gap >> code.gap_bits
    ends = (fillers + 1).cumsum(0)  # where each entry's word ends, counted over all rows
    words_before = pad(ends, (1, 0))[per_row.cumsum(0) - per_row]
    at = ends - 1 + torch.repeat_interleave(starts - words_before, per_row)
    out[at] = values | ((gap & code.gap_mask) << code.gap_shift).to(torch.int16)

    some = (fillers > 0).nonzero().view(-1)
    count = fillers[some]
    each = torch.repeat_interleave(some, count)
    nth = torch.arange(each.numel(), device=flat.device) - torch.repeat_interleave(count.cumsum(0) - count, count)
    out[at[each] - fillers[each] + nth] = code.filler


def columns_before(words: torch.Tensor, code: Code, unit: int) -> torch.Tensor:
    """int16 [streams, words] -> int32 [streams, units + 1]: columns that a stream's words advance before each unit."""
    gaps = code.gaps(words).view(len(words), -1, unit)
    advance = gaps[:, :, 0].clone()
    for i in range(1, unit):
        advance += gaps[:, :, i]
    return pad(advance.cumsum(1, dtype=torch.int32), (1, 0))
