"""A matrix product of any number of tokens on a GPU: which kernels serve it, and from how many tokens on which.

Few tokens are bound by reading W, which the format's own kernel does best. Many tokens are bound by arithmetic, which
tensor cores do on a dense matrix only: W is decoded into a scratch buffer and multiplied as it stands there, one matrix
at a time. codegen/many_tokens.c is what chooses and calls at run time.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import tvm

from tvm_sparse.formats import FORMATS
from tvm_sparse.schedules.spec import KernelSpec
from tvm_sparse.schedules.table import DECODERS

_PRODUCTS_ATTR = "tvm_sparse.products"
WORKSPACE = 32 << 20  # bytes for cuBLASLt's partial sums, as NVIDIA recommends for this architecture
_LARGEST = 512 << 20  # bytes of W that are decoded at a time: a larger matrix keeps to its own kernel


@dataclass(frozen=True)
class Product:
    """`symbol` is what the graph calls with (x, the format's buffers, y, scratch uint8 [`scratch`]).

    All others are kernels by their symbols: `dense` of (x, w, y), where cuBLASLt is not there; `few`, the format's own,
    for at most `most` tokens (None: nothing is few); `decode`, which makes w (None: the matrix is dense).
    """

    symbol: str
    dense: str
    few: str | None = None
    decode: str | None = None
    most: int = 0
    scratch: int = WORKSPACE


def write_products(mod: tvm.IRModule, products: Sequence[Product]) -> tvm.IRModule:
    """Notes on a module which products its functions call, for code generation."""
    return mod.with_attr(_PRODUCTS_ATTR, json.dumps([asdict(product) for product in products])) if products else mod


def read_products(mod: tvm.IRModule) -> list[Product]:
    """What `write_products` noted."""
    noted = (mod.attrs or {}).get(_PRODUCTS_ATTR)
    return [Product(**facts) for facts in json.loads(str(noted))] if noted is not None else []


def product(spec: KernelSpec) -> Product | None:
    """How tensor cores serve this matmul; None where they do not and the format's own kernel does, alone.

    They take bfloat16, and rows of whole 16 bytes.
    """
    wide = spec.choice == FORMATS["dense"].choice(32)
    if spec.device != "cuda" or spec.x_dtype != "bfloat16" or wide or spec.k % 8:
        return None
    symbol = f"{spec.name}_product"
    if spec.choice.name == "dense":
        return Product(symbol, spec.name) if spec.m != 1 else None
    size = -(-2 * spec.n * spec.k // 256) * 256
    if spec.choice.name not in DECODERS or size > _LARGEST:
        return None
    most = DECODERS[spec.choice.name].most
    if spec.m is not None and spec.m <= most:
        return None
    return Product(
        symbol,
        dense=dense_spec(spec).name,
        few=spec.name if spec.m is None else None,
        decode=decoder_name(spec),
        most=most,
        scratch=size + WORKSPACE,
    )


def dense_spec(spec: KernelSpec) -> KernelSpec:
    """The same product of a decoded matrix."""
    return replace(spec, choice=FORMATS["dense"].choice())


def decoder_name(spec: KernelSpec) -> str:
    """One decoder serves every product of a format and shape."""
    options = "".join(f"_{key}{value}" for key, value in spec.choice.options)
    return f"decode_{spec.choice.name.replace(':', 'to')}{options}_{spec.n}x{spec.k}"
