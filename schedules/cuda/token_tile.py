"""How a matmul kernel shares its weights among tokens: a CTA takes a tile of tokens, grid.y the tiles."""

from __future__ import annotations

import tvm

from tvm_sparse.schedules.cuda.device_code import token_dim
from tvm_sparse.schedules.spec import KernelSpec
from tvm_sparse.schedules.table import Decision

SHARED_LIMIT = 200 << 10  # bytes a CTA; the machines allow 227 KiB, some of it for partial sums
_SYMBOLIC_TILE = 8  # tokens, where their number is not known


def tile_decision(spec: KernelSpec, columns: int = 0, most: int = 8) -> Decision:
    """Tokens a CTA multiplies at a time, a power of two; `columns` float32 of x a token stand in shared memory."""
    wanted = _SYMBOLIC_TILE if spec.m is None else spec.m
    tiles = (t for t in (1, 2, 4, 8) if t <= most and t < 2 * wanted)  # half of a larger one would have no token
    fits = tuple(t for t in tiles if t == 1 or 4 * t * columns <= SHARED_LIMIT)
    return Decision("tile", fits, next((t for t in fits if t >= wanted), fits[-1]))


def tokens_of(spec: KernelSpec) -> int | tvm.tirx.Var:
    return token_dim(spec.m)
