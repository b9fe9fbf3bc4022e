"""Tensor in, tensor with zeros out: streamed by row blocks, in place, the same for every block size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch

from tvm_sparse.checkpoint.base import READ_ROWS
from tvm_sparse.errors import Refusal
from tvm_sparse.pruning.magnitude import MatrixThreshold, RowThreshold
from tvm_sparse.pruning.pattern import Pattern, require_agreement
from tvm_sparse.pruning.structured import BlockNorms, KeepNOfM, round_half_up

Read = Callable[[int, int], torch.Tensor]


class Rule(Protocol):
    """Decides which weights of one matrix stay, from their magnitudes (bits without sign) alone.

    `scans` passes over all row blocks come before the one that asks for the masks of what to keep; each in order.
    """

    scans: int

    def scan(self, index: int, start: int, magnitude: torch.Tensor) -> None: ...

    def keep(self, start: int, magnitude: torch.Tensor) -> torch.Tensor: ...


@dataclass
class Zeros:
    """What pruning found and left in one matrix: `negative_zeros` were -0.0 and are +0.0 now."""

    shape: tuple[int, int]
    nnz: int = 0
    negative_zeros: int = 0

    @property
    def density(self) -> float:
        return self.nnz / (self.shape[0] * self.shape[1])

    @property
    def sparsity(self) -> float:
        return 1 - self.density


@dataclass(frozen=True)
class Pruner:
    """`method` "magnitude" or "none" (the matrix's own zeros are measured); see `--granularity` and `--pattern`.

    An exact share of zeros: round(sparsity * weights) in every matrix, or round(sparsity * K) in every row, zeros
    that are already there counted first; of blocks, round(sparsity * blocks). Raises Refusal for settings that
    contradict each other.
    """

    method: str = "magnitude"
    sparsity: float | None = None
    pattern: Pattern = field(default_factory=Pattern)
    granularity: Literal["matrix", "row"] | str = "matrix"

    def __post_init__(self) -> None:
        if self.method not in ("magnitude", "none"):
            raise Refusal(f"pruning method {self.method!r} is not known: choose magnitude or none")
        if self.granularity not in ("matrix", "row"):
            raise Refusal(f"granularity {self.granularity!r} is not known: choose matrix or row")
        if self.granularity == "row" and self.pattern.kind != "unstructured":
            raise Refusal(f"granularity row does not go with pattern {self.pattern}: choose one of them")
        if self.method == "none":
            return
        if self.sparsity is None and self.pattern.sparsity is None:
            raise Refusal("magnitude pruning needs a sparsity: pass --sparsity")
        if self.sparsity is not None and not 0 <= self.sparsity < 1:
            raise Refusal(f"sparsity {self.sparsity:g} is outside [0, 1): 0.75 makes three weights of four zero")
        require_agreement(self.pattern, self.sparsity)

    def check(self, shapes: Iterable[tuple[str, tuple[int, ...]]]) -> None:
        """Raises Refusal, before any work, where the pattern does not fit one of the named matrices."""
        for name, shape in shapes if self.method != "none" else ():
            self.pattern.check(name, shape)

    def matrix(self, name: str, weight: torch.Tensor) -> Zeros:
        """Prunes [N, K] (bfloat16 or float32) in place. Raises Refusal for NaN and infinity, by name."""
        if not weight.is_contiguous():
            raise ValueError(f"{name}: pruning works in place on contiguous matrices")
        shape = (weight.shape[0], weight.shape[1])
        zeros = Zeros(shape)
        rows = shape[0] if weight.is_cuda else READ_ROWS  # a GPU waits for the host after every block
        for _ in self.stream(name, shape, weight.dtype, lambda start, stop: weight[start:stop], zeros, rows):
            pass
        return zeros

    def stream(
        self,
        name: str,
        shape: tuple[int, int],
        dtype: torch.dtype,
        read: Read,
        zeros: Zeros,
        rows: int = READ_ROWS,
    ) -> Iterator[torch.Tensor]:
        """Yields a matrix's pruned blocks of about `rows` rows in order and fills `zeros`.

        `read(start, stop)` gives rows, to keep.
        """
        rule = self._rule(name, shape, dtype)
        tall = self.pattern.rows or 1
        step = max(1, rows // tall) * tall
        starts = range(0, shape[0], step)
        for index in range(rule.scans if rule else 0):
            for start in starts:
                _, magnitude = split_bits(read(start, min(start + step, shape[0])))
                require_finite(name, magnitude)
                rule.scan(index, start, magnitude)  # type: ignore[union-attr]
        for start in starts:
            block = read(start, min(start + step, shape[0]))
            bits, magnitude = split_bits(block)
            if not (rule and rule.scans):
                require_finite(name, magnitude)
            negative = int(bits.count_nonzero() - magnitude.count_nonzero())
            if negative:
                bits.masked_fill_(magnitude == 0, 0)
            if rule:
                bits.mul_(rule.keep(start, magnitude))
            zeros.negative_zeros += negative
            zeros.nnz += int(bits.count_nonzero())
            yield block

    def _rule(self, name: str, shape: tuple[int, int], dtype: torch.dtype) -> Rule | None:
        if self.method == "none":
            return None
        pattern = self.pattern
        pattern.check(name, shape)
        if pattern.kind == "n:m":
            return KeepNOfM(pattern.n, pattern.m)
        share = self.sparsity or 0.0
        if pattern.kind == "block":
            return BlockNorms(pattern.rows, pattern.cols, shape, share)
        if self.granularity == "row":
            return RowThreshold(round_half_up(share * shape[1]))
        return MatrixThreshold(round_half_up(share * shape[0] * shape[1]), dtype)


def split_bits(block: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A block's bits (a view) and its magnitudes (bits without sign), as int16 or int32."""
    if block.dtype == torch.bfloat16:
        bits = block.view(torch.int16)
        return bits, bits & 0x7FFF
    if block.dtype == torch.float32:
        bits = block.view(torch.int32)
        return bits, bits & 0x7FFF_FFFF
    raise ValueError(f"weights are {block.dtype}: pruning takes bfloat16 or float32")


def require_finite(name: str, magnitude: torch.Tensor) -> None:
    infinity = 0x7F80 if magnitude.dtype == torch.int16 else 0x7F80_0000
    if magnitude.numel() and int(magnitude.max()) >= infinity:
        raise Refusal(f"tensor {name} holds NaN or infinity: repair the checkpoint, or give another one")
