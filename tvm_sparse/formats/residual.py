"""What no word holds: values outside the exponent window, kept as columns and values beside the words."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from tvm_sparse.formats.bits import magnitude
from tvm_sparse.formats.blocks import over_blocks
from tvm_sparse.formats.delta_words import Code


def exponents_of(bits: torch.Tensor) -> torch.Tensor:
    """int16 [rows, K] -> how many non-zeros have each exponent, int64 [256]. Raises Refusal for NaN, infinity."""
    absolute = magnitude(bits)
    return (absolute[absolute != 0] >> 7).bincount(minlength=256)


def residual_of(bits: torch.Tensor, rows: torch.Tensor, code: Code) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Where each place's values end, columns and values in the order of places; one zero where there is none.

    `rows` int64: the row at each place, -1 for none.
    """
    n, k = bits.shape

    def outside(a: int, b: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        absolute = bits[a:b] & 0x7FFF
        row, col = ((absolute != 0) & ~code.holds(absolute)).nonzero(as_tuple=True)
        return row + a, col, bits[a:b][row, col]

    parts = over_blocks(outside, n, k, bits.device)
    row, col, val = (torch.cat(kind) for kind in zip(*parts, strict=True))
    place = rows.new_zeros(n)
    some = (rows.view(-1) >= 0).nonzero().view(-1)
    place[rows.view(-1)[some]] = some
    order = place[row].sort(stable=True).indices
    end = place[row].bincount(minlength=rows.numel()).cumsum(0)
    if not len(row):
        col, val, order = col.new_zeros(1), val.new_zeros(1), col.new_zeros(1)
    return end, col[order].to(torch.int32), val[order].view(torch.bfloat16)


def put_residual(
    out: torch.Tensor, rows: torch.Tensor, counts: torch.Tensor, buffers: Mapping[str, torch.Tensor]
) -> None:
    """The way back, into int16 [N, K]: `counts` values of each of `rows` stand in `res_col` and `res_val`."""
    row = torch.repeat_interleave(rows, counts)
    out[row, buffers["res_col"][: len(row)].long()] = buffers["res_val"].view(torch.int16)[: len(row)]
