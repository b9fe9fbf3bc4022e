"""Where an engine's parameters come from, as tensors on its device."""

from __future__ import annotations

from typing import Any, Protocol

from tvm_sparse.artefact.reader import Artefact
from tvm_sparse.engine.runtime import Device


class Weights(Protocol):
    """Packed buffers by their runtime names."""

    @property
    def resident(self) -> int:
        """Bytes that stand on the device already, before any `tensor` is asked for."""

    def nbytes(self, name: str) -> int: ...

    def tensor(self, name: str, device: Device, on_host: bool) -> Any:
        """`on_host`: in the host's memory, for a GPU to read from there."""


class StoredWeights:
    """Those of an artefact's files."""

    resident = 0

    def __init__(self, artefact: Artefact) -> None:
        self._artefact = artefact

    def nbytes(self, name: str) -> int:
        return self._artefact.buffers[name].nbytes

    def tensor(self, name: str, device: Device, on_host: bool) -> Any:
        stored = self._artefact.buffers[name]
        if on_host:
            return device.mapped(stored.shape, stored.dtype, self._artefact.array(name))
        tensor = device.empty(stored.shape, stored.dtype)
        device.upload(tensor, self._artefact.array(name))
        return tensor
