"""The delta kernel of a GPU, run on this machine: the result of every split, tile and dtype against float64."""

import contextlib
import ctypes

import pytest
import torch
import tvm
from emulated_gpu import compile_kernel
from packed_products import close, matrix

from tvm_sparse.codegen import cuda
from tvm_sparse.formats import FORMATS, pack
from tvm_sparse.passes.verify_schedules import shared_bytes
from tvm_sparse.schedules.spec import KernelSpec
from tvm_sparse.schedules.table import instantiate, space
from tvm_sparse.targets import MACHINES

DELTA = FORMATS["delta"]
# gap bits, bins, warps, classes, unit; N, K; tokens, declared tokens; dtypes of x and y; decisions
CASES = {
    "eight-classes": ((4, 3, 2, 8, 4), (100, 72), 1, 1, "bfloat16", "float32", {}),
    "four-classes": ((5, 2, 4, 4, 4), (70, 300), 1, 1, "bfloat16", "bfloat16", {"depth": 2}),
    "sixteen-classes": ((3, 7, 1, 16, 8), (33, 40), 1, 1, "bfloat16", "float32", {"overlap": 0}),
    "a-lane-a-class": ((6, 3, 3, 32, 4), (257, 1000), 1, 1, "bfloat16", "float32", {"depth": 6}),
    "one-class": ((4, 3, 2, 1, 8), (100, 72), 1, 1, "bfloat16", "float32", {"depth": 8}),
    "odd-columns": ((4, 4, 2, 2, 4), (100, 17), 1, 1, "bfloat16", "float32", {}),
    "float32": ((4, 1, 2, 8, 8), (20, 200), 1, 1, "float32", "float32", {"depth": 3}),
    "three-tokens": ((4, 3, 2, 8, 4), (90, 128), 3, 3, "bfloat16", "float32", {}),
    "two-tokens": ((5, 3, 2, 4, 4), (90, 128), 2, 2, "bfloat16", "float32", {}),
    "wide-columns": ((6, 2, 3, 32, 8), (40, 200), 3, 3, "float32", "float32", {}),
    "many-tokens": ((4, 2, 3, 16, 4), (65, 96), 11, None, "bfloat16", "bfloat16", {}),
    "full-bin": ((4, 1, 2, 1, 8), (34, 8), 1, 1, "bfloat16", "float32", {}),
    "fourteen-bits": ((4, 3, 2, 8, 9), (100, 72), 1, 1, "bfloat16", "float32", {}),
    "fourteen-bits-two-tokens": ((3, 2, 4, 4, 9), (70, 300), 2, 2, "bfloat16", "bfloat16", {"depth": 2}),
    "few-words": ((4, 5, 8, 8, 4), (9, 8), 2, None, "float32", "float32", {}),
}
# the same, and what is fused: norm, after
FUSED = {
    "gate": ((4, 3, 2, 8, 4, 1), (100, 72), "bfloat16", False, "silu_mul"),
    "gate-of-full-classes": ((6, 2, 3, 32, 4, 1), (90, 1000), "float32", False, "silu_mul"),
    "normed-gate": ((4, 5, 3, 4, 4, 1), (130, 1040), "float32", True, "silu_mul"),
    "normed": ((5, 4, 2, 16, 4), (70, 304), "float32", True, ""),
    "residual": ((4, 3, 2, 8, 4), (257, 100), "bfloat16", False, "add"),
    "normed-residual": ((4, 2, 1, 2, 8), (66, 64), "float32", True, "add"),
}


def full_bin(n: int, k: int) -> torch.Tensor:
    """32 rows of one chunk each, which fill a warp's step to the last lane, beside rows without any."""
    weight = torch.zeros(n, k)
    weight[1:33] = torch.randn(32, k, generator=torch.Generator().manual_seed(0))
    return weight.bfloat16()


