"""The host code of products of many tokens: many_tokens.c, and a function for each of a module's products."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import tvm

from tvm_sparse.codegen.cpu import compile_c
from tvm_sparse.schedules.product import Product, read_products

_SOURCE = Path(__file__).with_suffix(".c")


def host_objects(mod: tvm.IRModule, folder: Path) -> list[str]:
    """Compiles what a module's products need into `folder`: object files to link its library with."""
    products = read_products(mod)
    return [str(compile_c(host_code(products), folder / "many_tokens.o"))] if products else []


def host_code(products: Sequence[Product]) -> str:
    """C source that defines `__tvm_ffi_<symbol>` for each product and calls the kernels they name."""
    lines = [_SOURCE.read_text()]
    for product in products:
        kernels = [f"__tvm_ffi_{name}" if name else "NULL" for name in (product.few, product.decode, product.dense)]
        lines.append(f"extern Kernel {', '.join(kernel for kernel in kernels if kernel != 'NULL')};")
        lines.append(f"int __tvm_ffi_{product.symbol}(void* self, const Any* args, int32_t count, Any* result) {{")
        lines.append(f'  static const Product of = {{"{product.symbol}", {", ".join(kernels)}, {product.most}}};')
        lines.append("  (void)self;\n  return run(&of, args, count, result);\n}")
    return "\n".join(lines) + "\n"
