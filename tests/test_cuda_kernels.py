"""CUDA kernels without a GPU: they take what their CPU counterparts take, and compile for every machine.

That they compute the right thing is checked on a GPU by the scripts in tests/gpu.
"""

import re
import sys
from pathlib import Path

import pytest
import tvm

from tvm_sparse.codegen import cuda
from tvm_sparse.formats import FORMATS
from tvm_sparse.schedules.cuda import matmul_mma
from tvm_sparse.schedules.ops import ModelOps
from tvm_sparse.schedules.product import decoder_name
from tvm_sparse.schedules.space import sketch
from tvm_sparse.schedules.spec import KernelSpec
from tvm_sparse.schedules.table import DECODERS, decoder, instantiate, space
from tvm_sparse.targets import MACHINES

sys.path.insert(0, str(Path(__file__).parent / "gpu"))
import cases

TINY = next(shape for shape in cases.SHAPES if shape.name == "tiny")
CHOICES = [
    FORMATS["dense"].choice(),
    FORMATS["bitmap"].choice(),
    FORMATS["2:4"].choice(),
    FORMATS["block"].choice(4, 8),
    FORMATS["delta"].choice(),
    FORMATS["delta"].choice(5, 3, 2, 32, 8),
    FORMATS["tiles"].choice(),
    FORMATS["tiles"].choice(5, 3, 2, 3, 6),
    FORMATS["gather"].choice(),
    FORMATS["gather"].choice(5, 3, 16, 4, 2),
]


def specs():
    for choice in CHOICES:
        for m in (1, 3, None):
            yield KernelSpec(choice, 100, 72, m, "bfloat16", "float32", "sm_90a")
    yield KernelSpec(FORMATS["delta"].choice(pairs=1), 100, 72, 1, "bfloat16", "float32", "sm_90a", 1e-6, "silu_mul")
    yield KernelSpec(FORMATS["delta"].choice(), 100, 72, 1, "bfloat16", "float32", "sm_90a", 0.0, "add")


def signature(function: tvm.tirx.PrimFunc) -> list[tuple[str, ...]]:
    """Shapes and dtypes of the arguments; symbolic dimensions by their order of appearance."""
    seen: dict[tvm.tirx.Var, str] = {}

    def spelled(dim) -> str:
        return str(int(dim)) if isinstance(dim, tvm.tirx.IntImm) else seen.setdefault(dim, f"dim{len(seen)}")

    return [(str(p.ty.dtype), *map(spelled, p.ty.shape)) for p in function.params]


def test_operations_take_what_the_cpu_takes():
    on_gpu, on_cpu = (cases.operations(TINY, ModelOps(device)) for device in ("cuda", "cpu"))
    assert all(signature(function) == signature(on_gpu[name]) for name, function in on_cpu.items())


def test_the_gpu_scripts_know_the_shares_of_a_context():
    for s in cases.SHAPES:
        found = ModelOps("cuda").attention_shares(s.batch, s.heads, s.kv_heads, s.head_dim, s.rotary_dim, s.dtype)
        assert found == s.shares


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


def test_every_kernel_becomes_machine_code_without_spills(toolkit, tmp_path, capfd, monkeypatch):
    functions = {spec.name: instantiate(spec) for spec in specs()}
    functions |= {decoder_name(spec): decoder(spec) for spec in specs() if spec.choice.name in DECODERS}
    for tile in range(len(matmul_mma.TILES)):
        many = KernelSpec(CHOICES[0], 96, 72, None, "bfloat16", "bfloat16", "sm_90a")
        functions[f"many_{tile}"] = instantiate(many, {"tile": tile})
    functions |= cases.operations(TINY, ModelOps("cuda"))
    whole = cases.operations(next(shape for shape in cases.SHAPES if shape.name == "one"), ModelOps("cuda"))
    functions |= {name: f for name, f in whole.items() if "attention" in name or "delta" in name}
    mod = tvm.IRModule({name: f.with_attr("global_symbol", name) for name, f in functions.items()})
    monkeypatch.setenv("TVM_SPARSE_DEBUG", "4")
    monkeypatch.chdir(tmp_path)
    found = cuda.build_cuda_library(mod, tmp_path / "lib.so", [MACHINES["b200"], MACHINES["h200"]])
    kernels = {arch: sorted({re.sub(r"_kernel(_\d+)?$", "", name) for name in names}) for arch, names in found.items()}
    assert kernels == {"sm_100a": sorted(functions), "sm_90a": sorted(functions)}
    report = capfd.readouterr().out
    told = re.findall(
        r"entry function '(\w+)' for '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads", report, re.DOTALL
    )
    assert len(told) == len(found["sm_90a"]) + len(found["sm_100a"])
    spilled = {(name, arch): (int(stores), int(loads)) for name, arch, stores, loads in told}
    assert {kernel: bytes for kernel, bytes in spilled.items() if max(bytes) > 8} == {}
    assert "atomic" not in Path("kernels.cu").read_text().partition("extern")[2]
