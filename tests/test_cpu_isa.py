"""One library, three instruction sets: every kernel is there three times and the environment chooses."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path

import pytest
import torch
import tvm
import tvm_ffi
from test_cpu_kernels import NEEDS, matrix

from tvm_sparse.codegen.cpu import build_cpu_library, compile_kernels
from tvm_sparse.formats import FORMATS, pack
from tvm_sparse.schedules.spec import CPU_ISAS, KernelSpec
from tvm_sparse.schedules.table import instantiate

SPEC = KernelSpec(FORMATS["bitmap"].choice(), 40, 96, 2, "bfloat16", "float32", "x86-64")


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    path = tmp_path_factory.mktemp("isa") / "lib.so"
    build_cpu_library(tvm.IRModule({"kernel": instantiate(SPEC)}), path)
    return path


def load(library, folder, monkeypatch, forced: str):
    """A copy, because a library chooses once, when it is loaded."""
    copy = folder / f"{forced}.so"
    shutil.copy(library, copy)
    monkeypatch.setenv("TVM_SPARSE_ISA", forced)
    loaded = tvm_ffi.load_module(str(copy))
    chosen = loaded.get_function("tvm_sparse_isa", query_imports=True)()
    return loaded.get_function("kernel", query_imports=True), CPU_ISAS[chosen]


@pytest.mark.parametrize("isa", CPU_ISAS)
def test_the_environment_forces_an_instruction_set(library, tmp_path, monkeypatch, isa):
    flags = Path("/proc/cpuinfo").read_text()
    if not all(flag in flags for flag in NEEDS[isa]):
        pytest.skip(f"this machine has no {isa}")
    kernel, chosen = load(library, tmp_path, monkeypatch, isa)
    assert chosen == isa
    weight, x = matrix(40, 96, SPEC.choice), torch.randn(2, 96).bfloat16()
    y = torch.full((2, 40), float("nan"))
    kernel(*(tvm_ffi.from_dlpack(t) for t in (x, *pack(weight, SPEC.choice).buffers.values(), y)))
    torch.testing.assert_close(y, x.float() @ weight.float().T, rtol=1e-5, atol=1e-5)


def test_a_name_it_does_not_have_is_said_and_the_best_taken(library, tmp_path, monkeypatch, capfd):
    _, best = load(library, tmp_path, monkeypatch, "")
    _, chosen = load(library, tmp_path, monkeypatch, "mmx")
    assert chosen == best
    assert "TVM_SPARSE_ISA=mmx" in capfd.readouterr().err


def test_each_version_is_written_in_its_own_instructions():
    def assembly(isa):
        return compile_kernels({"kernel": instantiate(SPEC)}, isa).inspect_source("asm")

    wide, middle, plain = (assembly(isa) for isa in CPU_ISAS)
    assert "vpexpandw" in wide and "vdpbf16ps" in wide
    assert "vpshufb" in middle and "vfmadd" in middle and "zmm" not in middle
    assert "ymm" not in plain and "popcnt" not in plain


def test_an_object_for_arm_can_be_emitted(tmp_path):
    """Inspected only: it has never run."""
    module = compile_kernels({"kernel": instantiate(SPEC)}, "aarch64")
    assert "fmla" in module.inspect_source("asm")
    path = tmp_path / "kernel.o"
    module.write_to_file(str(path))
    assert struct.unpack_from("<H", path.read_bytes(), 18)[0] == 183  # e_machine: EM_AARCH64
