"""How much memory a library's functions take from the virtual machine's pool, read where TVM has planned it."""

from __future__ import annotations

from collections import Counter
from math import prod

import tvm
from tvm import relax

_PLANNED = "StaticPlanBlockMemory"
_STORAGE = "relax.memory.alloc_storage"


@tvm.ir.instrument.pass_instrument
class WorkspaceMeter:
    """A pass instrument; `nbytes` after compilation.

    The pool keeps what a function gave back and hands it to the next one that asks for as much: in the end it holds,
    for every size, as many blocks as the function that needs most of them.
    """

    def __init__(self) -> None:
        self.blocks: Counter[int] = Counter()

    @property
    def nbytes(self) -> int:
        return sum(size * count for size, count in self.blocks.items())

    def run_after_pass(self, mod: tvm.IRModule, info: tvm.ir.transform.PassInfo) -> None:
        if info.name != _PLANNED:
            return
        for function in mod.functions.values():
            if isinstance(function, relax.Function):
                self.blocks |= _blocks(function)


def _blocks(function: relax.Function) -> Counter[int]:
    found: Counter[int] = Counter()

    def visit(node: relax.Expr) -> None:
        if isinstance(node, relax.Call) and getattr(node.op, "name", "") == _STORAGE:
            shape = node.args[0]
            if all(isinstance(extent, tvm.tirx.IntImm) for extent in shape.values):
                found[prod(int(extent) for extent in shape.values)] += 1

    relax.analysis.post_order_visit(function, visit)
    return found
