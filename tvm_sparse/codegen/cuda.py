"""The one place that makes machine code for NVIDIA GPUs, on machines with and without one.

TVM turns CUDA source into machine code only where its CUDA runtime library is loaded, which wants the driver; without
it the "library" it exports holds source text, compiled at load and unchecked at build. `prepare` loads that runtime
library over a stub of the driver where there is none, and makes nvcc compile every kernel for all machines of a build
into one fatbin. Importing this module loads neither TVM nor a GPU library.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tvm_sparse.codegen.cuda_images import images
from tvm_sparse.codegen.cuda_stub import load_driver
from tvm_sparse.codegen.cuda_toolkit import Toolkit, find_toolkit
from tvm_sparse.targets import Machine

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["build_cuda_library", "compile_source", "cuda_target", "images", "prepare"]

_COMPILE = "tvm_callback_cuda_compile"
_CREATE = "ffi.Module.create.cuda"

# What the kernels may ask of every machine in the table: 227 KiB of shared memory a block, opted in at launch.
_LIMITS = {
    "max_threads_per_block": 1024,
    "max_shared_memory_per_block": 227 << 10,
    "thread_warp_size": 32,
}


def prepare() -> Toolkit:
    """Makes this process able to compile CUDA kernels, whether or not TVM was imported before.

    Raises Refusal where nvcc, the CUDA runtime or (without a driver) a C compiler is missing.
    """
    toolkit = find_toolkit()
    spec = importlib.util.find_spec("tvm")
    assert spec is not None and spec.origin is not None, "apache-tvm is a dependency"
    runtime = Path(spec.origin).parent / "lib" / "libtvm_runtime_cuda.so"
    load_driver(needed_by=runtime)
    ctypes.CDLL(str(toolkit.cudart), mode=ctypes.RTLD_GLOBAL)

    import tvm

    ctypes.CDLL(str(runtime), mode=ctypes.RTLD_GLOBAL)  # registers itself; harmless where TVM found it already
    if tvm.get_global_func(_CREATE, allow_missing=True) is None:
        raise RuntimeError(f"{runtime} did not register {_CREATE}: not the TVM this was written for")
    return toolkit


def cuda_target(machines: Sequence[Machine]) -> Any:
    """The TVM target of a build: the source is generated once, for the oldest architecture among the machines."""
    import tvm

    oldest = min((machine.arch for machine in machines), key=_number)
    return tvm.target.Target({"kind": "cuda", "arch": oldest, **_LIMITS}, host="llvm")


def build_cuda_library(
    mod: Any, out_path: str | Path, machines: Sequence[Machine], instruments: Sequence[Any] = ()
) -> dict[str, list[str]]:
    """Compiles an IRModule (Relax functions and PrimFuncs) into one shared library for all machines.

    Returns `images(out_path)` after checking that every machine has the same kernels as machine code.
    Raises Refusal as `prepare` does, RuntimeError with nvcc's words where a kernel does not compile.
    """
    toolkit = prepare()

    import tvm

    target = cuda_target(machines)
    arches = sorted({machine.arch for machine in machines}, key=_number)
    from tvm_sparse.codegen.many_tokens import host_objects

    with tempfile.TemporaryDirectory() as folder, _nvcc(toolkit, arches), target:
        objects = host_objects(mod, Path(folder))
        with tvm.transform.PassContext(instruments=list(instruments)):
            tvm.compile(mod, target=target).export_library(str(out_path), addons=objects)
    found = images(out_path)
    kernels = {arch: set(found.get(arch, ())) for arch in arches}
    if len({frozenset(names) for names in kernels.values()}) != 1 or not all(kernels.values()):
        counts = {arch: len(names) for arch, names in kernels.items()}
        raise RuntimeError(f"{out_path} lacks machine code: kernels by architecture {counts}")
    return found


def flags(arches: Sequence[str]) -> list[str]:
    """nvcc's options: machine code only, uncompressed so that `images` can read it, two cores busy.

    Fast math stays off: exp, division and denormals in softmax, gates and scales are those of IEEE.
    """
    codes = [f"-gencode=arch=compute_{_suffix(arch)},code={arch}" for arch in arches]
    wide = ["--split-compile=0", f"--threads={len(arches)}"]
    quiet = "--diag-suppress=177"  # TVM declares what it does not use; an error would drown in it
    return ["--fatbin", "-O3", "-std=c++17", "--compress-mode=none", quiet, *wide, *codes]


def compile_source(toolkit: Toolkit, source: str, arches: Sequence[str]) -> bytes:
    """CUDA source -> one fatbin with machine code for each arch ("sm_90a", ...), without PTX.

    TVM_SPARSE_DEBUG=4 keeps the source and prints registers, shared memory and spills of every kernel.
    """
    debug = os.environ.get("TVM_SPARSE_DEBUG", "") >= "4"
    with tempfile.TemporaryDirectory(prefix="tvm_sparse_cuda_") as scratch:
        written, made = Path(scratch, "kernels.cu"), Path(scratch, "kernels.fatbin")
        written.write_text(source)
        asked = [str(toolkit.nvcc), *flags(arches), *(["-Xptxas=-v"] if debug else [])]
        done = subprocess.run([*asked, "-o", str(made), str(written)], capture_output=True, text=True)
        if debug:
            print(done.stderr)
            Path("kernels.cu").write_text(source)
        if done.returncode != 0:
            raise RuntimeError(f"nvcc: {done.stderr}")
        return made.read_bytes()


_KERNEL = 'extern "C" __global__'
_DYNAMIC = re.compile(r"extern __shared__ __align__\(\d+\) (\w+) (\w+)\[\];")


def one_type_a_name(source: str) -> str:
    """Gives each kernel's dynamic shared memory a name with its type in it.

    TVM names it after its buffer, and C++ wants one name to have one type in all kernels of a source.
    """

    def rename(kernel: str) -> str:
        for dtype, name in _DYNAMIC.findall(kernel):
            kernel = re.sub(rf"\b{name}\b", f"{name}_{dtype}", kernel)
        return kernel

    return _KERNEL.join(map(rename, source.split(_KERNEL)))


@contextmanager
def _nvcc(toolkit: Toolkit, arches: Sequence[str]) -> Iterator[None]:
    """Within it, TVM's code generator hands CUDA source to our nvcc command; the former callback comes back after."""
    import tvm_ffi

    former = tvm_ffi.get_global_func(_COMPILE, allow_missing=True)
    compiled: dict[str, bytes] = {}

    def callback(source: str) -> bytes:
        if source not in compiled:
            compiled[source] = compile_source(toolkit, one_type_a_name(source), arches)
        return compiled[source]

    tvm_ffi.register_global_func(_COMPILE, callback, override=True)
    try:
        yield
    finally:
        if former is not None:
            tvm_ffi.register_global_func(_COMPILE, former, override=True)


def _suffix(arch: str) -> str:
    return arch.removeprefix("sm_")


def _number(arch: str) -> int:
    return int(_suffix(arch).rstrip("af"))
