"""What products do besides, as passes find it: the graph they leave, and that it computes the same numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import tvm
from tvm import relax

from tvm_sparse.formats import FORMATS, FormatChoice
from tvm_sparse.passes.annotate_sparsity import AnnotateSparsity
from tvm_sparse.passes.fuse_gates import FuseGates
from tvm_sparse.passes.fuse_norms import FuseNorms
from tvm_sparse.passes.fuse_residuals import FuseResiduals
from tvm_sparse.passes.kernel_calls import KernelCalls
from tvm_sparse.passes.lower_sparse_matmul import LowerSparseMatmul
from tvm_sparse.plan import keep_dense
from tvm_sparse.schedules.ops import ModelOps
from tvm_sparse.schedules.product import read_products

DELTA, DENSE = FORMATS["delta"].choice(), FORMATS["dense"].choice()
PAIRS = FORMATS["delta"].choice(pairs=1)
EPS, HIDDEN, INNER = 1e-6, 64, 96
SHAPES = {"gate_up": (2 * INNER, HIDDEN), "down": (HIDDEN, INNER), "head": (40, HIDDEN)}
FUSE = [FuseResiduals(), FuseNorms(), FuseGates()]


def graph(tokens: int | None) -> tvm.IRModule:
    """norm, an MLP, the residual sum and norm, a last projection; the sum is a result too."""
    builder, ops = relax.BlockBuilder(), ModelOps("cuda")
    n = tvm.tirx.Var("n", "int64") if tokens is None else tokens
    x = relax.Var("x", relax.TensorType((n, HIDDEN), "bfloat16"))
    norms = [relax.Var(name, relax.TensorType((HIDDEN,), "float32")) for name in ("norm_in", "norm_out")]
    weights = {name: relax.Var(name, relax.TensorType(shape, "bfloat16")) for name, shape in SHAPES.items()}

    def call(function, name, inputs, *shapes):
        types = [relax.TensorType((n, size), "bfloat16") for size in shapes]
        gvar = builder.add_func(function, name)
        return builder.emit(relax.op.call_tir(gvar, relax.Tuple(inputs), types if len(types) > 1 else types[0]))

    def project(y, name):
        return builder.emit(relax.op.matmul(y, builder.emit(relax.op.permute_dims(weights[name]))))

    with builder.function("main", [x, *norms, *weights.values()], {"num_input": 1}):
        with builder.dataflow():
            y = call(ops.rms_norm(tokens, HIDDEN, EPS, "bfloat16"), "rms_norm", [x, norms[0]], HIDDEN)
            gated = call(ops.silu_mul(tokens, INNER, "bfloat16"), "silu_mul", [project(y, "gate_up")], INNER)
            both = call(
                ops.add_rms_norm(tokens, HIDDEN, EPS, "bfloat16"), "add_rms_norm",
                [x, project(gated, "down"), norms[1]], HIDDEN, HIDDEN,
            )  # fmt: skip
            total, y = (builder.emit(relax.TupleGetItem(both, i)) for i in range(2))
            result = builder.emit_output(relax.Tuple([total, project(y, "head")]))
        builder.emit_func_output(result)
    return builder.finalize()


def lowered(tokens: int | None, arch: str = "sm_90a", **choices: FormatChoice) -> tvm.IRModule:
    chosen = {"gate_up": PAIRS, "down": DELTA, "head": DELTA, **choices}
    plan = {
        name: replace(keep_dense(name, SHAPES[name], 1, "a test"), choice=choice) for name, choice in chosen.items()
    }
    return tvm.transform.Sequential([AnnotateSparsity(plan), LowerSparseMatmul(arch)])(graph(tokens))


class Reader(KernelCalls):
    """Reads a lowered function: the calls in order, and in float64 what they compute."""

    def __init__(self, mod: tvm.IRModule):
        super().__init__(mod)
        self.names: list[str] = []

    def run(self, inputs: dict[str, torch.Tensor], matrices: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        function = self.mod["main"]
        known = {param: inputs.get(param.name, param.name) for param in function.params}
        for block in function.body.blocks:
            for binding in block.bindings:
                known[binding.var] = self._value(binding.value, known, matrices)
        return list(known[function.body.body])

    def _value(self, value, known, matrices):
        if isinstance(value, relax.Var):
            return known[value]
        if isinstance(value, relax.Tuple):
            return [known[field] for field in value.fields]
        if isinstance(value, relax.TupleGetItem):
            return known[value.tuple_value][value.index]
        arguments = [known[argument] for argument in value.args[1]]
        if spec := self.spec(value):
            self.names.append("_".join(filter(None, ["product", "norm" if spec.norm_eps else "", spec.after])))
            x = arguments.pop(0)
            if spec.norm_eps:
                x = rms_norm(x, arguments.pop(0), spec.norm_eps)
            residual = arguments.pop() if spec.after == "add" else 0
            (name,) = {buffer.partition(".")[0] for buffer in arguments}
            assert matrices[name].shape == (spec.n, spec.k)
            y = x @ matrices[name].T + residual
            return silu_mul(y) if spec.after == "silu_mul" else y
        name, *static = self.operation(value)
        self.names.append(name)
        if name == "silu_mul":
            return silu_mul(*arguments)
        if name == "rms_norm":
            return rms_norm(*arguments, static[2])
        total = arguments[0] + arguments[1]
        return [total, rms_norm(total, arguments[2], static[2])]


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean() + eps) * weight


def silu_mul(both: torch.Tensor) -> torch.Tensor:
    gate, up = both.chunk(2, 1)
    return torch.nn.functional.silu(gate) * up


def calls(mod: tvm.IRModule) -> list[str]:
    return read(mod)[0]


def read(mod: tvm.IRModule) -> tuple[list[str], list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    inputs = {"x": drawn(1, HIDDEN), "norm_in": drawn(HIDDEN), "norm_out": drawn(HIDDEN)}
    reader = Reader(mod)
    results = reader.run(inputs, {name: drawn(*shape) for name, shape in SHAPES.items()})
    return reader.names, results


PLAIN = ["rms_norm", "product", "silu_mul", "product", "add_rms_norm", "product"]


def test_every_operation_around_the_products_goes_into_one():
    before = lowered(1)
    names, wanted = read(before)
    assert names == PLAIN
    names, found = read(tvm.transform.Sequential(FUSE)(before))
    assert names == ["product_norm_silu_mul", "product_add", "product_norm"]
    for one, other in zip(wanted, found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("fuse", "names"),
    [
        (FuseGates(), ["rms_norm", "product_silu_mul", "product", "add_rms_norm", "product"]),
        (FuseResiduals(), ["rms_norm", "product", "silu_mul", "product_add", "rms_norm", "product"]),
        (FuseNorms(), ["product_norm", "silu_mul", "product", "add_rms_norm", "product"]),
    ],
    ids=["gates", "residuals", "norms"],
)
def test_one_pass_alone(fuse, names):
    before = lowered(1)
    found, results = read(fuse(before))
    assert found == names
    for one, other in zip(read(before)[1], results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_what_no_kernel_does_stays_as_it_is():
    fuse = tvm.transform.Sequential(FUSE)
    assert calls(fuse(lowered(3))) == PLAIN
    assert calls(fuse(lowered(1, gate_up=DENSE, down=DENSE, head=DENSE))) == PLAIN
    assert calls(fuse(lowered(1, gate_up=DELTA))) == ["product_norm", "silu_mul", "product_add", "product_norm"]
    assert calls(fuse(lowered(1, head=DENSE)))[-2:] == ["rms_norm", "product"]
    cpu = FORMATS["bitmap"].choice()
    assert calls(fuse(lowered(1, "x86-64", gate_up=cpu, down=cpu, head=cpu))) == PLAIN
    many = lowered(None)
    after = fuse(many)
    assert read_products(after) == read_products(many) != []
    assert {gvar.name_hint for gvar in after.functions} == {gvar.name_hint for gvar in many.functions}
