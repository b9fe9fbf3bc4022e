"""Cosine similarity of layers as weights, from the pairwise products that the sweep sums."""

from __future__ import annotations

from typing import Any

import numpy as np

from tvm_sparse.models.config import ModelConfig

FOLD = 0.95  # the similarity over which running one layer's weights for another's is worth trying


def weight_similarity(config: ModelConfig, products: dict[str, np.ndarray]) -> dict[str, Any]:
    """`projections` and, all of them joined, whole layers by `kinds`; pairs of one kind over FOLD are `candidates`."""
    projections = {}
    for name, product in products.items():
        layers = [i for i, kind in enumerate(config.layer_types) if _has(name, kind)]
        projections[name] = _facts(layers, product)
    kinds = {}
    for kind in dict.fromkeys(config.layer_types):
        layers = [i for i, other in enumerate(config.layer_types) if other == kind]
        if len(layers) > 1:
            kinds[kind] = _facts(layers, _whole_layers(config, products, kind, layers))
    candidates = [
        {"kind": kind, "layers": [facts["layers"][i], facts["layers"][j]], "cosine": facts["cosine"][i][j]}
        for kind, facts in kinds.items()
        for i, j in zip(*np.triu_indices(len(facts["layers"]), 1), strict=True)
        if facts["cosine"][i][j] > FOLD
    ]
    return {"threshold": FOLD, "projections": projections, "kinds": kinds, "candidates": candidates}


def cosine(product: np.ndarray) -> np.ndarray:
    """Pairwise products [L, L] -> cosines; 0 where a layer is all zero."""
    norms = np.sqrt(product.diagonal())
    scale = np.divide(1, norms, out=np.zeros_like(norms), where=norms > 0)
    return np.clip(product * np.outer(scale, scale), -1, 1)


def _has(projection: str, kind: str) -> bool:
    module = projection.partition(".")[0]
    return module == "mlp" or (module == "linear_attn") == (kind == "linear_attention")


def _whole_layers(config: ModelConfig, products: dict[str, np.ndarray], kind: str, layers: list[int]) -> np.ndarray:
    total = np.zeros((len(layers), len(layers)))
    for name, product in products.items():
        if _has(name, kind):
            of = [i for i, other in enumerate(config.layer_types) if _has(name, other)]
            at = [of.index(layer) for layer in layers]
            total += product[np.ix_(at, at)]
    return total


def _facts(layers: list[int], product: np.ndarray) -> dict[str, Any]:
    found = cosine(product)
    return {"layers": layers, "cosine": found.round(5).tolist(), "largest": largest(layers, found)}


def largest(layers: list[int], found: np.ndarray) -> dict[str, Any]:
    """The most similar pair."""
    upper = np.where(np.triu(np.ones_like(found), 1) > 0, found, -np.inf)
    i, j = np.unravel_index(int(upper.argmax()), found.shape)
    return {"layers": [layers[i], layers[j]], "cosine": float(found[i, j])}
