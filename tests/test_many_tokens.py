"""Products of many tokens on a GPU, on a machine without one: decoders and the tensor core kernel, emulated."""

import pytest
import torch
from emulated_tensor_cores import Kernels

from tvm_sparse.codegen import cuda_toolkit
from tvm_sparse.errors import Refusal
from tvm_sparse.formats import FORMATS, pack
from tvm_sparse.schedules.cuda import matmul_mma
from tvm_sparse.schedules.spec import KernelSpec
from tvm_sparse.schedules.table import decoder, instantiate

DENSE = FORMATS["dense"].choice()


@pytest.fixture(autouse=True)
def toolkit():
    try:
        cuda_toolkit.find_toolkit()
    except Refusal as missing:
        pytest.skip(str(missing))


# tile, stages, tokens, declared tokens, n, k, dtype of y
CASES = {
    "few": (0, 3, 5, 5, 40, 72, "bfloat16"),
    "deep": (0, 2, 17, None, 33, 1096, "float32"),
    "wide-deep": (2, 2, 33, None, 72, 328, "bfloat16"),
    "panels-of-two": (3, 4, 70, None, 136, 200, "float32"),
    "many": (4, 3, 130, None, 264, 72, "bfloat16"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_tensor_core_kernel_equals_float64(case, tmp_path):
    tile, stages, tokens, declared, n, k, dtype = CASES[case]
    spec = KernelSpec(DENSE, n, k, declared, "bfloat16", dtype, "sm_90a")
    kernels = Kernels(instantiate(spec, {"tile": tile, "stages": stages}), "product", tmp_path)
    generator = torch.Generator().manual_seed(k)
    x, w = (torch.randn(rows, k, generator=generator).bfloat16() for rows in (tokens, n))
    y = torch.full((tokens + 1, n), float("nan"), dtype=getattr(torch, dtype))
    across, down, deep = matmul_mma.TILES[tile][2:]
    wide, high = matmul_mma.TILES[tile][0] * across, matmul_mma.TILES[tile][1] * down
    grid = (-(-tokens // wide), -(-n // high))
    kernels.run("product_kernel", grid, 32 * across * down * deep, {"x": x, "weight": w, "y": y, "m": tokens, "n": tokens})
    assert bool(y[tokens:].isnan().all())
    want = x.double() @ w.double().T
    rounding = 2**-8 if dtype == "bfloat16" else 2**-20
    allowed = want.abs() * rounding + (x.double().abs() @ w.double().abs().T) * 2**-20
    assert bool(((y[:tokens].double() - want).abs() <= allowed).all())
