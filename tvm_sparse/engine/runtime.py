"""TVM's runtime without its compiler: finds and loads the libraries, and moves numbers to and from a device.

`import tvm` would load the compiler (250 MB) or at least its Python package; an exported library needs libtvm_runtime
(3 MB) and, for a GPU, libtvm_runtime_cuda and libcudart. They are found without importing anything.
"""

from __future__ import annotations

import ctypes
import glob
import importlib.util
import os
import sys
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from tvm_sparse.engine.mapped import Foreign
from tvm_sparse.errors import Refusal

_CUDA = 2  # DLPack's number
_MAPPED = 2  # cudaHostAlloc: the device can reach it


@cache
def load_tvm_ffi() -> ModuleType:
    """tvm_ffi and libtvm_runtime. tvm_ffi imports torch by itself where it is installed: kept from it here.

    TVM's thread pool would take half of the cores and pin the calling thread to one: unless the environment says
    otherwise it takes all cores that this process may use, and pins none.
    """
    os.environ.setdefault("TVM_NUM_THREADS", str(len(os.sched_getaffinity(0))))
    os.environ.setdefault("TVM_BIND_THREADS", "0")
    blocked = "torch" not in sys.modules
    if blocked:
        sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        import tvm_ffi
    finally:
        if blocked:
            del sys.modules["torch"]
    ctypes.CDLL(str(_tvm_library("libtvm_runtime.so")), mode=ctypes.RTLD_GLOBAL)
    return tvm_ffi


@cache
def load_cuda() -> ctypes.CDLL:
    """libcudart with TVM's CUDA runtime on top. Raises Refusal where there is no CUDA 13 runtime."""
    load_tvm_ffi()
    cudart = _load_cudart()
    try:
        ctypes.CDLL(str(_tvm_library("libtvm_runtime_cuda.so")), mode=ctypes.RTLD_GLOBAL)
    except OSError as missing:
        raise Refusal(f"the CUDA runtime does not load ({missing}): is there an NVIDIA driver?") from missing
    return cudart


def _tvm_library(name: str) -> Path:
    """TVM_LIBRARY_PATH first, then where the tvm package lies (it is not imported)."""
    folders = [Path(folder) for folder in os.environ.get("TVM_LIBRARY_PATH", "").split(os.pathsep) if folder]
    package = importlib.util.find_spec("tvm")
    if package is not None:
        folders += [Path(place) / "lib" for place in package.submodule_search_locations or ()]
    for folder in folders:
        if (folder / name).exists():
            return folder / name
    raise Refusal(f"{name} not found: install apache-tvm, or name its folder in TVM_LIBRARY_PATH")


