"""What of the delta kernel stands in shared memory: x, the parts of rows, tables; numbers of float32, bytes."""

from __future__ import annotations

from tvm_sparse.formats.delta_bins import slots
from tvm_sparse.formats.delta_chunks import words_of
from tvm_sparse.schedules.cuda.device_code import WARP
from tvm_sparse.schedules.cuda.token_tile import SHARED_LIMIT, SHARED_MOST
from tvm_sparse.schedules.spec import KernelSpec

DEPTHS = (2, 3, 4, 5, 6, 8)
"""Chunks in flight a lane."""


def columns_of(spec: KernelSpec, depth: int = max(DEPTHS)) -> int:
    """Columns of x with the zeros after it: `depth` chunks pass between two looks at a lane that only has padding."""
    classes = spec.choice.option("classes")
    return classes * (-(-spec.k // classes) + depth * words_of(spec.choice.option("unit")))


def parts_of(spec: KernelSpec) -> int:
    """Numbers a token's parts take in a bin, and what values outside the window add to its rows."""
    classes, room = spec.choice.option("classes"), slots(spec.n, spec.choice.option("bins"))
    return spec.choice.option("warps") * WARP + (classes + 1) * room


def room_of(spec: KernelSpec) -> int:
    """Bytes for x and the parts: lm_head's many rows of a bin have tables that leave less than usual."""
    of_a_row = 2 * spec.choice.option("classes") + 8
    return min(SHARED_LIMIT, SHARED_MOST - of_a_row * slots(spec.n, spec.choice.option("bins")) - 1024)


def copies_of(spec: KernelSpec, tile: int) -> int:
    """As many as fill the banks, or have room."""
    copies = max(1, WARP // (tile * spec.choice.option("classes")))
    while copies > 1 and 4 * tile * (copies * columns_of(spec) + parts_of(spec)) > room_of(spec):
        copies //= 2
    return copies
