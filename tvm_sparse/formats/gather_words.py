"""The words of the gather format: which lane takes which non-zero of a row, and where each lane begins."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from tvm_sparse.formats.delta_words import Code

LANES = 32


@dataclass(frozen=True)
class Lanes:
    """What 32 lanes take of each row in each span, by row, span, lane and step.

    gaps, values   int16 [rows, P, 32, L]   class columns to move on, then a value's sign, exponent code and mantissa
    starts         int64 [rows, P, 32]      where a lane stands before its first word: the class column before it + 1
    lengths        int64 [rows, P]          steps of a row, at least 1; after them all is 0
    """

    gaps: torch.Tensor
    values: torch.Tensor
    starts: torch.Tensor
    lengths: torch.Tensor


@dataclass(frozen=True)
class Entries:
    """The values of segments [rows * P * R, class columns], in order, with the fillers before each.

    segment, gap, fillers, last   int64 [nnz]     `last`: the number of the value's own word in its segment
    values                        int16 [nnz]     value bits
    each                          int64 [segments]   words of a lane, at least 1
    """

    segment: torch.Tensor
    gap: torch.Tensor
    fillers: torch.Tensor
    last: torch.Tensor
    values: torch.Tensor
    each: torch.Tensor


def entries(bits: torch.Tensor, classes: int, spans: int, columns: int, code: Code) -> Entries:
    """int16 [rows, K] -> what the window holds of it."""
    held = code.holds(bits & 0x7FFF)
    whole = pad(torch.where(held, code.value_bits(bits), 0), (0, spans * columns - bits.shape[1]))
    # A value of the window is never all zero: its exponent code is at least 1.
    width = columns // classes
    segments = whole.view(-1, width, classes).transpose(1, 2).contiguous().view(-1, width)
    flat = segments.view(-1).nonzero().view(-1)
    segment = flat // width
    column = flat - segment * width
    gap = column.diff(prepend=column.new_zeros(1))
    opens = segment.diff(prepend=segment.new_full((1,), -1)) > 0
    gap = torch.where(opens, column + 1, gap)
    fillers = (gap - 1) // code.gap_mask
    words = torch.zeros(len(segments), dtype=torch.int64, device=bits.device).index_add_(0, segment, fillers + 1)
    last = (fillers + 1).cumsum(0) - 1 - (words.cumsum(0) - words)[segment]
    each = (-(-words // (LANES // classes))).clamp_min_(1)
    return Entries(segment, gap, fillers, last, segments.view(-1)[flat], each)


def lengths(found: Entries, classes: int, spans: int) -> torch.Tensor:
    """Steps of each row in each span: those of its fullest class."""
    return found.each.view(-1, spans, classes).amax(2)


def lanes(found: Entries, classes: int, spans: int, code: Code) -> Lanes:
    """The words of a class are cut into as many equal runs as it has lanes: lane i R + class takes the i-th."""
    turns = LANES // classes
    steps = int(found.each.max())
    gaps = found.values.new_zeros(len(found.each) * turns * steps)
    values = torch.zeros_like(gaps)

    def place(segment: torch.Tensor, word: torch.Tensor) -> torch.Tensor:
        each = found.each[segment]
        return (segment * turns + word // each) * steps + word % each

    at = place(found.segment, found.last)
    values[at] = found.values
    gaps[at] = (found.gap - found.fillers * code.gap_mask).to(torch.int16)
    some = found.fillers.nonzero().view(-1)
    count = found.fillers[some]
    every = torch.repeat_interleave(some, count)
    nth = torch.arange(len(every), device=at.device) - torch.repeat_interleave(count.cumsum(0) - count, count)
    gaps[place(found.segment[every], found.last[every] - found.fillers[every] + nth)] = code.gap_mask

    def by_lane(of: torch.Tensor) -> torch.Tensor:
        """[rows, P, class, turn, ...] -> [rows, P, turn and class, ...]"""
        return of.transpose(2, 3).flatten(2, 3)

    shape = (-1, spans, classes, turns, steps)
    moved = gaps.view(shape).sum(4, dtype=torch.int64)
    # A lane without words stays on a column that is there; the others move before they read.
    starts = torch.maximum(pad(moved.cumsum(3), (1, -1)), (moved == 0).long())
    steps_of_rows = lengths(found, classes, spans)
    return Lanes(by_lane(gaps.view(shape)), by_lane(values.view(shape)), by_lane(starts), steps_of_rows)
