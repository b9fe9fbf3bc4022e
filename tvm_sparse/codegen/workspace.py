"""How much memory a library's functions take for what they compute on the way.

From the virtual machine's pool, read where TVM has planned it, and what an operation keeps from one kernel to its next.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from math import prod

import tvm
from tvm import relax, tirx

_PLANNED = "StaticPlanBlockMemory"
_STORAGE = "relax.memory.alloc_storage"


@tvm.ir.instrument.pass_instrument
class WorkspaceMeter:
    """A pass instrument; `nbytes` after compilation.

    The pool keeps what a function gave back and hands it to the next one that asks for as much: in the end it holds,
    for every size, as many blocks as the function that needs most of them. `tokens` are the most a call brings.
    """

    def __init__(self, tokens: int) -> None:
        self.blocks: Counter[int] = Counter()
        self._counts = [*(1 << bits for bits in range(tokens.bit_length())), tokens]
        self._kernels = 0  # the kernel that keeps most; the others get the same memory

    @property
    def nbytes(self) -> int:
        return sum(size * count for size, count in self.blocks.items()) + self._kernels

    def run_after_pass(self, mod: tvm.IRModule, info: tvm.ir.transform.PassInfo) -> None:
        if info.name != _PLANNED:
            return
        for function in mod.functions.values():
            if isinstance(function, relax.Function):
                self.blocks |= _blocks(function)
            elif isinstance(function, tirx.PrimFunc):
                self._kernels = max(self._kernels, *(_kept(function, count) for count in self._counts))


def _blocks(function: relax.Function) -> Counter[int]:
    """Bytes of a block -> how many. In normal form every block is a binding's value; relax's visitor goes through the
    types of every variable wherever it is used: 20 s for the 27B."""
    found: Counter[int] = Counter()
    for value in (binding.value for block in function.body.blocks for binding in block.bindings):
        if isinstance(value, relax.Call) and getattr(value.op, "name", "") == _STORAGE:
            shape = value.args[0]
            if all(isinstance(extent, tvm.tirx.IntImm) for extent in shape.values):
                found[prod(int(extent) for extent in shape.values)] += 1
    return found


def _kept(function: tirx.PrimFunc, tokens: int) -> int:
    """Bytes of a PrimFunc's own buffers in global memory, with so many tokens."""
    total = 0
    for buffer in _buffers(function.body):
        if buffer.scope() == "global":
            extents = [_extent(extent, tokens) for extent in buffer.shape]
            total += prod(extents) * tvm.DataType(buffer.dtype).itemsize
    return total


def _buffers(statement: tirx.Stmt) -> Iterator[tirx.Buffer]:
    if isinstance(statement, tirx.AllocBuffer):
        yield statement.buffer
    inside = (getattr(statement, name, None) for name in ("block", "body"))
    for part in [*(part for part in inside if part is not None), *getattr(statement, "seq", ())]:
        yield from _buffers(part)


def _extent(extent: tirx.PrimExpr, tokens: int) -> int:
    """A size in which the number of tokens may stand."""
    if isinstance(extent, tirx.IntImm):
        return int(extent)
    analyzer = tvm.sym.Analyzer()
    for var in tirx.analysis.undefined_vars(extent):
        analyzer.bind(var, tirx.IntImm("int64", tokens))
    return int(analyzer.simplify(extent))
