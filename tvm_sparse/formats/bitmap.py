"""The bitmap format: one bit per dense weight and the values that are not zero, exact for every bfloat16.

The smaller format around 50 %, and the fastest on a CPU: AVX-512's `vpexpandw` spreads values under a 32-bit mask.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tvm_sparse.formats.base import Buffer, FormatChoice, Packed, Shape
from tvm_sparse.formats.bits import MAGNITUDE, as_bits, magnitude
from tvm_sparse.formats.blocks import over_blocks
from tvm_sparse.formats.stats import Stats
from tvm_sparse.targets import Machine

# Zero values after the last one: a vector load of values may start at the last value and read a whole register.
TRAILING = 64

# A product with 8 bytes of 0 or 1 in one int64 gathers them as 8 bits in the top byte: byte i (bit 8 i) meets
# bit 56 - 7 i of this constant at bit 56 + i, and no two of the 64 products meet at the same bit.
_GATHER = sum(1 << (56 - 7 * i) for i in range(8))


class Bitmap:
    """
    mask       uint32 [N, ceil(K/32)]   bit j of word i of a row: column 32 i + j is not zero
    row_start  int32  [N + 1]           where a row's values begin
    values     bfloat16 [nnz + 64]      row after row, column after column; then 64 zeros

    row      0 0 a 0 b 0 0 c ...                    mask    0b...10010100
    values   ... | a b c ... | next row ...         row_start[n] is where `a` stands
    """

    name = "bitmap"

    def choice(self) -> FormatChoice:
        return FormatChoice(self.name)

    def choices(self, stats: Stats, machine: Machine) -> Sequence[FormatChoice]:
        return (self.choice(),)

    def nbytes(self, stats: Stats, choice: FormatChoice) -> int:
        n, k = stats.shape
        return 4 * n * -(-k // 32) + 4 * (n + 1) + 2 * (stats.nnz + TRAILING)

    def buffers(self, shape: Shape, choice: FormatChoice) -> tuple[Buffer, ...]:
        n, k = shape
        return (
            Buffer("mask", (n, -(-k // 32)), "uint32"),
            Buffer("row_start", (n + 1,), "int32"),
            Buffer("values", ("nv",), "bfloat16"),
        )

    def pack(self, weight: torch.Tensor, choice: FormatChoice) -> Packed:
        bits = as_bits(weight)
        n, k = bits.shape
        mask = torch.empty(n, -(-k // 32), dtype=torch.int32, device=bits.device)
        counts = torch.empty(n, dtype=torch.int32, device=bits.device)

        def count(start: int, stop: int) -> None:
            present = magnitude(bits[start:stop]) != 0
            counts[start:stop] = present.sum(1, dtype=torch.int32)
            mask[start:stop] = pack_bits(present)

        over_blocks(count, n, k, bits.device)
        row_start = torch.zeros(n + 1, dtype=torch.int32, device=bits.device)
        torch.cumsum(counts, 0, dtype=torch.int32, out=row_start[1:])
        values = bits.new_empty(int(row_start[n]) + TRAILING)
        values[-TRAILING:] = 0

        def compress(start: int, stop: int) -> None:
            block = bits[start:stop]
            place = values[int(row_start[start]) : int(row_start[stop])]
            torch.masked_select(block, (block & MAGNITUDE) != 0, out=place)

        over_blocks(compress, n, k, bits.device)
        buffers = {
            "mask": mask.view(torch.uint32),
            "row_start": row_start,
            "values": values.view(torch.bfloat16),
        }
        return Packed(choice, (n, k), values.numel() - TRAILING, buffers)

    def unpack(self, packed: Packed) -> torch.Tensor:
        n, k = packed.shape
        mask = packed.buffers["mask"].view(torch.int32)
        values = packed.buffers["values"].view(torch.int16)
        row_start = packed.buffers["row_start"]
        out = values.new_zeros(n, k)

        def expand(start: int, stop: int) -> None:
            present = unpack_bits(mask[start:stop], k)
            first, last = int(row_start[start]), int(row_start[stop])
            out[start:stop] = out[start:stop].masked_scatter(present, values[first:last])

        over_blocks(expand, n, k, values.device)
        return out.view(torch.bfloat16)


def pack_bits(present: torch.Tensor) -> torch.Tensor:
    """bool [N, K] -> int32 [N, ceil(K/32)], lowest bit first."""
    n, k = present.shape
    padded = torch.nn.functional.pad(present, (0, -k % 32)).contiguous()
    eights = (padded.view(torch.int64) * _GATHER) >> 56  # the top byte, sign-extended
    return eights.to(torch.uint8).view(torch.int32).view(n, -1)


def unpack_bits(mask: torch.Tensor, columns: int) -> torch.Tensor:
    """int32 [N, W] -> bool [N, columns]."""
    shift = torch.arange(32, dtype=torch.int32, device=mask.device)
    bits = (mask.unsqueeze(-1) >> shift) & 1
    return bits.flatten(1)[:, :columns].bool()
