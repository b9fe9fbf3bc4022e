"""Builds the products that run_products.py times, at the 27B's shapes: python tests/gpu/build_products.py OUT.so

Beside OUT.so stands OUT.json: a row for each product, for a machine without TVM's compiler. build_library.py takes
the ragged ones from here.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

import tvm

from tvm_sparse.codegen.cuda import build_cuda_library
from tvm_sparse.formats import FORMATS
from tvm_sparse.formats.delta import gpu_classes
from tvm_sparse.formats.gather import cuts_for
from tvm_sparse.schedules.product import dense_spec, product, write_products
from tvm_sparse.schedules.spec import KernelSpec
from tvm_sparse.schedules.table import DECODERS, decoder, instantiate
from tvm_sparse.targets import MACHINES

RAGGED = ((1, 8), (33, 40), (100, 64), (257, 1000), (1000, 1000))
MODEL = ((34816, 5120), (5120, 17408), (16480, 5120), (14336, 5120), (5120, 6144))
BATCHES = (2, 16)  # sequences decoded together with dense matrices


def choices(n: int, k: int):
    """Every format with a decoder, as the plan would cut it for an H200."""
    cut = {"block": {"rows": 16, "cols": 16}, "delta": {"classes": gpu_classes(k)}}
    cut["gather"] = cuts_for((n, k), MACHINES["h200"])[0]
    return [FORMATS[name].choice(**cut.get(name, {})) for name in DECODERS]


def ragged():
    for i, (n, k) in enumerate(RAGGED):
        for choice in [FORMATS["dense"].choice(), *choices(n, k), FORMATS["block"].choice(3, 20)]:
            yield KernelSpec(choice, n, k, None, "bfloat16", ("bfloat16", "float32")[i % 2], "sm_90a")


def whole():
    dense = FORMATS["dense"].choice()
    for n, k in MODEL:
        for choice in [dense, *choices(n, k)]:
            yield KernelSpec(choice, n, k, None, "bfloat16", "bfloat16", "sm_90a")
        for m in BATCHES:
            yield KernelSpec(dense, n, k, m, "bfloat16", "bfloat16", "sm_90a")


def gather(specs):
    """{kernel name: PrimFunc}, the products of which they are parts, and their rows for OUT.json."""
    functions, products, rows = {}, {}, []
    for spec in specs:
        made = product(spec)
        assert made is not None, spec
        products[made.symbol] = made
        if made.dense not in functions:
            functions[made.dense] = instantiate(dense_spec(spec))
        if made.few:
            functions[made.few] = instantiate(spec)
        if made.decode:
            functions[made.decode] = decoder(spec)
        rows.append({**asdict(made), "n": spec.n, "k": spec.k, "m": spec.m, "out_dtype": spec.out_dtype,
                     "format": spec.choice.name, "options": dict(spec.choice.options)})  # fmt: skip
    return functions, list(products.values()), rows


def build(out: str, machines: list[str], functions, products, rows, began: float) -> None:
    mod = tvm.IRModule({name: f.with_attr("global_symbol", name) for name, f in functions.items()})
    written = time.perf_counter()
    found = build_cuda_library(write_products(mod, products), out, [MACHINES[name] for name in machines or ["h200"]])
    Path(out).with_suffix(".json").write_text(json.dumps(rows))
    counts = {arch: len(names) for arch, names in found.items()}
    print(f"{counts} kernels; parsed in {written - began:.0f} s, built in {time.perf_counter() - written:.0f} s")


if __name__ == "__main__":
    started = time.perf_counter()
    build(sys.argv[1], sys.argv[2:], *gather(whole()), started)
