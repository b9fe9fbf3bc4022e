"""Products of many tokens on a GPU, on a machine without one: decoders and the tensor core kernel, emulated."""

from dataclasses import replace

import pytest
import torch
import tvm
from emulated_tensor_cores import Kernels

from tvm_sparse.codegen import cuda
from tvm_sparse.formats import FORMATS, FormatChoice, pack
from tvm_sparse.passes.verify_schedules import shared_bytes
from tvm_sparse.schedules.cuda import decode_delta, matmul_mma
from tvm_sparse.schedules.product import dense_spec, product, write_products
from tvm_sparse.schedules.spec import KernelSpec
from tvm_sparse.schedules.table import DECODERS, decoder, instantiate
from tvm_sparse.targets import MACHINES

pytestmark = pytest.mark.usefixtures("toolkit")
DENSE = FORMATS["dense"].choice()


# tile, stages, tokens, declared tokens, n, k, dtype of y
CASES = {
    "few": (0, 3, 5, 5, 40, 72, "bfloat16"),
    "deep": (0, 2, 17, None, 33, 1096, "float32"),
    "wide-deep": (2, 2, 33, None, 72, 328, "bfloat16"),
    "panels-of-two": (3, 4, 70, None, 136, 200, "float32"),
    "many": (4, 3, 130, None, 264, 72, "bfloat16"),
    "many-ragged": (4, 4, 140, None, 268, 328, "float32"),
}


