"""Which matrices are pruned: every projection, and what the regular expressions add or take away."""

from __future__ import annotations

import re
from collections.abc import Iterable

from tvm_sparse.checkpoint.names import spellings
from tvm_sparse.errors import Refusal
from tvm_sparse.models.config import ModelConfig, tensors

_NOT_PROJECTIONS = ("embed_tokens.weight", "lm_head.weight")


def select(config: ModelConfig, include: Iterable[str] = (), exclude: Iterable[str] = ()) -> tuple[str, ...]:
    """Short names of the matrices to prune: all projections, plus `include`, minus `exclude` (which wins).

    Expressions are searched in a checkpoint's names, under either prefix or none. Raises Refusal for one that is
    not a regular expression and for one that no matrix matches.
    """
    matrices = [name for name, spec in tensors(config).items() if len(spec.shape) == 2]
    chosen = {name for name in matrices if name not in _NOT_PROJECTIONS}
    for text in include:
        chosen |= _matching(text, matrices, "--include")
    for text in exclude:
        chosen -= _matching(text, matrices, "--exclude")
    return tuple(name for name in matrices if name in chosen)


def _matching(text: str, names: list[str], flag: str) -> set[str]:
    try:
        expression = re.compile(text)
    except re.error as error:
        raise Refusal(f"{flag} {text!r} is not a regular expression: {error}") from None
    found = {name for name in names if any(expression.search(full) for full in spellings(name))}
    if not found:
        raise Refusal(f"{flag} {text!r} matches no weight matrix: names look like {names[1]}")
    return found
