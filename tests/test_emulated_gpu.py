"""The delta kernel of a GPU, run on this machine: the result of every split, tile and dtype against float64."""

import contextlib
import ctypes

import pytest
import torch
import tvm
from emulated_gpu import compile_kernel

from tvm_sparse.codegen import cuda, cuda_toolkit
from tvm_sparse.errors import Refusal
from tvm_sparse.formats import FORMATS, pack
from tvm_sparse.schedules.spec import KernelSpec
from tvm_sparse.schedules.table import instantiate
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
    "fourteen-bits-in-threes": ((3, 2, 4, 4, 3), (70, 300), 2, 2, "bfloat16", "bfloat16", {"depth": 2}),
    "few-words": ((4, 5, 8, 8, 4), (9, 8), 2, None, "float32", "float32", {}),
}


def matrix(n: int, k: int) -> torch.Tensor:
    """A full row beside empty ones, rows of very different density, values outside the window."""
    generator = torch.Generator().manual_seed(n * k)
    weight = torch.randn(n, k, generator=generator) * 0.02
    weight *= torch.rand(n, k, generator=generator) < torch.rand(n, 1, generator=generator) * 0.6
    weight[0], weight[n // 3], weight[n // 2] = 0, 0, torch.randn(k, generator=generator)
    weight.view(-1)[:: n * k // 5 + 1] = 1e-20
    return weight.bfloat16()


def full_bin(n: int, k: int) -> torch.Tensor:
    """32 rows of one chunk each, which fill a warp's step to the last lane, beside rows without any."""
    weight = torch.zeros(n, k)
    weight[1:33] = torch.randn(32, k, generator=torch.Generator().manual_seed(0))
    return weight.bfloat16()


@pytest.mark.parametrize("case", CASES)
def test_the_kernel_equals_float64(case, tmp_path, monkeypatch):
    try:
        cuda_toolkit.find_toolkit()
    except Refusal as missing:
        pytest.skip(str(missing))
    cut, (n, k), tokens, declared, x_dtype, out_dtype, decisions = CASES[case]
    spec = KernelSpec(DELTA.choice(*cut), n, k, declared, x_dtype, out_dtype, "sm_90a")
    function = instantiate(spec, decisions)
    sources: list[str] = []
    monkeypatch.setattr(cuda, "compile_source", lambda toolkit, source, arches: sources.append(source) or 1 / 0)
    with contextlib.suppress(Exception):
        mod = tvm.IRModule({"kernel": function.with_attr("global_symbol", "kernel")})
        cuda.build_cuda_library(mod, tmp_path / "none.so", [MACHINES["h200"]])
    names, run = compile_kernel(sources[0], "kernel", tmp_path)

    weight = full_bin(n, k) if case == "full-bin" else matrix(n, k)
    x = torch.randn(tokens, k, generator=torch.Generator().manual_seed(1)).to(getattr(torch, x_dtype))
    y = torch.full((tokens, n), float("nan"), dtype=getattr(torch, out_dtype))
    packed = pack(weight, spec.choice)
    tensors = {"x": x, "y": y, **packed.buffers}
    sizes = {"steps": packed.buffers["words"].shape[1], "n": tokens}
    held = {name: ctypes.c_int64(sizes[name]) for name in names if name not in tensors}
    at = [tensors[name].data_ptr() if name in tensors else ctypes.addressof(held[name]) for name in names]
    tile = decisions.get("tile") or next(t for t in (1, 2, 4, 8) if t >= (declared or 8))
    run(at, (cut[1], -(-tokens // tile)), 32 * cut[2])

    want = x.double() @ weight.double().T
    rounding = 2**-8 if out_dtype == "bfloat16" else 2**-23
    allowed = want.abs() * rounding + (x.double().abs() @ weight.double().abs().T) * 2**-20
    assert bool(((y.double() - want).abs() <= allowed).all())
