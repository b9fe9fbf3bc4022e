"""How a matmul kernel shares its weights among tokens: a CTA takes a tile of tokens, grid.y the tiles."""

from __future__ import annotations

import tvm

from tvm_sparse.schedules.cuda.device_code import token_dim
from tvm_sparse.schedules.spec import KernelSpec
from tvm_sparse.schedules.table import Decision

SHARED_MOST = 227 << 10  # bytes of shared memory a CTA can have
SHARED_LIMIT = 200 << 10  # of it for x and sums, where tables are small
_SYMBOLIC_TILE = 8  # tokens, where their number is not known


def tile_decision(spec: KernelSpec, columns: int = 0, limit: int = SHARED_LIMIT) -> Decision:
    """Tokens a CTA multiplies at a time, a power of two; `columns` float32 a token stand in `limit` bytes of shared
    memory."""
    wanted = _SYMBOLIC_TILE if spec.m is None else spec.m
    tiles = (t for t in (1, 2, 4, 8) if t < 2 * wanted)  # half of a larger one would have no token
    fits = tuple(t for t in tiles if t == 1 or 4 * t * columns <= limit)
    return Decision("tile", fits, next((t for t in fits if t >= wanted), fits[-1]))


def tokens_of(spec: KernelSpec) -> int | tvm.tirx.Var:
    return token_dim(spec.m)
