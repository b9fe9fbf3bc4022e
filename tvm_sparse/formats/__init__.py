"""Weight formats: how a matrix with zeros stands in memory. One class each, bit-exact both ways."""

from __future__ import annotations

from tvm_sparse.formats.base import Buffer, Format, FormatChoice, Packed
from tvm_sparse.formats.bitmap import Bitmap
from tvm_sparse.formats.block import Block
from tvm_sparse.formats.delta import Delta
from tvm_sparse.formats.dense import Dense
from tvm_sparse.formats.gather import Gather
from tvm_sparse.formats.stats import Stats, measure
from tvm_sparse.formats.tiles import Tiles
from tvm_sparse.formats.two_four import TwoFour

_ALL: tuple[Format, ...] = (Dense(), Bitmap(), Delta(), Gather(), Tiles(), TwoFour(), Block())
FORMATS: dict[str, Format] = {fmt.name: fmt for fmt in _ALL}

__all__ = ["FORMATS", "Buffer", "Format", "FormatChoice", "Packed", "Stats", "measure", "pack", "unpack"]


def pack(weight, choice: FormatChoice) -> Packed:
    """bfloat16 [N, K] -> the buffers of the chosen format."""
    return FORMATS[choice.name].pack(weight, choice)


def unpack(packed: Packed):
    """The way back: bfloat16 [N, K]."""
    return FORMATS[packed.choice.name].unpack(packed)
