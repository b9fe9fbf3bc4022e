"""The kernels of a GPU benchmark as one library, built where the compiler is, run where the GPU is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import tvm

from tvm_sparse.codegen.cuda import build_cuda_library
from tvm_sparse.schedules.cuda import stream
from tvm_sparse.schedules.spec import KernelSpec
from tvm_sparse.schedules.table import instantiate
from tvm_sparse.targets import Machine


def floor_name(spec: KernelSpec) -> str:
    return f"floor_{spec.name}"


def build(path: Path, specs: Sequence[KernelSpec], machine: Machine) -> None:
    """Every kernel under its spec's name; beside each delta kernel the one that only reads its words."""
    functions = {spec.name: instantiate(spec) for spec in specs}
    functions |= {floor_name(spec): stream.build(spec) for spec in specs if spec.choice.name == "delta"}
    mod = tvm.IRModule({name: function.with_attr("global_symbol", name) for name, function in functions.items()})
    build_cuda_library(mod, path, [machine])
