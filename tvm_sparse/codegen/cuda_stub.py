"""A stand-in for the driver's libcuda.so.1, for build processes on machines without a GPU.

TVM's CUDA runtime library, which turns source into machine code at build time, is linked with the driver. It calls the
driver only to load or launch kernels, which a build never does, so a library whose every entry point answers
CUDA_ERROR_NO_DEVICE (100) is enough. It is loaded into this process alone and never travels with an artefact.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from tvm_sparse.errors import Refusal


def load_driver(needed_by: Path) -> None:
    """Loads the machine's libcuda.so.1, or else a stub with every driver entry point that `needed_by` names."""
    try:
        ctypes.CDLL("libcuda.so.1", mode=ctypes.RTLD_GLOBAL)
    except OSError:
        ctypes.CDLL(str(make_stub(needed_by)), mode=ctypes.RTLD_GLOBAL)


def make_stub(needed_by: Path) -> Path:
    """The stub in the user's cache folder, made there if it is new. Raises Refusal without a C compiler."""
    names = sorted(set(re.findall(rb"\0(cu[A-Z]\w+)(?=\0)", needed_by.read_bytes())))
    source = "".join(f"int {name.decode()}(void) {{ return 100; }}\n" for name in names)
    folder = _cache_folder() / f"libcuda-stub-{hashlib.sha256(source.encode()).hexdigest()[:16]}"
    library = folder / "libcuda.so.1"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        written = Path(scratch, "stub.c")
        written.write_text(source)
        made = written.with_suffix(".so")
        flags = ["-shared", "-fPIC", "-Wl,-soname,libcuda.so.1"]
        asked = [c_compiler(), *flags, "-o", str(made), str(written)]
        done = subprocess.run(asked, capture_output=True, text=True)
        if done.returncode != 0:
            raise Refusal(f"the C compiler made no libcuda stub: {done.stderr.strip().splitlines()[-1:]}")
        os.replace(made, library)  # whole or not at all, whoever else builds at the same time
    return library


def c_compiler() -> str:
    """The C compiler's path: CC, cc, gcc or clang. Raises Refusal where there is none."""
    for name in (os.environ.get("CC"), "cc", "gcc", "clang"):
        if name and (found := shutil.which(name)):
            return found
    raise Refusal("no C compiler (cc, gcc or clang) on PATH: install one, for Debian: apt-get install gcc")


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tvm_sparse"
