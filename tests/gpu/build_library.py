"""Builds every kernel of cases.py and the ragged products: python tests/gpu/build_library.py OUT.so [machine ...]

For the H200 where no machine is named. Beside OUT.so stands OUT.json, what run_products.py checks.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import cases
from build_products import build, gather, ragged

from tvm_sparse.schedules.ops import ModelOps
from tvm_sparse.schedules.spec import KernelSpec
from tvm_sparse.schedules.table import instantiate


def main(out: str, machines: list[str]) -> None:
    began = time.perf_counter()
    functions, products, rows = gather(ragged())
    for case in cases.matmuls():
        ends = case.x_dtype, case.out_dtype, "sm_90a", case.norm_eps, case.after
        spec = KernelSpec(case.choice, case.n, case.k, case.m, *ends)
        functions[case.name] = instantiate(spec, dict(case.decisions))
    for shape in cases.SHAPES:
        functions |= cases.operations(shape, ModelOps("cuda"))
    build(out, machines, functions, products, rows, began)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
