"""From a plan to lib.so: the dense model, the passes in order, machine code for the targets."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import tvm
from tvm import relax

from tvm_sparse import targets
from tvm_sparse.codegen.cpu import build_cpu_library
from tvm_sparse.codegen.cuda import build_cuda_library
from tvm_sparse.codegen.workspace import WorkspaceMeter
from tvm_sparse.layout import Layout, executed_config, make_layout
from tvm_sparse.models.config import ModelConfig
from tvm_sparse.models.qwen3_5 import CHUNKS, build_module, state_tensors
from tvm_sparse.passes.annotate_sparsity import AnnotateSparsity
from tvm_sparse.passes.apply_schedules import ApplySchedules
from tvm_sparse.passes.bundle_parameters import NUM_STATE_ATTR, BundleParameters
from tvm_sparse.passes.fold_recurrent_layers import FoldRecurrentLayers
from tvm_sparse.passes.fuse_gates import FuseGates
from tvm_sparse.passes.fuse_norms import FuseNorms
from tvm_sparse.passes.fuse_projections import FuseProjections
from tvm_sparse.passes.fuse_residuals import FuseResiduals
from tvm_sparse.passes.lower_sparse_matmul import LowerSparseMatmul
from tvm_sparse.passes.verify_schedules import VerifySchedules
from tvm_sparse.plan import Plan
from tvm_sparse.progress import DEBUG
from tvm_sparse.schedules.records import Records
from tvm_sparse.schedules.spec import KernelSpec
from tvm_sparse.schedules.table import SPEC_ATTR, read_decisions


@dataclass(frozen=True)
class Library:
    """What lib.so takes and holds.

    `params` are the packed buffers in the order of the functions' weight argument, `schedules` says of each kernel,
    by KernelSpec name, where its schedule came from, `images` names the kernels by GPU architecture; `workspace` is
    the memory in bytes that its functions take for what they compute on the way.
    """

    params: tuple[str, ...]
    schedules: dict[str, str]
    images: dict[str, list[str]]
    workspace: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def compile_library(
    path: Path,
    config: ModelConfig,
    layout: Layout,
    plan: Plan,
    machines: Sequence[targets.Machine],
    dtype: str,
    batch: int,
) -> Library:
    """Builds and writes `path`. Raises Refusal where a compiler is missing."""
    device = machines[0].device
    arch = min((machine.arch for machine in machines), key=lambda name: (len(name), name))
    records = Records(machines[0])
    mod = import_model(config, layout, plan, dtype, batch, device)
    mod = lower(mod, layout, plan, arch, records)
    params = _params(mod)
    schedules = schedule_origins(mod, records)
    mod = tvm.transform.Sequential([BundleParameters()])(mod)
    meter = WorkspaceMeter(CHUNKS[device].prefill)
    images: dict[str, list[str]] = {}
    if device == "cpu":
        build_cpu_library(mod, path, instruments=[meter])
    else:
        images = build_cuda_library(mod, path, machines, [meter])
    return Library(params, schedules, images, meter.nbytes)


def import_model(config: ModelConfig, layout: Layout, plan: Plan, dtype: str, batch: int, device: str) -> tvm.IRModule:
    """The dense model at the depth that is executed; every executed layer has weights of its own."""
    executed = executed_config(config, layout)
    kept = wide_params(plan)
    wide = [param.name for param in make_layout(executed).params if layout.stored_name(param.name) in kept]
    return build_module(executed, dtype, batch, device, weight_dtype="bfloat16", wide=wide)


def lower(mod: tvm.IRModule, layout: Layout, plan: Plan, arch: str, records: Records | None = None) -> tvm.IRModule:
    """The graph passes: dense matmuls in, calls of finished kernels out."""
    pipeline = [
        FoldRecurrentLayers(layout.stored_name),  # executed layers use the weights their schedule names
        FuseProjections(layout.fusions),  # one matmul where several read the same input
        AnnotateSparsity(plan),  # the plan, on the functions
        LowerSparseMatmul(arch),  # matmul -> call_tir on packed parameters
        FuseResiduals(),  # the residual sum -> the product before it
        FuseNorms(),  # the norm -> the product after it
        FuseGates(),  # silu(gate) * up -> the product before it
        ApplySchedules(records),  # sketches -> kernels, by record or by default
        VerifySchedules(),  # nothing unfinished goes on
    ]
    instruments = [tvm.ir.instrument.DumpIR("tvm_sparse_ir")] if DEBUG >= 3 else []
    with tvm.transform.PassContext(opt_level=3, instruments=instruments):
        return tvm.transform.Sequential(pipeline)(mod)


def describe(config: ModelConfig, layout: Layout, device: str, dtype: str, batch: int, context: int) -> dict[str, Any]:
    """What the engine must know to call the library (tvm_sparse.json)."""
    chunks = CHUNKS[device]
    state = state_tensors(executed_config(config, layout), batch, dtype)
    return {
        "device": device,
        "dtype": dtype,
        "batch": batch,
        "context": context,
        "prefill_chunk": chunks.prefill,
        "score_chunk": chunks.score,
        "config": config.to_json(),
        "eos_token_ids": list(config.eos_token_ids),
        "layout": {"schedule": list(layout.schedule)},
        "state": [asdict(tensor) for tensor in state],
    }


def wide_params(plan: Plan) -> tuple[str, ...]:
    """Matrices kept in float32, because a checkpoint's values are no bfloat16."""
    return tuple(name for name, entry in plan.items() if dict(entry.choice.options).get("width") == 32)


def _params(mod: tvm.IRModule) -> tuple[str, ...]:
    orders = {
        tuple(param.name for param in function.params[int(function.attrs["num_input"]) :])
        for function in mod.functions.values()
        if isinstance(function, relax.Function) and NUM_STATE_ATTR in (function.attrs or {})
    }
    assert len(orders) == 1, "the functions of one library take the same weights in the same order"
    return orders.pop()


def schedule_origins(mod: tvm.IRModule, records: Records) -> dict[str, str]:
    """Kernel -> where its schedule comes from, with the decisions of records by architecture."""
    found = {}
    for function in mod.functions.values():
        if SPEC_ATTR not in (function.attrs or {}):
            continue
        spec, tuned = KernelSpec.from_json(function.attrs[SPEC_ATTR]), read_decisions(function)
        archs = tuned or (spec.arch,)
        origins = dict.fromkeys(records.find(replace(spec, arch=arch)).origin for arch in archs)
        found[spec.name] = ", ".join(origins) + (f": {json.dumps(tuned, sort_keys=True)}" if tuned else "")
    return found
