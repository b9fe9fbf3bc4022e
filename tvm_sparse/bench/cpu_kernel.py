"""One CPU kernel alone: from any library, or compiled and dispatched exactly as in an artefact's."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import tvm
import tvm_ffi

from tvm_sparse.codegen.cpu import build_cpu_library
from tvm_sparse.formats import Packed
from tvm_sparse.schedules.spec import CPU_ISAS, KernelSpec
from tvm_sparse.schedules.table import instantiate, write_decisions


class CpuKernel:
    """y [m, n] = x [m, k] W^T for packed W: the kernel `spec` names in a library."""

    def __init__(self, spec: KernelSpec, library: Path):
        self.spec = spec
        self._library = tvm_ffi.load_module(str(library))
        self._function = self._library.get_function(spec.name, query_imports=True)

    @property
    def isa(self) -> str:
        """The instruction set in use, of a library that has several."""
        return CPU_ISAS[self._library.get_function("tvm_sparse_isa", query_imports=True)()]

    def bind(self, x: torch.Tensor, buffers: Mapping[str, torch.Tensor]) -> Callable[[], torch.Tensor]:
        """The call on these tensors, its output allocated once and poisoned."""
        dtype = getattr(torch, self.spec.out_dtype)
        y = torch.full((x.shape[0], self.spec.n), float("nan"), dtype=dtype)
        arguments = [tvm_ffi.from_dlpack(tensor) for tensor in (x, *buffers.values(), y)]

        def call() -> torch.Tensor:
            self._function(*arguments)
            return y

        return call

    def __call__(self, x: torch.Tensor, packed: Packed) -> torch.Tensor:
        return self.bind(x, packed.buffers)()


def compiled(spec: KernelSpec, tuned: Mapping[str, Mapping[str, int]] | None = None) -> CpuKernel:
    """The kernel as an artefact's library holds it; `tuned` decisions go by instruction set."""
    function = write_decisions(instantiate(spec), tuned or {})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.so"
        build_cpu_library(tvm.IRModule({spec.name: function}), path)
        return CpuKernel(spec, path)


def set_threads(count: int) -> None:
    """Threads of torch and of TVM's runtime from here on.

    TVM's pool takes half of the cores it sees, as if each were two threads of one, and would bind this thread to one
    core and torch's threads, its children, with it: it is told otherwise before it starts.
    """
    os.environ["TVM_BIND_THREADS"] = "0"
    os.environ["TVM_NUM_THREADS"] = str(len(os.sched_getaffinity(0)))
    torch.set_num_threads(count)
    tvm_ffi.get_global_func("runtime.config_threadpool")(1, count)
