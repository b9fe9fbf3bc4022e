"""Operations whose result is only a matmul's x, and which that matmul's kernel can do itself."""

from __future__ import annotations

import json
from dataclasses import dataclass

import tvm

OPERATION_ATTR = "tvm_sparse.operation"
"""On a model operation's PrimFunc: its name and the arguments it was built with, as JSON."""


@dataclass(frozen=True)
class Prologue:
    """`silu_mul`: x is gate | up [m, 2 k]. `add_rms_norm`: x, delta [m, k], w [k] f32; the sum is a second result."""

    operation: str
    eps: float = 0.0


def prologue_of(function: tvm.tirx.PrimFunc) -> Prologue | None:
    """What a matmul's kernel may do in place of this operation; None for all others."""
    noted = (function.attrs or {}).get(OPERATION_ATTR)
    name, *static = json.loads(str(noted)) if noted is not None else [""]
    if name == "silu_mul":
        return Prologue(name)
    if name == "add_rms_norm":
        _, _, eps, _ = static
        return Prologue(name, eps)
    return None
