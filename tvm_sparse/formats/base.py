"""What every weight format is: a name, the buffers it packs a matrix into, and the way back.

Weights are [N, K] (output features, input features) in bfloat16. A packed matrix is a few flat buffers; a kernel
takes them in the order of `Format.buffers`, so this order is part of the format.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from tvm_sparse.formats.stats import Stats
    from tvm_sparse.targets import Machine

Shape = tuple[int, int]


@dataclass(frozen=True)
class Buffer:
    """One packed buffer: a dimension is an int where shape alone decides it, a name where the weights do."""

    name: str
    shape: tuple[int | str, ...]
    dtype: str


@dataclass(frozen=True)
class FormatChoice:
    """A format with its options, as the plan names it: hashable, printable, one kernel per choice and shape.

    Made by `Format.choice`, which fills in every option, so that equal choices compare equal.
    """

    name: str
    options: tuple[tuple[str, int], ...] = ()

    def __str__(self) -> str:
        inside = ",".join(f"{key}={value}" for key, value in self.options)
        return f"{self.name}({inside})" if inside else self.name

    def option(self, key: str) -> int:
        return dict(self.options)[key]


@dataclass(frozen=True)
class Packed:
    """A packed matrix: `buffers` in the format's own order, `nnz` values that are not zero."""

    choice: FormatChoice
    shape: Shape
    nnz: int
    buffers: dict[str, torch.Tensor]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.buffers.values())


class Format(Protocol):
    """One class per format; `tvm_sparse.formats.FORMATS` maps names to instances."""

    name: str

    @property
    def choice(self) -> Callable[..., FormatChoice]:
        """Makes the format's choice with these options (ints, by name), the others at their defaults."""

    def choices(self, stats: Stats, machine: Machine) -> Sequence[FormatChoice]:
        """What the plan may choose for a matrix, cut for the machine: empty where it cannot be held or never wins."""

    def nbytes(self, stats: Stats, choice: FormatChoice) -> int:
        """Bytes of all buffers of the packed matrix, from its statistics alone."""

    def buffers(self, shape: Shape, choice: FormatChoice) -> tuple[Buffer, ...]:
        """The buffers of a matrix of this shape, in kernel order."""

    def pack(self, weight: torch.Tensor, choice: FormatChoice) -> Packed:
        """bfloat16 [N, K], CPU or CUDA -> buffers on the same device.

        Raises Refusal where the matrix does not fit the format, holds NaN or infinity, or has 2^31 weights or more.
        """

    def unpack(self, packed: Packed) -> torch.Tensor:
        """The way back, bit for bit (-0.0 is +0.0)."""
