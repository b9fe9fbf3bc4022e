"""Row blocks of a matrix, worked on by as many threads as torch would use: the memory of a pass stays small."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

from tvm_sparse.threads import on_all_cores

# Large enough that torch's cost per call vanishes, small enough that what an operation makes stays in the L2 cache.
BLOCK = 1 << 18

T = TypeVar("T")


def row_blocks(rows: int, columns: int, multiple: int = 1) -> Iterator[tuple[int, int]]:
    """Half-open row ranges of about BLOCK weights, each but the last a multiple of `multiple` rows."""
    step = max(1, BLOCK // max(1, columns) // multiple) * multiple
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def over_blocks(work: Callable[[int, int], T], rows: int, columns: int, device: torch.device, multiple: int = 1):
    """`work(start, stop)` for each row block; the results as a list, in order.

    torch runs many integer operations (nonzero, cumsum, bincount) on one core only, so each thread takes whole
    blocks and torch's own threads are off inside. A GPU takes the blocks one after the other, much larger ones.
    """
    if device.type != "cpu":
        scale = 256
        return [work(a, b) for a, b in row_blocks(rows, max(1, columns // scale), multiple)]
    return on_all_cores(lambda ab: work(*ab), row_blocks(rows, columns, multiple))
