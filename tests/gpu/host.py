"""A compiled library on a GPU host: torch for data and references, TVM's runtime libraries for the kernels."""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch
import tvm_ffi

DEVICE = "cuda"
_GUARD = 64  # elements before and after an output that a kernel must leave alone


def load(library: str) -> Callable[[str], Callable]:
    """Kernels by name. TVM's runtime is found beside the package, without importing it."""
    spec = importlib.util.find_spec("tvm")
    folder = Path(next(iter(spec.submodule_search_locations))) / "lib"
    torch.zeros(1, device=DEVICE)  # loads the CUDA runtime that torch carries
    for name in ("libtvm_runtime.so", "libtvm_runtime_cuda.so"):
        ctypes.CDLL(str(folder / name), mode=ctypes.RTLD_GLOBAL)
    module = tvm_ffi.load_module(str(Path(library).resolve()))
    return lambda name: module[name]


def library_of(argv: list[str]) -> tuple[str, list[str]]:
    """A script's library, named by --library FILE or standing first, and its other arguments."""
    if "--library" in argv[:-1]:
        at = argv.index("--library")
        return argv[at + 1], argv[:at] + argv[at + 2 :]
    if not argv:
        raise SystemExit("name the compiled kernels: --library FILE")
    return argv[0], argv[1:]


class Output:
    """A poisoned output between two guards."""

    def __init__(self, *shape: int, dtype: torch.dtype) -> None:
        count = torch.Size(shape).numel()
        self.store = torch.full((count + 2 * _GUARD,), float("nan"), device=DEVICE).to(dtype)
        self.tensor = self.store[_GUARD : _GUARD + count].view(shape)

    def unharmed(self) -> bool:
        """Whether the guards still hold what they held."""
        return bool(self.store[:_GUARD].isnan().all() and self.store[-_GUARD:].isnan().all())


def relative_error(out: torch.Tensor, reference: torch.Tensor) -> float:
    """|out - reference| / |reference| in float64; NaN where any element is."""
    difference = (out.double() - reference).norm()
    return float(difference / reference.norm().clamp_min(1e-30))
