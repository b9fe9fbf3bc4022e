"""What an engine will allocate, added up before it allocates anything.

A GPU's memory holds what a token reads most of. Of the embedding a token reads one row, 10 of the 27B's 2.5 GB: it
stands in the host's memory, pinned, and the row comes across the bus.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from tvm_sparse.errors import Refusal

_BYTES = {"float32": 4, "bfloat16": 2, "int32": 4}
_RESERVE = 256 << 20  # of what is free: the driver's own, kernels, a captured graph


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one engine on its device. `position` is what one more position of context takes, over the whole batch.

    `on_host` are bytes beside them: weights that a GPU reads from the host's memory.
    """

    weights: int
    states: int
    workspace: int
    position: int
    context: int
    on_host: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.states + self.workspace + self.position * self.context

    def largest_context(self, available: int) -> int:
        """Positions that fit into `available` bytes; 0 where not even the weights do."""
        left = available - (self.total - self.position * self.context)
        return max(0, left // self.position) if self.position else self.context

    def require(self, free: int, device: str, folder: object) -> None:
        """Raises Refusal, with the sum and the way on, where `free` bytes of `device` do not hold the plan."""
        available = free - _RESERVE
        if self.total <= available:
            return
        fits = min(self.largest_context(available), self.context)
        way = f"at most --context {fits} fits" if fits else "no context fits: use a sparser build, or another device"
        raise Refusal(f"{folder} needs {self}, and {device} has {_gb(available)} free: {way}")

    def __str__(self) -> str:
        parts = (
            f"weights {_gb(self.weights)}",
            f"caches {_gb(self.position * self.context)} for a context of {self.context}",
            f"states {_gb(self.states)}",
            f"workspace {_gb(self.workspace)}",
        )
        beside = f", and {_gb(self.on_host)} of the host's" if self.on_host else ""
        return f"{_gb(self.total)} ({' + '.join(parts)}){beside}"


def kept_on_host(facts: Mapping[str, Any]) -> frozenset[str]:
    """Packed buffers that a GPU reads from the host's memory: the embedding, where it is not the head too."""
    looked_up = facts["device"] == "cuda" and not facts["config"]["tie_word_embeddings"]
    return frozenset(("embed_tokens.weight",) if looked_up else ())


def plan_memory(facts: Mapping[str, Any], weights: Mapping[str, int], context: int) -> MemoryPlan:
    """`facts` of tvm_sparse.json, the bytes of each packed buffer, and the context the caches are sized for."""
    states = position = 0
    for tensor in facts["state"]:
        held = [extent for extent in tensor["shape"] if extent != "context"]
        nbytes = prod(held) * _BYTES[tensor["dtype"]]
        if len(held) < len(tensor["shape"]):
            position += nbytes
        else:
            states += nbytes
    on_host = sum(weights[name] for name in kept_on_host(facts))
    return MemoryPlan(sum(weights.values()) - on_host, states, facts["workspace"], position, context, on_host)


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.1f} MB"