def _load_cudart() -> ctypes.CDLL:
    name = "libcudart.so.13"
    places = [name, f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/lib64/{name}"]
    nvidia = importlib.util.find_spec("nvidia")  # NVIDIA's wheels
    for place in (nvidia.submodule_search_locations or ()) if nvidia else ():
        places += glob.glob(f"{place}/**/{name}", recursive=True)
    for path in places:
        try:
            return ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
    raise Refusal(f"{name} not found: install a CUDA 13 runtime (pip install nvidia-cuda-runtime), or use device cpu")


class Device:
    """One device: plain tensors on it, and VMs that run on it."""

    def __init__(self, name: str) -> None:
        """`name`: "cpu", "cuda" or "cuda:1". Raises Refusal for any other and where the device is not there."""
        kind, _, index = name.partition(":")
        if kind not in ("cpu", "cuda") or not (index or "0").isdigit():
            raise Refusal(f"unknown device {name}: use cpu or cuda:0")
        self.kind, self.index = kind, int(index or 0)
        self._ffi = load_tvm_ffi()
        self._cudart = load_cuda() if kind == "cuda" else None
        if self._cudart is not None:
            self._check_cuda()
        self.handle = self._ffi.device(f"{kind}:{self.index}")
        self._alloc = self._ffi.get_global_func("runtime.TVMTensorAllocWithScope")
        self._from_bytes = self._ffi.get_global_func("runtime.TVMTensorCopyFromBytes")
        self._to_bytes = self._ffi.get_global_func("runtime.TVMTensorCopyToBytes")

    def _check_cuda(self) -> None:
        count = ctypes.c_int(0)
        failed = self._cudart.cudaGetDeviceCount(ctypes.byref(count))  # type: ignore[union-attr]
        if failed or self.index >= count.value:
            raise Refusal(f"no device cuda:{self.index}: {0 if failed else count.value} CUDA devices here; use cpu")

    def free_memory(self) -> int:
        """Bytes that can still be allocated: of the GPU, or of this machine without swapping."""
        if self._cudart is None:
            with open("/proc/meminfo") as lines:
                found = {line.split(":")[0]: int(line.split()[1]) << 10 for line in lines if line.strip()}
            return found["MemAvailable"]
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._cudart.cudaSetDevice(self.index)
        if self._cudart.cudaMemGetInfo(ctypes.byref(free), ctypes.byref(total)):
            raise RuntimeError("cudaMemGetInfo failed")
        return free.value

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        return self._alloc(self._ffi.Shape(shape), self._ffi.dtype(dtype), self.handle, None)

    def zeros(self, shape: tuple[int, ...], dtype: str) -> Any:
        tensor = self.empty(shape, dtype)
        self.clear(tensor)
        return tensor

    def mapped(self, shape: tuple[int, ...], dtype: str, data: np.ndarray) -> Any:
        """A tensor of this GPU that stands in the host's memory: what a kernel reads of it comes across the bus.

        Raises Refusal where the host cannot pin so much.
        """
        place, cudart, data = ctypes.c_void_p(), self._cudart, np.ascontiguousarray(data)
        assert cudart is not None, "a CPU has no other memory"
        cudart.cudaSetDevice(self.index)
        if cudart.cudaHostAlloc(ctypes.byref(place), ctypes.c_size_t(data.nbytes), _MAPPED):
            raise Refusal(f"the host cannot pin {data.nbytes / 1e9:.2f} GB of its memory for the embedding: free some")
        ctypes.memmove(place, data.ctypes.data, data.nbytes)
        free = partial(cudart.cudaFreeHost, place)
        return self._ffi.from_dlpack(Foreign(place.value or 0, shape, dtype, (_CUDA, self.index), free))

    def clear(self, tensor: Any, row: int | None = None) -> None:
        """Sets every byte to zero, or those of one row of the first dimension."""
        size, start = nbytes(tensor), tensor.data_ptr()
        if row is not None:
            size //= int(tensor.shape[0])
            start += row * size
        if self._cudart is None:
            ctypes.memset(start, 0, size)
        elif self._cudart.cudaMemset(ctypes.c_void_p(start), 0, ctypes.c_size_t(size)):
            raise RuntimeError("cudaMemset failed")

    def upload(self, tensor: Any, data: np.ndarray) -> None:
        """Fills a tensor with an array's bytes (the array's dtype may be another of the same size)."""
        data = np.ascontiguousarray(data)
        if data.nbytes != nbytes(tensor):
            raise ValueError(f"{data.nbytes} bytes for a tensor of {nbytes(tensor)}")
        if data.nbytes:
            self._from_bytes(tensor, ctypes.c_void_p(data.ctypes.data), data.nbytes)

    def download(self, tensor: Any) -> np.ndarray:
        """A float32 or int32 tensor as an array of its own."""
        out = np.empty(tuple(tensor.shape), str(tensor.dtype))
        self._to_bytes(tensor, ctypes.c_void_p(out.ctypes.data), out.nbytes)
        return out

    def load_vm(self, library: Path) -> Any:
        """A virtual machine over an exported library; its functions are `vm[name]`."""
        vm = self._ffi.load_module(str(library.resolve()))["vm_load_executable"]()
        cpu, pooled = (1, 0), 2
        devices = (*cpu, pooled) if self.kind == "cpu" else (2, self.index, pooled, *cpu, pooled)
        vm["vm_initialization"](*devices)
        return vm

    def array(self, tensors: list[Any]) -> Any:
        """Tensors as one argument of a VM function (a Relax tuple)."""
        return self._ffi.convert(tensors)

    def use_stream(self, stream: int) -> Any:
        """A context in which kernels go to this CUDA stream."""
        return self._ffi.use_raw_stream(self.handle, stream)


def nbytes(tensor: Any) -> int:
    count = 1
    for extent in tensor.shape:
        count *= int(extent)
    dtype = tensor.dtype
    return count * (dtype.bits * dtype.lanes // 8)
