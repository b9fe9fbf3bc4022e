"""The dense format: the matrix as it is, for matrices where nothing smaller is faster."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tvm_sparse.errors import Refusal
from tvm_sparse.formats.base import Buffer, FormatChoice, Packed, Shape
from tvm_sparse.formats.bits import as_bits, magnitude, positive_zero
from tvm_sparse.formats.blocks import over_blocks
from tvm_sparse.formats.stats import Stats
from tvm_sparse.targets import Machine


class Dense:
    """One buffer without a name of its own: the parameter keeps its plain name.

    Option `width`: 16 is bfloat16; 32 is float32, for matrices that are not exactly bfloat16 (never multiplied
    sparse, never rounded).
    """

    name = "dense"

    def choice(self, width: int = 16) -> FormatChoice:
        if width not in (16, 32):
            raise Refusal(f"dense width {width}: choose 16 or 32")
        return FormatChoice(self.name, () if width == 16 else (("width", width),))

    def choices(self, stats: Stats, machine: Machine) -> Sequence[FormatChoice]:
        return (self.choice(),)

    def nbytes(self, stats: Stats, choice: FormatChoice) -> int:
        return stats.shape[0] * stats.shape[1] * (4 if choice.options else 2)

    def buffers(self, shape: Shape, choice: FormatChoice) -> tuple[Buffer, ...]:
        return (Buffer("", shape, "float32" if choice.options else "bfloat16"),)

    def pack(self, weight: torch.Tensor, choice: FormatChoice) -> Packed:
        if choice.options:
            n, k = weight.shape
            values = weight.float() + 0.0  # -0.0 + 0.0 is +0.0
            if not bool(values.isfinite().all()):
                raise Refusal("some weights are NaN or infinite: repair the checkpoint, no format holds them")
            return Packed(choice, (n, k), int(values.count_nonzero()), {"": values})
        bits = as_bits(weight)
        n, k = bits.shape
        out = torch.empty_like(bits)

        def copy(start: int, stop: int) -> int:
            out[start:stop] = positive_zero(bits[start:stop])
            return int(magnitude(bits[start:stop]).count_nonzero())

        nnz = sum(over_blocks(copy, n, k, bits.device))
        return Packed(choice, (n, k), nnz, {"": out.view(torch.bfloat16)})

    def unpack(self, packed: Packed) -> torch.Tensor:
        return packed.buffers[""]
