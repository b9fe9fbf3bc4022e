"""CUDA kernels without a GPU: they take what their CPU counterparts take, and compile for every machine.

That they compute the right thing is checked on a GPU by the scripts in tests/gpu.
"""

import ctypes
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st

from tvm_sparse.codegen import cuda, cuda_stub, cuda_toolkit
from tvm_sparse.errors import Refusal
from tvm_sparse.formats import FORMATS
from tvm_sparse.schedules.cuda import matmul_delta
from tvm_sparse.schedules.ops import ModelOps
from tvm_sparse.schedules.space import sketch
from tvm_sparse.schedules.spec import KernelSpec
from tvm_sparse.schedules.table import instantiate, space
from tvm_sparse.targets import MACHINES

sys.path.insert(0, str(Path(__file__).parent / "gpu"))
import cases

TINY = next(shape for shape in cases.SHAPES if shape.name == "tiny")
CHOICES = [
    FORMATS["dense"].choice(),
    FORMATS["bitmap"].choice(),
    FORMATS["2:4"].choice(),
    FORMATS["block"].choice(4, 8),
    FORMATS["delta"].choice(4, 132, 16),
    FORMATS["delta"].choice(5, 3, 2),
]


def specs():
    for choice in CHOICES:
        for m in (1, 3, None):
            yield KernelSpec(choice, 100, 72, m, "bfloat16", "float32", "sm_90a")


def signature(function: tvm.tirx.PrimFunc) -> list[tuple[str, ...]]:
    """Shapes and dtypes of the arguments; symbolic dimensions by their order of appearance."""
    seen: dict[tvm.tirx.Var, str] = {}

    def spelled(dim) -> str:
        return str(int(dim)) if isinstance(dim, tvm.tirx.IntImm) else seen.setdefault(dim, f"dim{len(seen)}")

    return [(str(p.ty.dtype), *map(spelled, p.ty.shape)) for p in function.params]


def test_operations_take_what_the_cpu_takes():
    on_gpu, on_cpu = (cases.operations(TINY, ModelOps(device)) for device in ("cuda", "cpu"))
    assert {name: signature(f) for name, f in on_gpu.items()} == {name: signature(f) for name, f in on_cpu.items()}


@pytest.mark.parametrize("spec", specs(), ids=lambda spec: spec.name)
def test_matmuls_take_the_formats_buffers(spec):
    assert signature(instantiate(spec)) == signature(sketch(spec))


@pytest.mark.parametrize("spec", specs(), ids=lambda spec: spec.name)
def test_every_decision_gives_a_kernel_within_the_machines_limits(spec):
    for decision in space(spec):
        assert decision.default in decision.choices
        for value in decision.choices:
            instantiate(spec, {decision.name: value})


def test_a_wide_matrix_takes_fewer_tokens_at_a_time():
    """x of 17408 columns as float32: two tokens fill shared memory, eight never fit."""
    tiles = {d.name: d for d in space(KernelSpec(CHOICES[4], 5120, 17408, 8, "bfloat16", "bfloat16", "sm_90a"))}
    assert tiles["tile"].choices == (1, 2) and tiles["tile"].default == 2


def test_every_kernel_becomes_machine_code_without_spills(tmp_path, capfd, monkeypatch):
    try:
        cuda_toolkit.find_toolkit()
    except Refusal as missing:
        pytest.skip(str(missing))
    functions = {spec.name: instantiate(spec) for spec in specs()} | cases.operations(TINY, ModelOps("cuda"))
    mod = tvm.IRModule({name: f.with_attr("global_symbol", name) for name, f in functions.items()})
    monkeypatch.setenv("TVM_SPARSE_DEBUG", "4")
    monkeypatch.chdir(tmp_path)
    found = cuda.build_cuda_library(mod, tmp_path / "lib.so", [MACHINES["b200"], MACHINES["h200"]])
    wanted = sorted(f"{name}_kernel" for name in functions)
    assert found == {"sm_100a": wanted, "sm_90a": wanted}
    report = capfd.readouterr().out
    assert max(int(spilled) for spilled in re.findall(r"(\d+) bytes spill", report)) <= 8
    assert "atomic" not in Path("kernels.cu").read_text().partition("extern")[2]


SHIM = """
#include <cmath>
#include <cstring>
#define __device__
#define __forceinline__ inline
struct uint4 { unsigned x, y, z, w; };
struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
static unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((unsigned long long)a * b >> 32); }
static float __uint_as_float(unsigned u) { float f; memcpy(&f, &u, 4); return f; }
"""


@pytest.fixture(scope="module")
def chunk_code(tmp_path_factory):
    """The device code that decodes a lane's 8 words, compiled for this machine, for every split and tile."""
    folder = tmp_path_factory.mktemp("chunk")
    written = SHIM
    for gap_bits in (3, 4, 5, 6):
        for tile in (1, 2, 4, 8):
            name, source = matmul_delta.chunk_code(gap_bits, tile)
            written += source + (
                f'extern "C" void run_{gap_bits}_{tile}(const uint4* w, const float* x, int* at, float* sum)'
                f" {{ {name}(*w, x, at, sum); }}\n"
            )
    (folder / "chunk.cc").write_text(written)
    compiler = cuda_stub.c_compiler()
    asked = [compiler, "-x", "c++", "-O1", "-shared", "-fPIC", "-o", folder / "chunk.so", folder / "chunk.cc"]
    subprocess.run(asked, check=True)
    return ctypes.CDLL(str(folder / "chunk.so"))


@settings(max_examples=60, deadline=None)
@given(gap_bits=st.sampled_from((3, 4, 5, 6)), tile=st.sampled_from((1, 2, 4, 8)), seed=st.integers(0, 2**32 - 1))
def test_a_chunk_decodes_as_the_format_says(chunk_code, gap_bits, tile, seed):
    """Sign, gap - 1, exponent code, mantissa: float(code, mantissa) as placed, at the column the gaps add up to."""
    random = np.random.default_rng(seed)
    gap, code = random.integers(0, 1 << gap_bits, 8), random.integers(0, 1 << (8 - gap_bits), 8)
    mantissa = np.where(code, random.integers(0, 128, 8), 0)
    sign = random.integers(0, 2, 8)
    words = (sign << 15 | gap << (15 - gap_bits) | code << 7 | mantissa).astype(np.uint16)
    before = int(random.integers(-1, 40))
    columns = before + np.cumsum(gap + 1)
    x = (random.standard_normal((columns[-1] + 1, tile)) * 2.0**96).astype(np.float32)
    values = np.where(sign, -1.0, 1.0) * np.where(code, np.exp2(code - 127.0) * (1 + mantissa / 128), 0.0)
    sums, at = np.zeros(tile, np.float32), ctypes.c_int(4 * tile * (before + 1))

    def pointer(array):
        return array.ctypes.data_as(ctypes.c_void_p)

    getattr(chunk_code, f"run_{gap_bits}_{tile}")(pointer(words), pointer(x), ctypes.byref(at), pointer(sums))
    assert at.value == 4 * tile * (columns[-1] + 1)
    # Eight roundings of float32, each of at most 2^-24 of what was added so far: terms may cancel.
    wide = x[columns].astype(np.float64)
    assert (np.abs(sums - values @ wide) <= 1e-6 * (np.abs(values) @ np.abs(wide))).all()
