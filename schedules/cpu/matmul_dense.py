"""Dense weights on the CPU, for matrices that stay dense and for the head: the row template with plain loads."""

from __future__ import annotations

from collections.abc import Mapping

from tvm import tirx
from tvm.tirx.script import builder as T

from tvm_sparse.schedules.cpu import row_tile
from tvm_sparse.schedules.cpu.isa import Isa
from tvm_sparse.schedules.cpu.row_tile import space
from tvm_sparse.schedules.spec import KernelSpec

__all__ = ["build", "space"]


def build(spec: KernelSpec, decisions: Mapping[str, int]) -> tirx.PrimFunc:
    return row_tile.build(spec, decisions, DenseRows)


class DenseRows:
    def __init__(self, isa: Isa, buffers, count: int, spec: KernelSpec, prefetch: int):
        self.isa, self.prefetch = isa, prefetch
        (self.weight,) = buffers
        self.rows: dict[int, tirx.PrimExpr] = {}

    def start(self, r: int, row) -> None:
        self.rows[r] = row

    def block(self, r: int, i) -> None:
        if self.prefetch:
            T.evaluate(self.isa.prefetch(T.address_of(self.weight[self.rows[r], 32 * (i + self.prefetch)])))

    def vector(self, r: int, i, step: int):
        return self.isa.load(T.address_of(self.weight[self.rows[r], 32 * i + step * self.isa.lanes]))

    def advance(self, r: int, i) -> None:
        pass

    def scalar(self, r: int, i, j):
        return tirx.const(True, "bool"), T.cast(self.weight[self.rows[r], 32 * i + j], "float32")

    def advance_scalar(self, r: int) -> None:
        pass
