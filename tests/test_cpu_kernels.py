"""Every CPU kernel against float64: each format, each instruction set, ragged shapes, poisoned outputs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import tvm_ffi
from packed_products import close

from tvm_sparse.codegen.cpu import compile_kernels
from tvm_sparse.formats import FORMATS, FormatChoice, pack
from tvm_sparse.schedules.spec import CPU_ISAS, KernelSpec
from tvm_sparse.schedules.table import instantiate, space, write_decisions

NEEDS = {"avx512": {"avx512_vbmi2", "avx512_bf16", "avx512vl"}, "avx2": {"avx2", "fma", "bmi2"}, "x86-64": set()}
CHOICES = {
    "dense": FORMATS["dense"].choice(),
    "dense-f32": FORMATS["dense"].choice(width=32),
    "bitmap": FORMATS["bitmap"].choice(),
    "delta": FORMATS["delta"].choice(gap_bits=4, classes=1, unit=8),
    "delta-5": FORMATS["delta"].choice(gap_bits=5, bins=3, warps=1, classes=1, unit=8),
    "2:4": FORMATS["2:4"].choice(),
    "block": FORMATS["block"].choice(rows=4, cols=16),
    "block-odd": FORMATS["block"].choice(rows=3, cols=5),
}
# N, K, tokens, symbolic tokens, dtype of x, dtype of y
CASES = {
    "one-token": (70, 320, 1, False, "bfloat16", "float32"),
    "eight-tokens": (33, 96, 8, False, "bfloat16", "bfloat16"),
    "ragged": (45, 77, 3, False, "bfloat16", "float32"),
    "symbolic": (67, 200, 11, True, "float32", "float32"),
    "one-column": (5, 1, 2, True, "float32", "bfloat16"),
}


@pytest.fixture(params=CPU_ISAS)
def isa(request) -> str:
    flags = Path("/proc/cpuinfo").read_text()
    if not all(flag in flags for flag in NEEDS[request.param]):
        pytest.skip(f"this machine has no {request.param}")
    return request.param


def matrix(n: int, k: int, choice: FormatChoice) -> torch.Tensor:
    """Zeros as the format wants them; a dense row beside an empty one, and values outside the delta window."""
    generator = torch.Generator().manual_seed(n * k)
    weight = torch.randn(n, k, generator=generator)
    if choice.name == "2:4":
        padded = torch.nn.functional.pad(weight, (0, -k % 4)).view(n, -1, 4)
        keep = torch.rand(padded.shape, generator=generator).argsort(-1) < 2
        return (padded * keep).view(n, -1)[:, :k].bfloat16().contiguous()
    if choice.name == "block":
        r, c = choice.option("rows"), choice.option("cols")
        blocks = torch.rand(-(-n // r), -(-k // c), generator=generator) < 0.4
        return (weight * blocks.repeat_interleave(r, 0).repeat_interleave(c, 1)[:n, :k]).bfloat16()
    if choice.name != "dense":
        weight *= torch.rand(n, k, generator=generator) < 0.3
        weight[0], weight[1], weight[2, ::2] = 0, 1, weight[2, ::2] * 1e-20
    return weight if choice.options and choice.name == "dense" else weight.bfloat16()


def run(spec: KernelSpec, weight: torch.Tensor, x: torch.Tensor, decisions: dict | None = None) -> torch.Tensor:
    kernel = write_decisions(instantiate(spec), {spec.arch: decisions} if decisions else {})
    function = compile_kernels({"kernel": kernel}, spec.arch)["kernel"]
    y = torch.full((x.shape[0], spec.n), float("nan"), dtype=getattr(torch, spec.out_dtype))
    function(*(tvm_ffi.from_dlpack(t) for t in (x, *pack(weight, spec.choice).buffers.values(), y)))
    return y


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", CHOICES)
def test_kernel_equals_float64(name, case, isa):
    n, k, tokens, symbolic, x_dtype, out_dtype = CASES[case]
    choice, weight = CHOICES[name], matrix(n, k, CHOICES[name])
    x = torch.randn(tokens, k, generator=torch.Generator().manual_seed(1)).to(getattr(torch, x_dtype))
    spec = KernelSpec(choice, n, k, None if symbolic else tokens, x_dtype, out_dtype, isa)
    assert close(run(spec, weight, x), x, weight)


@pytest.mark.parametrize("name", ["dense", "bitmap", "2:4"])
def test_every_decision_of_the_row_template_gives_a_right_kernel(name):
    spec = KernelSpec(CHOICES[name], 37, 330, 7, "bfloat16", "float32", "x86-64")
    weight, x = matrix(37, 330, spec.choice), torch.randn(7, 330).bfloat16()
    for decision in space(spec):
        for value in {decision.choices[0], decision.choices[-1]}:
            assert close(run(spec, weight, x, {decision.name: value}), x, weight), (decision.name, value)


@pytest.mark.parametrize("name", ["bitmap", "delta", "block"])
def test_results_do_not_depend_on_the_number_of_threads_nor_on_other_tokens(name):
    threads = tvm_ffi.get_global_func("runtime.config_threadpool")
    spec = KernelSpec(CHOICES[name], 200, 320, None, "float32", "float32", "x86-64")
    weight, x = matrix(200, 320, spec.choice), torch.randn(8, 320)
    threads(1, 1)
    alone = run(spec, weight, x)
    threads(1, 2)
    assert torch.equal(run(spec, weight, x), alone)
    other = torch.cat([x[:4], torch.full((4, 320), float("nan"))])
    assert torch.equal(run(spec, weight, other)[:4], alone[:4])


@pytest.mark.parametrize("k", [640, 359])
def test_bitmap_rows_of_few_values_beside_rows_of_many(isa, k):
    """Where 64 columns hold more than 16 values in a row of few, where none, and at the row's ragged end."""
    generator = torch.Generator().manual_seed(k)
    weight = torch.randn(40, k, generator=generator) * (torch.rand(40, k, generator=generator) < 0.1)
    weight[3, 64:128], weight[4, 0:16], weight[5, 63:80] = 1, 2, 3
    weight[6], weight[7], weight[8, 128:192] = 0, torch.randn(k, generator=generator), 0
    weight, x = weight.bfloat16(), torch.randn(1, k, generator=generator).bfloat16()
    spec = KernelSpec(CHOICES["bitmap"], 40, k, 1, "bfloat16", "float32", isa)
    assert close(run(spec, weight, x), x, weight)
