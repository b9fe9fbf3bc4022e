"""One decode step on a GPU captured as a CUDA graph and replayed: one launch in place of hundreds.

All state is updated in place in buffers that stay where they are, so the same graph serves every step. The VM's pool
must have been filled by steps outside the capture first; the result's buffer is kept alive here.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

from tvm_sparse.engine.runtime import Device, load_cuda

_NON_BLOCKING = 1
_RELAXED = 2


class CapturedStep:
    """`step()` captured; call it to replay, the result is in `result` once the call returns."""

    def __init__(self, device: Device, step: Callable[[], Any]) -> None:
        self._cuda = load_cuda()
        self._stream, graph, self._graph = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p()
        self._check(self._cuda.cudaStreamCreateWithFlags(ctypes.byref(self._stream), _NON_BLOCKING))
        self._check(self._cuda.cudaDeviceSynchronize())
        with device.use_stream(self._stream.value or 0):
            self._check(self._cuda.cudaStreamBeginCapture(self._stream, _RELAXED))
            self.result = step()
            self._check(self._cuda.cudaStreamEndCapture(self._stream, ctypes.byref(graph)))
        self._check(self._cuda.cudaGraphInstantiate(ctypes.byref(self._graph), graph, ctypes.c_ulonglong(0)))
        self._check(self._cuda.cudaGraphDestroy(graph))

    def __call__(self) -> Any:
        self._check(self._cuda.cudaGraphLaunch(self._graph, self._stream))
        self._check(self._cuda.cudaStreamSynchronize(self._stream))
        return self.result

    @staticmethod
    def _check(status: int) -> None:
        if status:
            raise RuntimeError(f"CUDA graph: error {status}")
