"""What it costs to run one layer's weights in another's place, on calibration text.

Every layer gets the hidden states that the unfolded model has there. What layer `weights` would add to them is held
against what the layer of that place adds: layers that are equal score 1 wherever they stand, which a comparison of the
layers' outputs at their own places would not show.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cache

import torch

from tvm_sparse.checkpoint.folder import FolderCheckpoint
from tvm_sparse.progress import bar
from tvm_sparse.pruning.decoder import Decoder


class Reuse:
    """Runs the model once and keeps, of each of `places`, the hidden states [samples, length, hidden] that enter the
    layer and what it adds to them, float32."""

    def __init__(self, checkpoint: FolderCheckpoint, ids: torch.Tensor, places: Collection[int], device: str) -> None:
        self._checkpoint = checkpoint
        self._decoder = Decoder(checkpoint.folder, device)
        self._entering: dict[int, torch.Tensor] = {}
        self._own: dict[int, torch.Tensor] = {}
        hidden = self._decoder.embed(checkpoint, ids)
        for layer in bar(range(max(places) + 1), max(places) + 1, "layer", "run the calibration text"):
            before = hidden.clone()
            self._decoder.advance(self._decoder.layer(layer, checkpoint), hidden, f"layer {layer}")
            if layer in places:
                self._entering[layer], self._own[layer] = before, hidden - before
        self.compare = cache(self._compare)

    def similarity(self, a: int, b: int) -> float:
        """Of two layers of one kind, each in the other's place, the lower: `agreement` of what they add."""
        return min(self.compare(a, b)[0], self.compare(b, a)[0])

    def best(self, layers: Sequence[int]) -> int:
        """The layer with the least error, summed over all the places."""
        return min(layers, key=lambda weights: self.error(weights, layers))

    def error(self, weights: int, places: Sequence[int]) -> float:
        """Mean of |difference|^2 / |what the layer adds|^2 over places where layer `weights` runs instead."""
        return sum(self.compare(weights, place)[1] for place in places) / len(places)

    def _compare(self, weights: int, place: int) -> tuple[float, float]:
        """Agreement and relative squared error."""
        if weights == place:
            return 1.0, 0.0
        layer = self._decoder.layer(weights, self._checkpoint)
        entering, own = self._entering[place], self._own[place]
        sums = torch.zeros(3, dtype=torch.float64)
        for part in self._decoder.batches(entering, f"layer {weights} in place of {place}"):
            x, wanted = entering[part], own[part].double()
            added = (self._decoder.forward(layer, x).cpu() - x).double()
            sums += torch.stack([(added * wanted).sum(), added.square().sum(), wanted.square().sum()])
        product, added_square, wanted_square = sums.tolist()
        scale = added_square + wanted_square
        return (2 * product / scale if scale else 1.0), (scale - 2 * product) / max(wanted_square, 1e-300)
