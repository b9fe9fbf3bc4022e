"""measure.json: everything that was measured, as one JSON object; the table and the page are drawn from it."""

from __future__ import annotations

from typing import Any

from tvm_sparse.checkpoint import Checkpoint, Stored
from tvm_sparse.errors import Refusal
from tvm_sparse.measure.components import CLASSIC, COMPONENTS, NOT_COUNTED, component
from tvm_sparse.measure.expectation import expect
from tvm_sparse.measure.figures import Asked, Measured, Pool, measured
from tvm_sparse.measure.magnitudes import Magnitudes
from tvm_sparse.measure.similarity import weight_similarity
from tvm_sparse.measure.sweep import sweep
from tvm_sparse.measure.zero_units import Maxima

READABLE = ("BF16", "F16", "F32")


def measure(checkpoint: Checkpoint, model: str, asked: Asked) -> dict[str, Any]:
    """Streams the whole checkpoint once. Raises Refusal for a tensor that is no float, and for NaN and infinity.

    Keys: model, weights (their origin), tensors, components (fine), by_name (the seven classic projections, "other"
    and "in all"), similarity, expected.
    """
    found: dict[str, Measured] = {}
    pools: dict[str, Pool] = {}

    def done(tensor: Stored, magnitudes: Magnitudes, maxima: Maxima | None) -> None:
        one = measured(tensor, magnitudes, maxima, asked)
        found[tensor.name] = one
        pools.setdefault(component(tensor), Pool(asked)).add(one, magnitudes)

    tensors = readable(checkpoint)
    products = sweep(checkpoint, tensors, done)
    text = {one.tensor.short: one for one in found.values() if one.tensor.part == "text"}
    return {
        "model": model,
        "weights": checkpoint.origin,
        "thresholds": list(asked.thresholds),
        "rounded_to_bfloat16": sum(tensor.dtype != "BF16" for tensor in tensors),
        "by_name": {name: pool.to_json() for name, pool in _by_name(pools, asked).items()},
        "components": {name: pools[name].to_json() for name in COMPONENTS if name in pools},
        "similarity": weight_similarity(checkpoint.config, products),
        "expected": expect(checkpoint.config, text, asked.sparsities),
        "tensors": [found[tensor.name].to_json() for tensor in tensors],
    }


def readable(checkpoint: Checkpoint) -> tuple[Stored, ...]:
    """Every tensor with a weight in it. Raises Refusal for a dtype that is not measured, by name."""
    tensors = tuple(tensor for tensor in checkpoint.stored() if tensor.shape and 0 not in tensor.shape)
    for tensor in tensors:
        if tensor.dtype not in READABLE:
            raise Refusal(
                f"tensor {tensor.name} is {tensor.dtype}: give an unquantised checkpoint ({', '.join(READABLE)})"
            )
    return tensors


def _by_name(pools: dict[str, Pool], asked: Asked) -> dict[str, Pool]:
    rows = {name: Pool(asked) for name in (*CLASSIC, "other", "in all")}
    for name, pool in pools.items():
        if name not in NOT_COUNTED:
            row = name if name in CLASSIC else "other"
            rows[row] += pool
            rows["in all"] += pool
    return {name: pool for name, pool in rows.items() if pool.tensors}
