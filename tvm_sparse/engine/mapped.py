"""Tensors over memory that is somebody else's: the host's, pinned, which kernels read across the bus.

A kernel takes a tensor of its own device only. The pointer of pinned memory is the same on the host and on the device,
so a tensor that says it is the device's does, handed over by DLPack (dmlc/dlpack, dlpack.h).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

_CODES = {"int": 0, "uint": 1, "float": 2, "bfloat": 4}


class _Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device", ctypes.c_int32 * 2),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


class _Managed(ctypes.Structure):
    _fields_ = [("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p)]


_alive: dict[int, tuple[Callable[[], object], Any]] = {}
_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]


@ctypes.CFUNCTYPE(None, ctypes.c_void_p)
def _delete(managed: int) -> None:
    free, _ = _alive.pop(managed)
    free()


class Foreign:
    """Memory at `data` as a compact tensor on DLPack device (type, index); `free()` when its last user is gone.

    To be taken once, by from_dlpack.
    """

    def __init__(
        self, data: int, shape: tuple[int, ...], dtype: str, device: tuple[int, int], free: Callable[[], object]
    ) -> None:
        kind = dtype.rstrip("0123456789")
        sizes = (ctypes.c_int64 * len(shape))(*shape)
        tensor = _Tensor(
            data, (ctypes.c_int32 * 2)(*device), len(shape), _CODES[kind], int(dtype[len(kind) :]), 1, sizes, None, 0
        )
        self._managed = _Managed(tensor, None, ctypes.cast(_delete, ctypes.c_void_p))
        self._device = device
        _alive[ctypes.addressof(self._managed)] = free, (self._managed, sizes)

    def __dlpack__(self, **_: Any) -> Any:
        return _new_capsule(ctypes.addressof(self._managed), b"dltensor", None)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._device
