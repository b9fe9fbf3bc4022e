"""VerifySchedules: nothing unfinished reaches code generation, and nothing a GPU would refuse to launch."""

from __future__ import annotations

from math import prod

import tvm
import tvm_ffi

from tvm_sparse.schedules.product import read_products
from tvm_sparse.schedules.space import is_sketch


@tvm_ffi.error.register_error
class UnfinishedKernel(RuntimeError):
    """A kernel without a body, or beyond the machine's limits: a bug in a template or in the order of passes."""


@tvm.transform.module_pass(opt_level=0)
class VerifySchedules:
    """Checks that every sketch has become a kernel and that every hand-written function is marked as scheduled.

    Functions with GPU threads are held to `max_threads` in a block and `max_shared` bytes of shared memory; the
    kernels that products call must be there, under the names their host code will look for. Raises UnfinishedKernel,
    with the names.
    """

    def __init__(self, max_threads: int = 1024, max_shared: int = 227 << 10):
        self.max_threads, self.max_shared = max_threads, max_shared

    def transform_module(self, mod: tvm.IRModule, _: tvm.transform.PassContext) -> tvm.IRModule:
        faults = []
        for gvar, function in mod.functions_items():
            if isinstance(function, tvm.tirx.PrimFunc) and (fault := self._fault(function)):
                faults.append(f"{gvar.name_hint} {fault}")
        faults += _missing_kernels(mod)
        if faults:
            raise UnfinishedKernel("; ".join(faults))
        return mod

    def _fault(self, function: tvm.tirx.PrimFunc) -> str:
        attrs = function.attrs or {}
        if is_sketch(function):
            return "is still a sketch: ApplySchedules has not run"
        if "op_pattern" in attrs and "tirx.is_scheduled" not in attrs:
            return "is hand-written and not marked as scheduled"
        threads = threads_per_block(function)
        if threads > self.max_threads:
            return f"has {threads} threads in a block, more than {self.max_threads}"
        shared = shared_bytes(function)
        if shared > self.max_shared:
            return f"takes {shared} bytes of shared memory in a block, more than {self.max_shared}"
        return ""


def _missing_kernels(mod: tvm.IRModule) -> list[str]:
    symbols = {str(f.attrs["global_symbol"]) for f in mod.functions.values() if "global_symbol" in (f.attrs or {})}
    return [
        f"{product.symbol} calls {name}, which is not in the module"
        for product in read_products(mod)
        for name in (product.few, product.decode, product.dense)
        if name and name not in symbols
    ]


def threads_per_block(function: tvm.tirx.PrimFunc) -> int:
    """1 for a function without GPU threads. (TVM's verify_gpu_code looks at shared memory only.)"""
    extents: dict[str, int] = {}

    def note(tag: str, extent) -> None:
        if tag.startswith("threadIdx") and isinstance(extent, tvm.tirx.IntImm):
            extents[tag] = max(extents.get(tag, 1), int(extent))

    def launch(attr: tvm.tirx.AttrStmt) -> None:
        if attr.attr_key == "thread_extent":
            note(attr.node.thread_tag, attr.value)

    def bound(loop: tvm.tirx.For) -> None:
        if loop.thread_binding is not None:
            note(loop.thread_binding.thread_tag, loop.extent)

    tvm_ffi.structural_walk(function.body, [(tvm.tirx.AttrStmt, launch), (tvm.tirx.For, bound)])
    return prod(extents.values())


def shared_bytes(function: tvm.tirx.PrimFunc) -> int:
    """Bytes of all buffers of static size in scopes "shared" and "shared.dyn"."""
    sizes: list[int] = []

    def count(buffer: tvm.tirx.Buffer) -> None:
        if buffer.scope().startswith("shared") and all(isinstance(dim, tvm.tirx.IntImm) for dim in buffer.shape):
            dtype = tvm.DataType(str(buffer.dtype))
            sizes.append(prod(int(dim) for dim in buffer.shape) * dtype.bits * dtype.lanes // 8)

    def allocated(alloc: tvm.tirx.AllocBuffer) -> None:
        count(alloc.buffer)

    def in_block(block: tvm.s_tir.SBlock) -> None:
        for buffer in block.alloc_buffers:
            count(buffer)

    tvm_ffi.structural_walk(function.body, [(tvm.tirx.AllocBuffer, allocated), (tvm.s_tir.SBlock, in_block)])
    return sum(sizes)
