"""Where zeros may stand: anywhere, N of every M columns, or whole blocks."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from tvm_sparse.errors import Refusal

_AGREE = 5e-3  # 0.33 is what a person writes for 2:3


@dataclass(frozen=True)
class Pattern:
    """`n` of every `m` consecutive columns are kept, or blocks of `rows` x `cols` are kept or dropped whole."""

    kind: Literal["unstructured", "n:m", "block"] = "unstructured"
    n: int = 0
    m: int = 0
    rows: int = 0
    cols: int = 0

    def __str__(self) -> str:
        if self.kind == "n:m":
            return f"{self.n}:{self.m}"
        return f"block:{self.rows}x{self.cols}" if self.kind == "block" else self.kind

    @property
    def sparsity(self) -> float | None:
        """The share of zeros the pattern itself fixes; None where it leaves it open."""
        return 1 - self.n / self.m if self.kind == "n:m" else None

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Raises Refusal, naming the matrix, where the pattern does not fit [N, K]."""
        if self.kind == "n:m" and shape[1] % self.m:
            raise Refusal(
                f"pattern {self} does not divide the {shape[1]} columns of {name}: --exclude it or choose another N:M"
            )


def parse_pattern(text: str, sparsity: float | None = None) -> Pattern:
    """Reads `--pattern`: unstructured, N:M or block:RxC. A sparsity, where given, must agree with an N:M."""
    if text == "unstructured":
        return Pattern()
    if found := re.fullmatch(r"(\d+):(\d+)", text):
        n, m = int(found[1]), int(found[2])
        if not 0 < n < m:
            raise Refusal(f"pattern {text}: N:M keeps N of M columns, with 0 < N < M, for example 2:4")
        pattern = Pattern("n:m", n=n, m=m)
        require_agreement(pattern, sparsity)
        return pattern
    if (found := re.fullmatch(r"block:(\d+)x(\d+)", text)) and int(found[1]) * int(found[2]) > 0:
        return Pattern("block", rows=int(found[1]), cols=int(found[2]))
    raise Refusal(f"pattern {text!r} is not known: choose unstructured, N:M (2:4) or block:RxC (block:16x16)")


def require_agreement(pattern: Pattern, sparsity: float | None) -> None:
    """Raises Refusal where a sparsity contradicts what the pattern fixes."""
    fixed = pattern.sparsity
    if fixed is not None and sparsity is not None and abs(fixed - sparsity) > _AGREE:
        raise Refusal(
            f"pattern {pattern} makes a sparsity of {fixed:.4g}, not {sparsity:g}: "
            f"pass --sparsity {fixed:.4g} or another pattern"
        )
