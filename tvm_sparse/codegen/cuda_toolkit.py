"""Finds NVIDIA's compiler: nvcc and the CUDA runtime library, from the system or from NVIDIA's PyPI packages."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tvm_sparse.errors import Refusal

CUDART = "libcudart.so.13"  # the one that TVM's CUDA runtime library is linked with
INSTALLED = Path("/usr/local/cuda")  # where NVIDIA's installers put a toolkit


@dataclass(frozen=True)
class Toolkit:
    """`nvcc` is the compiler, `cudart` the runtime library of CUDA 13."""

    nvcc: Path
    cudart: Path


def find_toolkit() -> Toolkit:
    """CUDA_HOME first, then PATH, then the `[cuda]` extra's packages. Raises Refusal where one is missing."""
    nvcc = next((path for path in _nvcc_candidates() if os.access(path, os.X_OK)), None)
    if nvcc is None:
        raise Refusal(
            "no nvcc in CUDA_HOME, on PATH or from PyPI: pip install 'tvm_sparse[cuda]', or install CUDA 13"
        )
    cudart = next((path for path in _cudart_candidates(nvcc) if path.exists()), None)
    if cudart is None:
        raise Refusal(f"no {CUDART} beside {nvcc}: pip install 'tvm_sparse[cuda]', or install CUDA 13")
    return Toolkit(nvcc, cudart)


def _nvcc_candidates() -> Iterator[Path]:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if home := os.environ.get(variable):
            yield Path(home, "bin", "nvcc")
    if found := shutil.which("nvcc"):
        yield Path(found)
    yield INSTALLED / "bin" / "nvcc"
    yield from (root / "bin" / "nvcc" for root in _wheel_roots())


def _cudart_candidates(nvcc: Path) -> Iterator[Path]:
    homes = [nvcc.resolve().parent.parent]
    homes += [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    homes += [INSTALLED, *_wheel_roots()]
    for home in homes:
        yield from (home / folder / CUDART for folder in ("lib64", "lib", "targets/x86_64-linux/lib"))


def _wheel_roots() -> Iterator[Path]:
    """NVIDIA's CUDA 13 wheels share one tree, site-packages/nvidia/cu13, shaped like an installed toolkit."""
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        yield Path(folder, "cu13")