@pytest.mark.parametrize(
    "case, warpgroup", [*((case, False) for case in CASES), *((case, True) for case in CASES if CASES[case][0] > 3)]
)
def test_the_tensor_core_kernel_equals_float64(case, warpgroup, tmp_path):
    tile, stages, tokens, declared, n, k, dtype = CASES[case]
    spec = KernelSpec(DENSE, n, k, declared, "bfloat16", dtype, "sm_90a")
    kernels = Kernels(instantiate(spec, {"tile": tile, "stages": stages}), "product", tmp_path, warpgroup)
    generator = torch.Generator().manual_seed(k)
    x, w = (torch.randn(rows, k, generator=generator).bfloat16() for rows in (tokens, n))
    y = torch.full((tokens + 1, n), float("nan"), dtype=getattr(torch, dtype))
    tokens_each, features_each, across, down, deep = matmul_mma.TILES[tile]
    grid = (-(-tokens // (tokens_each * across)), -(-n // (features_each * down)))
    values = {"x": x, "weight": w, "y": y, "m": tokens, "n": tokens}
    kernels.run("product_kernel", grid, 32 * across * down * deep, values)
    assert bool(y[tokens:].isnan().all())
    want = x.double() @ w.double().T
    rounding = 2**-8 if dtype == "bfloat16" else 2**-20
    allowed = want.abs() * rounding + (x.double().abs() @ w.double().abs().T) * 2**-20
    assert bool(((y[:tokens].double() - want).abs() <= allowed).all())


def matrix(case: str, choice: FormatChoice, n: int, k: int) -> torch.Tensor:
    """Random with zeros; an empty row, and a full one where the format holds it."""
    generator = torch.Generator().manual_seed(n + k)
    weight = torch.randn(n, k, generator=generator)
    if choice.name == "2:4":
        weight *= torch.rand(n, k // 4, 4, generator=generator).argsort(2).view(n, k) < 2
    elif choice.name == "block":
        rows, cols = choice.option("rows"), choice.option("cols")
        kept = torch.rand(-(-n // rows), -(-k // cols), generator=generator) < 0.4
        weight *= kept.repeat_interleave(rows, 0).repeat_interleave(cols, 1)[:n, :k]
    else:
        weight *= torch.rand(n, k, generator=generator) < 0.4
        if case == "delta-full-columns":  # one class has nearly all values, and streams that begin at other rows
            weight[:, torch.arange(k) % 8 > 0] = 0
        weight[n // 2] = 1.5
        weight.view(-1)[:: n * k // 5 + 1] = 1e-20  # outside the delta stream's window
    weight[0] = 0
    return weight.bfloat16()


# What else the decoder of the delta stream takes from PTX; who waits lets the others go on.
SHIM = r"""
#define TVMS_DECODE_DELTA_PTX
static unsigned __dp4a(unsigned a, unsigned b, unsigned c) {
  for (int byte = 0; byte < 32; byte += 8) c += (a >> byte & 255) * (b >> byte & 255);
  return c;
}
static Barrier teams[16];
static void tvms_meet(int team, int threads) { meet(teams[team], threads); }
static void tvms_pause() { swapcontext(&fibers[running], &scheduler); }
static unsigned __ballot_sync(unsigned, bool value) {
  unsigned word = value, all = 0;
  const Scratch& left = exchange(&word, 1);
  for (int lane = 0; lane < 32; ++lane) all |= left.words[lane][0] << lane;
  return all;
}
static void __stcs(uint4* to, uint4 v) { *to = v; }
"""
# choice, n, k, grid
DECODED = {
    "bitmap": (FORMATS["bitmap"].choice(), 21, 72, (3, 1)),
    "bitmap-long": (FORMATS["bitmap"].choice(), 5, 1096, (1, 1)),
    "delta": (FORMATS["delta"].choice(4, 3, 2, 8, 4), 100, 72, (3, 1)),
    "delta-a-lane-a-class": (FORMATS["delta"].choice(6, 3, 3, 32, 4), 57, 1000, (3, 1)),
    "delta-one-class": (FORMATS["delta"].choice(3, 5, 2, 1, 8), 33, 40, (5, 1)),
    "delta-fourteen-bits": (FORMATS["delta"].choice(4, 3, 2, 4, 9), 70, 104, (3, 1)),
    "delta-runs-over-two-streams": (FORMATS["delta"].choice(4, 1, 2, 4, 4), 30, 1200, (1, 1)),
    "delta-fewer-steps-than-warps": (FORMATS["delta"].choice(4, 3, 8, 8, 9), 9, 200, (3, 1)),
    "delta-full-columns": (FORMATS["delta"].choice(4, 1, 8, 8, 4), 100, 200, (1, 1)),
    "delta-teams-of-four-warps": (FORMATS["delta"].choice(6, 1, 3, 32, 4), 8, 16000, (1, 1)),
    "2to4": (FORMATS["2:4"].choice(), 37, 72, (2, 1)),
    "block": (FORMATS["block"].choice(4, 8), 21, 72, (6, 1)),
    "block-parts": (FORMATS["block"].choice(16, 16), 21, 1000, (2, 2)),
    "block-odd": (FORMATS["block"].choice(3, 20), 21, 72, (7, 1)),
}


@pytest.mark.parametrize("case", DECODED)
def test_a_decoder_gives_back_every_bit(case, tmp_path):
    choice, n, k, ctas = DECODED[case]
    spec = KernelSpec(choice, n, k, None, "bfloat16", "bfloat16", "sm_90a")
    kernels = Kernels(decoder(spec), "decode", tmp_path, shim=SHIM)
    weight = matrix(case, choice, n, k)
    buffers = {name: tensor.contiguous() for name, tensor in pack(weight, choice).buffers.items()}
    sizes = {"nv": len(buffers.get("values", ())), "nb": len(buffers.get("blocks", ()))}
    sizes |= {"nr": len(buffers.get("res_col", ())), "steps": buffers["words"].shape[1] if "words" in buffers else 0}
    decoded = torch.full((n + 1, k), -1, dtype=torch.int16)
    threads = decode_delta.cut_of(spec).threads if choice.name == "delta" else 256
    kernels.run("decode_kernel", ctas, threads, {**buffers, **sizes, "w": decoded})
    assert torch.equal(decoded[:n], (weight + 0.0).view(torch.int16))
    assert bool((decoded[n:] == -1).all())


def test_a_library_holds_host_code_and_kernels_for_every_machine(tmp_path):
    many = max(known.most for known in DECODERS.values()) + 1
    specs = [KernelSpec(FORMATS[name].choice(), 72, 64, many, "bfloat16", "float32", "sm_90a") for name in DECODERS]
    products = [product(spec) for spec in specs]
    kernels = {made.decode: decoder(spec) for made, spec in zip(products, specs, strict=True)}
    kernels[products[0].dense] = instantiate(dense_spec(specs[0]))
    mod = tvm.IRModule({name: kernel.with_attr("global_symbol", name) for name, kernel in kernels.items()})
    library = tmp_path / "lib.so"
    found = cuda.build_cuda_library(write_products(mod, products), library, [MACHINES["b200"], MACHINES["h200"]])
    wanted = sorted(f"{name}_kernel" for name in kernels)
    assert found == {"sm_100a": wanted, "sm_90a": wanted}
    held = library.read_bytes()
    assert all(f"__tvm_ffi_{made.symbol}".encode() in held for made in products)
    assert b"libcublasLt.so.13" in held


def test_shared_memory_that_only_device_code_uses_keeps_its_size():
    """TVM shrinks a buffer to what it sees of it, and of a call it sees the address of one element."""
    spec = KernelSpec(DENSE, 264, 72, None, "bfloat16", "bfloat16", "sm_90a")
    kernels = [instantiate(spec)]
    kernels += [decoder(replace(spec, choice=FORMATS[name].choice())) for name in DECODERS]
    passes = [
        tvm.s_tir.transform.PlanAndUpdateBufferAllocationLocation(),
        tvm.s_tir.transform.ConvertBlocksToOpaque(),
        tvm.s_tir.transform.CompactBufferAllocation(),
    ]
    for kernel in kernels:
        compact = tvm.transform.Sequential(passes)(tvm.IRModule({"kernel": kernel}))["kernel"]
        assert shared_bytes(compact) == shared_bytes(kernel)
