"""The kernels of a GPU benchmark as one library, built where the compiler is, run where the GPU is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tvm_sparse.schedules.spec import KernelSpec
from tvm_sparse.targets import Machine

if TYPE_CHECKING:
    import tvm

FLOOR, FLOOR_WARPS = "floor", 16
"""The kernel that only reads, of words [cores, steps, 32, 8]."""


@dataclass(frozen=True)
class Built:
    """How a matmul is called: `symbol` takes x, the packed buffers, y and, where it is not 0, `scratch` bytes."""

    symbol: str
    scratch: int
    schedule: str


def build(path: Path, specs: Sequence[KernelSpec], machine: Machine) -> None:
    """Compiles every kernel as a build would: by tuning records, many tokens through a decoded matrix or cuBLASLt.

    Dense kernels are there under their specs' names, too. Beside the library stands what `read` returns.
    """
    import tvm

    from tvm_sparse.codegen.cuda import build_cuda_library
    from tvm_sparse.schedules.cuda import stream
    from tvm_sparse.schedules.product import dense_spec, product, write_products
    from tvm_sparse.schedules.records import Records
    from tvm_sparse.schedules.table import decoder, instantiate

    records = Records(machine)
    functions = {FLOOR: stream.build(machine.cores, FLOOR_WARPS)}
    built, products = {}, []

    def kernel(spec: KernelSpec) -> tvm.tirx.PrimFunc:
        return instantiate(spec, records.find(spec).decisions)

    for spec in specs:
        made = product(spec)
        built[spec.name] = Built(
            made.symbol if made else spec.name, made.scratch if made else 0, records.find(spec).origin
        )
        if made is None:
            functions[spec.name] = kernel(spec)
            continue
        products.append(made)
        functions.setdefault(made.dense, kernel(dense_spec(spec)))
        if made.few:
            functions[made.few] = kernel(spec)
        if made.decode:
            functions[made.decode] = decoder(spec)
    mod = tvm.IRModule({name: function.with_attr("global_symbol", name) for name, function in functions.items()})
    path.parent.mkdir(parents=True, exist_ok=True)
    build_cuda_library(write_products(mod, products), path, [machine])
    _facts(path).write_text(json.dumps({name: asdict(facts) for name, facts in built.items()}, indent=1))


def read(path: Path) -> dict[str, Built]:
    """What each spec's name stands for in a library."""
    return {name: Built(**facts) for name, facts in json.loads(_facts(path).read_text()).items()}


def _facts(path: Path) -> Path:
    return path.with_suffix(".json")
