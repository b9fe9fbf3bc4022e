"""One decode step on a GPU captured as a CUDA graph and replayed: one launch in place of hundreds.

All state is updated in place in buffers that stay where they are, so the same graph serves every step. The VM's pool
must have been filled by steps outside the capture first; the result's buffer is kept alive here.

A step leaves the next one's ids on the device, so the next one can be started before anybody has read them: `start` and
`read` keep the GPU busy while the host looks at a token.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np

from tvm_sparse.engine.runtime import Device, load_cuda, nbytes

_NON_BLOCKING = 1
_RELAXED = 2
_NO_TIMING = 2
_TO_HOST = 2
_SLOTS = 2  # of ids on their way to the host

Ids = TypeVar("Ids")


class CapturedStep:
    """`step()` captured; call it to replay, the result is in `result` once the call returns.

    `ids` int32 [B] on the device are what a step leaves for the next one.
    """

    def __init__(self, device: Device, step: Callable[[], Any], ids: Any) -> None:
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
        self._ids, self._size = ctypes.c_void_p(ids.data_ptr()), ctypes.c_size_t(nbytes(ids))
        self._slots = [self._slot() for _ in range(_SLOTS)]
        self._started = self._read = 0

    def __call__(self) -> Any:
        self._check(self._cuda.cudaGraphLaunch(self._graph, self._stream))
        self.wait()
        return self.result

    def start(self) -> None:
        """A step, and its ids on their way to the host; at most two may be started and not read."""
        place, event = self._slots[self._started % _SLOTS]
        self._started += 1
        self._check(self._cuda.cudaGraphLaunch(self._graph, self._stream))
        self._check(self._cuda.cudaMemcpyAsync(place, self._ids, self._size, _TO_HOST, self._stream))
        self._check(self._cuda.cudaEventRecord(event, self._stream))

    def read(self) -> np.ndarray:
        """The ids, int32 [B], that the earliest step started and not read yet has left."""
        place, event = self._slots[self._read % _SLOTS]
        self._read += 1
        self._check(self._cuda.cudaEventSynchronize(event))
        return np.frombuffer(ctypes.string_at(place, self._size.value), np.int32)

    def wait(self) -> None:
        """Until all steps are done, whether their ids were read or not."""
        self._check(self._cuda.cudaStreamSynchronize(self._stream))
        self._started = self._read = 0

    def _slot(self) -> tuple[ctypes.c_void_p, ctypes.c_void_p]:
        place, event = ctypes.c_void_p(), ctypes.c_void_p()
        self._check(self._cuda.cudaMallocHost(ctypes.byref(place), self._size))
        self._check(self._cuda.cudaEventCreateWithFlags(ctypes.byref(event), _NO_TIMING))
        return place, event

    @staticmethod
    def _check(status: int) -> None:
        if status:
            raise RuntimeError(f"CUDA graph: error {status}")


def one_ahead(start: Callable[[], None], read: Callable[[], Ids], count: int) -> Iterator[Ids]:
    """What `count` steps leave, each read once the step after it is started. Left early, one step has run too many."""
    for done in range(count):
        if done == 0:
            start()
        if done + 1 < count:
            start()
        yield read()
