"""Builds every kernel of cases.py for the H200 and the B200: python tests/gpu/build_library.py OUT.so"""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import cases
import tvm

from tvm_sparse.codegen.cuda import build_cuda_library
from tvm_sparse.schedules.ops import ModelOps
from tvm_sparse.schedules.spec import KernelSpec
from tvm_sparse.schedules.table import instantiate
from tvm_sparse.targets import MACHINES


def main(out: str) -> None:
    began = time.perf_counter()
    functions = {}
    for case in cases.matmuls():
        spec = KernelSpec(
            case.choice, case.n, case.k, case.m, case.x_dtype, case.out_dtype, "sm_90a"
        )
        functions[case.name] = instantiate(spec, dict(case.decisions))
    for shape in cases.SHAPES:
        functions |= cases.operations(shape, ModelOps("cuda"))
    mod = tvm.IRModule({name: f.with_attr("global_symbol", name) for name, f in functions.items()})
    written = time.perf_counter()
    machines = [MACHINES[name] for name in sys.argv[2:] or ["h200"]]
    found = build_cuda_library(mod, out, machines)
    counts = {arch: len(names) for arch, names in found.items()}
    print(f"{counts} kernels; parsed in {written - began:.0f} s, built in {time.perf_counter() - written:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1])
