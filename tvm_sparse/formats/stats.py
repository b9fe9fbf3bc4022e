"""What the plan must know of a matrix to compare formats without packing it: one pass over row blocks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from tvm_sparse.formats.bits import as_bits, magnitude
from tvm_sparse.formats.blocks import over_blocks

GAP_BITS = (3, 4, 5, 6)
CHUNK = 8  # words a lane loads at once: 16 bytes


@dataclass(frozen=True)
class Stats:
    """A matrix [N, K] in numbers.

    `exponents[e]` counts non-zeros with bfloat16 exponent field e (0: subnormal). `words[g]` is what the delta stream
    with g gap bits needs for all rows, fillers included; `chunks[g]` its chunks of 8 words, each row padded to whole
    ones, and `longest[g]` those of the longest row (as if no value went to the residual). `blocks[r, c]` counts r x c
    rectangles that are not all zero.
    """

    shape: tuple[int, int]
    nnz: int
    negative_zeros: int
    exponents: tuple[int, ...]
    words: dict[int, int]
    chunks: dict[int, int]
    longest: dict[int, int]
    two_four: bool
    blocks: dict[tuple[int, int], int]

    @property
    def density(self) -> float:
        return self.nnz / (self.shape[0] * self.shape[1])


def measure(weight: torch.Tensor | Iterable[torch.Tensor], blocks: Sequence[tuple[int, int]] = ((16, 16),)) -> Stats:
    """bfloat16 [N, K], whole or as row blocks, -> Stats. Raises Refusal for NaN, infinity, another dtype.

    `blocks`: the rectangles to count; row blocks other than the last must be multiples of their heights.
    """
    pieces = [weight] if isinstance(weight, torch.Tensor) else weight
    counts: list[_Count] = []
    multiple = 1
    for r, _ in blocks:
        multiple *= r
    columns = 0
    for piece in pieces:
        bits = as_bits(piece)
        columns = bits.shape[1]

        def count(start: int, stop: int, bits: torch.Tensor = bits) -> _Count:
            return _count(bits[start:stop], blocks)

        counts += over_blocks(count, bits.shape[0], columns, bits.device, multiple)
    words = torch.cat([part.words for part in counts], 1)
    return Stats(
        shape=(words.shape[1], columns),
        nnz=sum(part.nnz for part in counts),
        negative_zeros=sum(part.negative_zeros for part in counts),
        exponents=tuple(torch.stack([part.exponents for part in counts]).sum(0).tolist()),
        words={g: int(row.sum()) for g, row in zip(GAP_BITS, words, strict=True)},
        chunks={g: int(row_chunks(row).sum()) for g, row in zip(GAP_BITS, words, strict=True)},
        longest={g: int(row_chunks(row).max()) for g, row in zip(GAP_BITS, words, strict=True)},
        two_four=all(part.two_four for part in counts),
        blocks={shape: sum(part.blocks[i] for part in counts) for i, shape in enumerate(blocks)},
    )


def row_chunks(words: torch.Tensor) -> torch.Tensor:
    """Words of each row -> chunks of each row."""
    return (words + CHUNK - 1) // CHUNK


@dataclass(frozen=True)
class _Count:
    nnz: int
    negative_zeros: int
    exponents: torch.Tensor
    words: torch.Tensor  # int64 [len(GAP_BITS), rows]
    two_four: bool
    blocks: tuple[int, ...]


def _count(bits: torch.Tensor, blocks: Sequence[tuple[int, int]]) -> _Count:
    columns = bits.shape[1]
    absolute = magnitude(bits)
    present = absolute != 0
    per_row = present.sum(1)
    flat = present.view(-1).nonzero().view(-1)
    gap = row_gaps(flat, per_row, columns)
    long = (gap > 1 << GAP_BITS[0]).nonzero().view(-1)  # only these can need fillers
    ends = torch.searchsorted(long, per_row.cumsum(0))
    words = []
    for gap_bits in GAP_BITS:
        fillers = torch.nn.functional.pad(((gap[long] - 1) >> gap_bits).cumsum(0), (1, 0))[ends]
        words.append(per_row + fillers.diff(prepend=fillers.new_zeros(1)))
    exponents = (absolute.view(-1)[flat] >> 7).bincount(minlength=256)
    return _Count(
        nnz=flat.numel(),
        negative_zeros=int((bits == -0x8000).sum()),
        exponents=exponents,
        words=torch.stack(words),
        two_four=_fits_two_four(present),
        blocks=tuple(_count_blocks(present, r, c) for r, c in blocks),
    )


def row_gaps(flat: torch.Tensor, per_row: torch.Tensor, columns: int) -> torch.Tensor:
    """Columns since the previous entry of the same row, from the row's start for its first: at least 1.

    `flat` are ascending positions (row * columns + column), `per_row` how many stand in each row.
    """
    gap = torch.diff(flat, prepend=flat.new_full((1,), -1))
    starts = per_row.cumsum(0) - per_row
    rows = (per_row > 0).nonzero().view(-1)
    firsts = starts[rows]
    gap[firsts] = flat[firsts] - (rows * columns - 1).to(flat.dtype)
    return gap


def _fits_two_four(present: torch.Tensor) -> bool:
    padded = torch.nn.functional.pad(present, (0, -present.shape[1] % 4)).contiguous()
    counts = (padded.view(torch.int32) * 0x01010101) >> 24  # four bytes of 0 or 1, summed in the top one
    return int(counts.max()) <= 2


def _count_blocks(present: torch.Tensor, r: int, c: int) -> int:
    padded = torch.nn.functional.pad(present, (0, -present.shape[1] % c, 0, -present.shape[0] % r))
    strips = padded.view(-1, r, padded.shape[1]).any(1)
    return int(strips.view(strips.shape[0], -1, c).any(2).sum())
