"""The block format: rectangles that are not all zero, stored dense (block CSR)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tvm_sparse.errors import Refusal
from tvm_sparse.formats.base import Buffer, FormatChoice, Packed, Shape
from tvm_sparse.formats.bits import as_bits, magnitude, positive_zero
from tvm_sparse.formats.blocks import over_blocks
from tvm_sparse.formats.stats import Stats
from tvm_sparse.targets import Machine


class Block:
    """Options `rows` R and `cols` C. A ragged last block row or column is filled with zeros.

        blocks     bfloat16 [nb, R, C]        the blocks with a non-zero, block row after block row
        cols       int32    [nb]              block column: the block's first column is C * cols
        row_start  int32    [ceil(N/R) + 1]   where a block row's blocks begin

    A matrix of zeros keeps one zero block outside every block row, so that no buffer is empty.
    """

    name = "block"

    def choice(self, rows: int = 16, cols: int = 16) -> FormatChoice:
        if rows < 1 or cols < 1:
            raise Refusal(f"block {rows}x{cols}: both sides must be at least 1")
        return FormatChoice(self.name, (("rows", rows), ("cols", cols)))

    def choices(self, stats: Stats, machine: Machine) -> Sequence[FormatChoice]:
        return tuple(self.choice(r, c) for r, c in stats.blocks)

    def nbytes(self, stats: Stats, choice: FormatChoice) -> int:
        r, c = choice.option("rows"), choice.option("cols")
        count = max(1, stats.blocks[r, c])
        return count * (2 * r * c + 4) + 4 * (-(-stats.shape[0] // r) + 1)

    def buffers(self, shape: Shape, choice: FormatChoice) -> tuple[Buffer, ...]:
        r, c = choice.option("rows"), choice.option("cols")
        return (
            Buffer("blocks", ("nb", r, c), "bfloat16"),
            Buffer("cols", ("nb",), "int32"),
            Buffer("row_start", (-(-shape[0] // r) + 1,), "int32"),
        )

    def pack(self, weight: torch.Tensor, choice: FormatChoice) -> Packed:
        bits = as_bits(weight)
        n, k = bits.shape
        r, c = choice.option("rows"), choice.option("cols")

        def select(start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
            nnz = int(magnitude(bits[start:stop]).count_nonzero())
            padded = torch.nn.functional.pad(positive_zero(bits[start:stop]), (0, -k % c, 0, (start - stop) % r))
            tiles = padded.view(-1, r, padded.shape[1] // c, c).transpose(1, 2)
            kept = (tiles != 0).any(3).any(2)
            return tiles[kept], kept.nonzero()[:, 1].to(torch.int32), kept.sum(1, dtype=torch.int32), nnz

        parts = over_blocks(select, n, k, bits.device, multiple=r)
        blocks, cols, counts = (torch.cat([part[i] for part in parts]) for i in range(3))
        if not cols.numel():
            blocks, cols = bits.new_zeros(1, r, c), cols.new_zeros(1)
        row_start = torch.zeros(counts.numel() + 1, dtype=torch.int32, device=bits.device)
        torch.cumsum(counts, 0, dtype=torch.int32, out=row_start[1:])
        buffers = {"blocks": blocks.view(torch.bfloat16), "cols": cols, "row_start": row_start}
        return Packed(choice, (n, k), sum(part[3] for part in parts), buffers)

    def unpack(self, packed: Packed) -> torch.Tensor:
        n, k = packed.shape
        r, c = packed.choice.option("rows"), packed.choice.option("cols")
        row_start = packed.buffers["row_start"].long()
        count = int(row_start[-1])
        block_rows = torch.repeat_interleave(
            torch.arange(row_start.numel() - 1, device=row_start.device), row_start.diff()
        )
        blocks = packed.buffers["blocks"].view(torch.int16)[:count]
        out = blocks.new_zeros(row_start.numel() - 1, -(-k // c), r, c)
        out[block_rows, packed.buffers["cols"][:count].long()] = blocks
        return out.transpose(1, 2).reshape(-1, out.shape[1] * c)[:n, :k].contiguous().view(torch.bfloat16)