def emulated(spec: KernelSpec, decisions: dict, folder, monkeypatch):
    """The kernel as a function (weight, {"x": x, more inputs by name}) -> y."""
    function = instantiate(spec, decisions)
    sources: list[str] = []
    monkeypatch.setattr(cuda, "compile_source", lambda toolkit, source, arches: sources.append(source) or 1 / 0)
    with contextlib.suppress(Exception):
        mod = tvm.IRModule({"kernel": function.with_attr("global_symbol", "kernel")})
        cuda.build_cuda_library(mod, folder / "none.so", [MACHINES["h200"]])
    names, run = compile_kernel(sources[0], "kernel", folder)

    def call(weight: torch.Tensor, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        tokens = len(inputs["x"])
        y = torch.full((tokens, spec.out_features), float("nan"), dtype=getattr(torch, spec.out_dtype))
        packed = pack(weight, spec.choice)
        tensors = {**inputs, "y": y, **packed.buffers}
        sizes = {"steps": packed.buffers["words"].shape[1], "n": tokens}
        held = {name: ctypes.c_int64(sizes[name]) for name in names if name not in tensors}
        at = [tensors[name].data_ptr() if name in tensors else ctypes.addressof(held[name]) for name in names]
        tile = decisions.get("tile") or next(t for t in (1, 2, 4, 8) if t >= (spec.m or 8))
        run(at, (spec.choice.option("bins"), -(-tokens // tile)), 32 * spec.choice.option("warps"))
        return y

    return call


@pytest.mark.usefixtures("toolkit")
@pytest.mark.parametrize("case", FUSED)
def test_what_is_fused_equals_float64(case, tmp_path, monkeypatch):
    cut, (n, k), out_dtype, normed, after = FUSED[case]
    eps = 1e-6 if normed else 0.0
    spec = KernelSpec(DELTA.choice(*cut), n, k, 1, "bfloat16", out_dtype, "sm_90a", eps, after)
    generator = torch.Generator().manual_seed(1)
    dtype = getattr(torch, out_dtype)
    inputs = {"x": torch.randn(1, k, generator=generator).bfloat16(), "norm": torch.randn(k, generator=generator)}
    inputs["residual"] = torch.randn(1, n, generator=generator).to(dtype)
    weight = matrix(n, k)
    y = emulated(spec, {}, tmp_path, monkeypatch)(weight, inputs)

    x = inputs["x"].double()
    if normed:
        x = x * torch.rsqrt(x.square().mean() + eps) * inputs["norm"].double()
    want, allowed = x @ weight.double().T, (x.abs() @ weight.double().abs().T) * 2**-19
    want = want.to(dtype).double()
    rounding = 2**-8 if out_dtype == "bfloat16" else 2**-20
    if after == "add":
        want = want + inputs["residual"].double()
    if after == "silu_mul":
        (gate, up), (off, more) = want.chunk(2, 1), allowed.chunk(2, 1)
        want = torch.nn.functional.silu(gate) * up
        allowed = 2 * (off + rounding * gate.abs()) * up.abs() + 2 * (more + rounding * up.abs()) * gate.abs()
    allowed = allowed + 2 * rounding * want.abs() + (rounding if after else 0) * (x @ weight.double().T).abs().max()
    assert bool(((y.double() - want).abs() <= allowed).all())


@pytest.mark.usefixtures("toolkit")
@pytest.mark.parametrize("case", CASES)
def test_the_kernel_equals_float64(case, tmp_path, monkeypatch):
    cut, (n, k), tokens, declared, x_dtype, out_dtype, decisions = CASES[case]
    spec = KernelSpec(DELTA.choice(*cut), n, k, declared, x_dtype, out_dtype, "sm_90a")
    run = emulated(spec, decisions, tmp_path, monkeypatch)
    weight = full_bin(n, k) if case == "full-bin" else matrix(n, k)
    x = torch.randn(tokens, k, generator=torch.Generator().manual_seed(1)).to(getattr(torch, x_dtype))
    y = run(weight, {"x": x})
    assert close(y, x, weight)


@pytest.mark.parametrize("m", [1, 2, 8, None])
def test_the_many_rows_of_a_bin_of_lm_head_leave_room_for_their_tables(m):
    spec = KernelSpec(FORMATS["delta"].choice(6), 248320, 5120, m, "bfloat16", "float32", "sm_90a")
    tile = next(decision for decision in space(spec) if decision.name == "tile")
    for tokens in tile.choices:
        assert shared_bytes(instantiate(spec, {"tile": tokens})) <= 227 << 10
