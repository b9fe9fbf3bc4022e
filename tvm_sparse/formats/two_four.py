"""The 2:4 format: two values out of every four columns, as the sparse tensor cores take them (mma.sp, PTX ISA)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tvm_sparse.errors import Refusal
from tvm_sparse.formats.base import Buffer, FormatChoice, Packed, Shape
from tvm_sparse.formats.bits import as_bits, magnitude, positive_zero
from tvm_sparse.formats.blocks import over_blocks
from tvm_sparse.formats.stats import Stats
from tvm_sparse.targets import Machine

# Which two positions a group of four keeps, by the bits of its non-zero positions; a third or fourth bit never fits.
# A group with fewer than two non-zeros keeps a zero beside, at the lowest position that leaves first < second.
_PAIRS = {
    0b0000: (0, 1), 0b0001: (0, 1), 0b0010: (0, 1), 0b0100: (0, 2), 0b1000: (0, 3),
    0b0011: (0, 1), 0b0101: (0, 2), 0b1001: (0, 3), 0b0110: (1, 2), 0b1010: (1, 3), 0b1100: (2, 3),
}  # fmt: skip


class TwoFour:
    """K is padded with zero columns to K' = 16 ceil(K/16).

    values  bfloat16 [N, K'/2]    the two kept values of each group of four columns
    meta    uint16   [N, K'/16]   four groups in a word, lowest bits first: i0 | i1 << 2, i0 < i1

    columns  a 0 0 b | 0 c d 0 | ...     values  a b c d ...     meta  ... 10 01 | 11 00
    """

    name = "2:4"

    def choice(self) -> FormatChoice:
        return FormatChoice(self.name)

    def choices(self, stats: Stats, machine: Machine) -> Sequence[FormatChoice]:
        return (self.choice(),) if stats.two_four else ()

    def nbytes(self, stats: Stats, choice: FormatChoice) -> int:
        n, k = stats.shape
        return n * -(-k // 16) * 18

    def buffers(self, shape: Shape, choice: FormatChoice) -> tuple[Buffer, ...]:
        n, words = shape[0], -(-shape[1] // 16)
        return (Buffer("values", (n, 8 * words), "bfloat16"), Buffer("meta", (n, words), "uint16"))

    def pack(self, weight: torch.Tensor, choice: FormatChoice) -> Packed:
        bits = as_bits(weight)
        n, k = bits.shape
        words = -(-k // 16)
        device = bits.device
        values = torch.empty(n, 8 * words, dtype=torch.int16, device=device)
        meta = torch.empty(n, words, dtype=torch.int16, device=device)
        pair = torch.zeros(16, 2, dtype=torch.int64, device=device)
        for pattern, positions in _PAIRS.items():
            pair[pattern] = torch.tensor(positions)
        place = torch.tensor([1, 2, 4, 8], dtype=torch.int16, device=device)
        shift = torch.tensor([0, 4, 8, 12], dtype=torch.int32, device=device)

        def compress(start: int, stop: int) -> int:
            block = torch.nn.functional.pad(positive_zero(bits[start:stop]), (0, 16 * words - k))
            groups = block.view(stop - start, 4 * words, 4)
            present = magnitude(groups) != 0
            if int(present.sum(2).max()) > 2:
                raise Refusal("a group of four columns has more than two non-zeros: not a 2:4 matrix")
            positions = pair[(present * place).sum(2)]
            values[start:stop] = groups.gather(2, positions).view(stop - start, -1)
            four_bits = (positions[..., 0] | positions[..., 1] << 2).to(torch.int32)
            meta[start:stop] = (four_bits.view(-1, words, 4) << shift).sum(2).to(torch.int16)
            return int(present.sum())

        nnz = sum(over_blocks(compress, n, k, device))
        return Packed(choice, (n, k), nnz, {"values": values.view(torch.bfloat16), "meta": meta.view(torch.uint16)})

    def unpack(self, packed: Packed) -> torch.Tensor:
        n, k = packed.shape
        values = packed.buffers["values"].view(torch.int16)
        meta = packed.buffers["meta"].view(torch.int16)
        out = values.new_zeros(n, meta.shape[1] * 4, 4)
        shift = torch.arange(0, 16, 2, device=values.device)
        positions = (meta.to(torch.int64).unsqueeze(2) >> shift) & 3
        out.scatter_(2, positions.view(n, -1, 2), values.view(n, -1, 2))
        return out.view(n, -1)[:, :k].contiguous().view(torch.bfloat16)
