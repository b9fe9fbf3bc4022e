"""Machine code for GPUs on a machine without one: nvcc is found, the driver stood in for, the images are real."""

import ctypes
import importlib.util
import subprocess
from pathlib import Path

import pytest
import tvm
from tvm.script import tirx as T

from tvm_sparse.codegen import cuda, cuda_stub, cuda_toolkit
from tvm_sparse.codegen.cuda_images import images
from tvm_sparse.errors import Refusal
from tvm_sparse.targets import MACHINES

BOTH = [MACHINES["b200"], MACHINES["h200"]]


def scale(factor: str):
    """y = x * factor, where `factor` is CUDA source: a kernel that nvcc accepts or not."""

    @T.prim_func(s_tir=True)
    def scale(x: T.Buffer((64,), "float32"), y: T.Buffer((64,), "float32")):
        T.func_attr({"global_symbol": "scale"})
        thread = T.launch_thread("threadIdx.x", 64)
        y[thread] = x[thread] * T.cuda.func_call(
            "factor", source_code=f"__device__ float factor() {{ return {factor}; }}", return_type="float32"
        )

    return tvm.IRModule({"scale": scale})


def test_one_library_holds_machine_code_for_every_machine(toolkit, tmp_path):
    library = tmp_path / "lib.so"
    found = cuda.build_cuda_library(scale("2.0f"), library, BOTH)
    assert found == images(library) == {"sm_100a": ["scale_kernel"], "sm_90a": ["scale_kernel"]}


def test_an_error_in_a_kernel_shows_at_build(toolkit, tmp_path):
    with pytest.raises(RuntimeError, match="undefined_thing"):
        cuda.build_cuda_library(scale("undefined_thing"), tmp_path / "lib.so", BOTH)


def reverse(dtype: str):
    """A kernel whose dynamic shared memory is called `shared` and holds `dtype`."""

    @T.prim_func(s_tir=True)
    def reverse(x: T.Buffer((64,), dtype), y: T.Buffer((64,), dtype)):
        T.func_attr({"global_symbol": f"reverse_{dtype}"})
        thread = T.launch_thread("threadIdx.x", 64)
        shared = T.alloc_buffer((64,), dtype, scope="shared.dyn")
        shared[thread] = x[thread]
        T.tvm_storage_sync("shared.dyn")
        y[thread] = shared[63 - thread]

    return reverse


def test_kernels_may_call_shared_memory_of_different_types_the_same(toolkit, tmp_path):
    mod = tvm.IRModule({f"reverse_{dtype}": reverse(dtype) for dtype in ("float32", "uint32")})
    found = cuda.build_cuda_library(mod, tmp_path / "lib.so", BOTH[1:])
    assert found == {"sm_90a": ["reverse_float32_kernel", "reverse_uint32_kernel"]}


def test_images_tell_ptx_and_architectures_apart(toolkit, tmp_path):
    source, fatbin = tmp_path / "two.cu", tmp_path / "two.fatbin"
    source.write_text('extern "C" __global__ void one() {}\nextern "C" __global__ void two() {}\n')
    codes = ["compute_90,code=sm_90", "compute_90a,code=sm_90a", "compute_100a,code=compute_100a"]
    flags = [f"-gencode=arch={code}" for code in codes]
    asked = [toolkit.nvcc, "--fatbin", "--compress-mode=none", *flags, "-o", fatbin, source]
    subprocess.run(asked, check=True)
    assert images(fatbin) == {"ptx_100a": [], "sm_90": ["one", "two"], "sm_90a": ["one", "two"]}


def test_division_is_exact_and_denormals_stay(toolkit, tmp_path):
    """What fast math would change; told from the PTX that the same options give."""
    source, ptx = tmp_path / "f.cu", tmp_path / "f.ptx"
    source.write_text("__global__ void f(float* x) { x[0] = x[1] / x[2] + expf(x[3]); }")
    options = [o for o in cuda.flags(["sm_90a"]) if not o.startswith(("-gencode", "--fatbin"))]
    subprocess.run([toolkit.nvcc, "--ptx", "-arch=compute_90a", *options, "-o", ptx, source], check=True)
    assert "div.rn.f32" in ptx.read_text() and ".ftz" not in ptx.read_text().replace("ex2.approx.ftz", "")


def test_the_stub_answers_every_driver_call_with_no_device(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    runtime = Path(importlib.util.find_spec("tvm").origin).parent / "lib" / "libtvm_runtime_cuda.so"
    stub = cuda_stub.make_stub(runtime)
    assert ctypes.CDLL(str(stub)).cuLaunchKernelEx() == 100
    written = stub.stat().st_mtime_ns
    assert cuda_stub.make_stub(runtime).stat().st_mtime_ns == written  # made once


def test_nvcc_is_found_in_nvidias_packages(tmp_path, monkeypatch):
    root = tmp_path / "nvidia" / "cu13"
    for file in ("bin/nvcc", "lib/libcudart.so.13"):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).touch(mode=0o755)
    only_packages(monkeypatch, tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert cuda_toolkit.find_toolkit() == cuda_toolkit.Toolkit(root / "bin/nvcc", root / "lib/libcudart.so.13")


def test_without_nvcc_the_refusal_names_the_way_on(tmp_path, monkeypatch):
    only_packages(monkeypatch, tmp_path)
    with pytest.raises(Refusal, match=r"pip install 'tvm_sparse\[cuda\]'"):
        cuda_toolkit.find_toolkit()


def only_packages(monkeypatch, empty: Path) -> None:
    """Hides every installed toolkit."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(empty))
    monkeypatch.setattr(cuda_toolkit, "INSTALLED", empty / "none")
