"""The graph passes, each on a small module: what it leaves, and that the numbers stay the same."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import tvm
from tvm import relax
from tvm.script import ir as I
from tvm.script import relax as R

from tvm_sparse.codegen.cpu import build_cpu_library
from tvm_sparse.errors import Refusal
from tvm_sparse.formats import FORMATS, FormatChoice, pack
from tvm_sparse.passes.annotate_sparsity import AnnotateSparsity, annotated_formats
from tvm_sparse.passes.apply_schedules import ApplySchedules
from tvm_sparse.passes.fuse_projections import FuseProjections, find_fusions
from tvm_sparse.passes.lower_sparse_matmul import LowerSparseMatmul
from tvm_sparse.passes.verify_schedules import UnfinishedKernel, VerifySchedules
from tvm_sparse.plan import keep_dense
from tvm_sparse.schedules.space import sketch
from tvm_sparse.schedules.spec import KernelSpec
from tvm_sparse.schedules.table import SPEC_ATTR, instantiate

BITMAP = FORMATS["bitmap"].choice()


def entry(param: str, shape: tuple[int, int], choice: FormatChoice = BITMAP):
    return replace(keep_dense(param, shape, 1, "a test"), choice=choice)


def sparse(n: int, k: int, density: float = 0.3, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=generator)
    return (weight * (torch.rand(n, k, generator=generator) < density)).bfloat16()


def run(mod: tvm.IRModule, folder, *inputs: torch.Tensor) -> torch.Tensor:
    """Builds the library and calls its function main."""
    build_cpu_library(mod, folder / "lib.so")
    vm = relax.VirtualMachine(tvm.runtime.load_module(str(folder / "lib.so")), tvm.cpu())
    result = vm["main"](*[tvm.runtime.from_dlpack(t) for t in inputs])
    return torch.from_dlpack(result[0] if isinstance(result, tvm.ir.Array) else result)


@I.ir_module
class Attention:
    @R.function
    def main(
        x: R.Tensor(("m", 64), "bfloat16"),
        q: R.Tensor((32, 64), "bfloat16"),
        k: R.Tensor((16, 64), "bfloat16"),
        o: R.Tensor((8, 48), "bfloat16"),
    ):
        with R.dataflow():
            qt = R.permute_dims(q)
            xq = R.matmul(x, qt)
            kt = R.permute_dims(k)
            xk = R.matmul(x, kt)
            qk = R.concat((xq, xk), axis=-1)
            ot = R.permute_dims(o)
            y = R.matmul(qk, ot, out_dtype="float32")
            R.output(y)
        return y


@I.ir_module
class AttentionFused:
    @R.function
    def main(
        x: R.Tensor(("m", 64), "bfloat16"),
        qk: R.Tensor((48, 64), "bfloat16"),
        o: R.Tensor((8, 48), "bfloat16"),
    ):
        with R.dataflow():
            qkt = R.permute_dims(qk)
            xqk = R.matmul(x, qkt)
            ot = R.permute_dims(o)
            y = R.matmul(xqk, ot, out_dtype="float32")
            R.output(y)
        return y


@I.ir_module
class Gated:
    @R.function
    def main(
        x: R.Tensor((4, 64), "float32"),
        gate: R.Tensor((32, 64), "float32"),
        up: R.Tensor((32, 64), "float32"),
    ):
        with R.dataflow():
            gt = R.permute_dims(gate)
            g = R.matmul(x, gt)
            ut = R.permute_dims(up)
            u = R.matmul(x, ut)
            y = R.multiply(R.nn.silu(g), u)
            R.output(y)
        return y


@I.ir_module
class GatedFused:
    @R.function
    def main(x: R.Tensor((4, 64), "float32"), gate_up: R.Tensor((64, 64), "float32")):
        with R.dataflow():
            t = R.permute_dims(gate_up)
            both = R.matmul(x, t)
            parts = R.split(both, indices_or_sections=[32], axis=-1)
            g = parts[0]
            u = parts[1]
            y = R.multiply(R.nn.silu(g), u)
            R.output(y)
        return y


def test_fuse_projections_removes_the_concatenation():
    fused = FuseProjections({"qk": ("q", "k")})(Attention)
    tvm.ir.assert_structural_equal(fused, AttentionFused)
    assert [p.name for p in fused["main"].params] == ["x", "qk", "o"]


def test_fuse_projections_splits_where_the_parts_are_used_apart():
    fused = FuseProjections(find_fusions(Gated))(Gated)
    tvm.ir.assert_structural_equal(fused, GatedFused)
    assert [p.name for p in fused["main"].params] == ["x", "gate+up"]


def test_fuse_projections_leaves_an_incomplete_fusion_alone():
    tvm.ir.assert_structural_equal(FuseProjections({"all": ("q", "k", "v")})(Attention), Attention)


def test_annotate_sparsity_notes_formats_and_refuses_what_it_does_not_know():
    mod = AnnotateSparsity({"qk": entry("qk", (48, 64))})(AttentionFused)
    assert annotated_formats(mod["main"]) == {"qk": BITMAP}
    with pytest.raises(Refusal, match=r"layers\.9\.q"):
        AnnotateSparsity({"layers.9.q": entry("layers.9.q", (48, 64))})(AttentionFused)
    with pytest.raises(Refusal, match=r"qk: the plan says \[64, 48\]"):
        AnnotateSparsity({"qk": entry("qk", (64, 48))})(AttentionFused)


def lower(mod: tvm.IRModule, plan: dict) -> tvm.IRModule:
    return tvm.transform.Sequential([AnnotateSparsity(plan), LowerSparseMatmul("x86-64")])(mod)


def expected_lowering() -> tvm.IRModule:
    """qk in bitmap buffers and its kernel; o a plain matmul still."""
    builder, m, nv = relax.BlockBuilder(), tvm.tirx.Var("m", "int64"), tvm.tirx.Var("nv", "int64")
    spec = KernelSpec(BITMAP, 48, 64, None, "bfloat16", "bfloat16", "x86-64")
    declared = {
        "x": ((m, 64), "bfloat16"), "qk.mask": ((48, 2), "uint32"), "qk.row_start": ((49,), "int32"),
        "qk.values": ((nv,), "bfloat16"), "o": ((8, 48), "bfloat16"),
    }  # fmt: skip
    x, *buffers, o = [relax.Var(name, relax.TensorType(*facts)) for name, facts in declared.items()]
    with builder.function("main", [x, *buffers, o]):
        with builder.dataflow():
            kernel = builder.add_func(sketch(spec), spec.name)
            out = relax.TensorType((m, 48), "bfloat16")
            qk = builder.emit(relax.op.call_tir(kernel, relax.Tuple([x, *buffers]), out))
            ot = builder.emit(relax.op.permute_dims(o))
            y = builder.emit_output(relax.op.matmul(qk, ot, out_dtype="float32"))
        builder.emit_func_output(y)
    return builder.finalize()


def test_lower_sparse_matmul_calls_the_kernel_with_the_packed_buffers():
    lowered = lower(AttentionFused, {"qk": entry("qk", (48, 64))})
    tvm.ir.assert_structural_equal(lowered, expected_lowering())


def test_lower_sparse_matmul_refuses_a_packed_parameter_with_another_use():
    @I.ir_module
    class Tied:
        @R.function
        def main(x: R.Tensor((4, 64), "float32"), w: R.Tensor((32, 64), "float32")):
            with R.dataflow():
                t = R.permute_dims(w)
                y = R.matmul(x, t)
                z = R.add(R.sum(y), R.sum(w))
                R.output(z)
            return z

    with pytest.raises(Refusal, match="w: used other than as a linear layer's weight"):
        lower(Tied, {"w": entry("w", (32, 64))})


def test_the_whole_way_down_keeps_the_numbers(tmp_path):
    q, k, o = sparse(32, 64, seed=1), sparse(16, 64, seed=2), sparse(8, 48, seed=3)
    x = torch.randn(5, 64).bfloat16()
    passes = [
        FuseProjections({"qk": ("q", "k")}),
        AnnotateSparsity({"qk": entry("qk", (48, 64)), "o": entry("o", (8, 48), FORMATS["dense"].choice())}),
        LowerSparseMatmul("x86-64"), ApplySchedules(), VerifySchedules(),
    ]  # fmt: skip
    mod = tvm.transform.Sequential(passes)(Attention)
    y = run(mod, tmp_path, x, *pack(torch.cat([q, k]), BITMAP).buffers.values(), o)
    want = (x.float() @ torch.cat([q, k]).float().T).bfloat16().float() @ o.float().T
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, want, rtol=1e-2, atol=1e-2)


def test_verify_schedules_names_the_unfinished_kernel():
    spec = KernelSpec(BITMAP, 48, 64, 1, "bfloat16", "float32", "x86-64")
    with pytest.raises(UnfinishedKernel, match="left_over is still a sketch"):
        VerifySchedules()(tvm.IRModule({"left_over": sketch(spec)}))
    VerifySchedules()(tvm.IRModule({"done": instantiate(spec)}))


def test_verify_schedules_knows_the_limits_of_a_gpu():
    from tvm.script import tirx as T

    @T.prim_func(s_tir=True, private=True)
    def wide(y: T.Buffer((2048,), "float32")):
        thread = T.launch_thread("threadIdx.x", 2048)
        y[thread] = T.float32(0)

    with pytest.raises(UnfinishedKernel, match="wide has 2048 threads in a block"):
        VerifySchedules()(tvm.IRModule({"wide": wide}))


def test_an_exported_torch_graph_goes_through_the_same_passes(tmp_path):
    """Two linear layers that share an input, then a third: parameters found and fused without a layout."""
    from tvm.relax.frontend import detach_params
    from tvm.relax.frontend.torch import from_exported_program

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.up, self.down = (torch.nn.Linear(*s, bias=False) for s in ((64, 96), (64, 96), (96, 64)))

        def forward(self, x):
            return self.down(torch.nn.functional.silu(self.gate(x)) * self.up(x))

    net, x = Net(), torch.randn(2, 3, 64)
    with torch.no_grad():
        for layer, (n, k) in ((net.gate, (96, 64)), (net.up, (96, 64)), (net.down, (64, 96))):
            layer.weight.copy_(sparse(n, k, seed=n + k))
    exported = torch.export.export(net, (x,))
    mod, _ = detach_params(from_exported_program(exported, keep_params_as_input=True, unwrap_unit_return_tuple=True))
    mod = relax.transform.EliminateCommonSubexpr()(mod)
    fusions = find_fusions(mod)
    fused = "p_gate_weight+p_up_weight"
    assert fusions == {fused: ("p_gate_weight", "p_up_weight")}

    weights = {fused: torch.cat([net.gate.weight, net.up.weight]), "p_down_weight": net.down.weight}
    packed = {name: pack(w.detach().bfloat16(), BITMAP) for name, w in weights.items()}
    plan = {name: entry(name, p.shape) for name, p in packed.items()}
    passes = [
        FuseProjections(fusions), AnnotateSparsity(plan), LowerSparseMatmul("x86-64"), ApplySchedules(),
        VerifySchedules(),
    ]  # fmt: skip
    mod = tvm.transform.Sequential(passes)(mod)
    assert sum(SPEC_ATTR in (f.attrs or {}) for f in mod.functions.values()) == 2
    buffers = {f"{name}.{b}": t for name, p in packed.items() for b, t in p.buffers.items()}
    inputs = [buffers[p.name] for p in mod["main"].params[1:]]
    y = run(mod, tmp_path, x, *inputs)
    want = net(x).detach()
    np.testing.assert_allclose(y, want, rtol=0, atol=1e-6 * float(want.abs().max()))
