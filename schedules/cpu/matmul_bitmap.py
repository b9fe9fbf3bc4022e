"""Bitmap weights on the CPU: the values that follow are spread under the mask, then the pointer goes on by its bits."""

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
    return row_tile.build(spec, decisions, BitmapRows)


class BitmapRows(row_tile.Rows):
    def __init__(self, isa: Isa, buffers, count: int, spec: KernelSpec, prefetch: int):
        self.isa, self.ahead, self.spec = isa, prefetch, spec
        self.mask, self.row_start, self.values = buffers
        self.rows: dict[int, tirx.PrimExpr] = {}
        self.following: dict[int, tirx.PrimExpr] = {}
        self.alone = count == 1
        self.skip = T.alloc_buffer((count,), "int64", scope="local")
        self.at = T.alloc_buffer((count,), "int64", scope="local")
        self.bits = T.alloc_buffer((count,), "uint32", scope="local")

    def start(self, r: int, row, following) -> None:
        self.rows[r], self.following[r] = row, following
        T.buffer_store(self.at, T.cast(self.row_start[row], "int64"), [r])
        further = T.int64(32 * self.ahead)
        if not self.alone:
            further = T.cast(self.row_start[following], "int64") - T.cast(self.row_start[row], "int64")
        T.buffer_store(self.skip, further, [r])

    def prefetch(self, r: int, i, u: int) -> None:
        # Two blocks hold a cache line of values at density 0.5, but where lines end changes; sixteen share one of mask.
        if self.ahead:
            T.evaluate(self.isa.prefetch(T.address_of(self.values[self.at[r] + self.skip[r]])))
        if self.ahead and u == 0:
            place = self.mask[self.rows[r], i + 4 * self.ahead] if self.alone else self.mask[self.following[r], i]
            T.evaluate(self.isa.prefetch(T.address_of(place)))

    def block(self, r: int, i) -> None:
        T.buffer_store(self.bits, self.mask[self.rows[r], i], [r])

    def vector(self, r: int, i, step: int):
        bits = self.bits[r]
        if self.isa.lanes == 32:
            return self.isa.expand(T.address_of(self.values[self.at[r]]), bits)
        lanes = self.isa.lanes
        low = bits & T.uint32((1 << lanes * step) - 1)
        here = T.bitwise_and(T.shift_right(bits, T.uint32(lanes * step)), T.uint32((1 << lanes) - 1))
        return self.isa.expand(T.address_of(self.values[self.at[r] + T.cast(T.popcount(low), "int64")]), here)

    def advance(self, r: int, i) -> None:
        T.buffer_store(self.at, self.at[r] + T.cast(T.popcount(self.bits[r]), "int64"), [r])

    def scalar(self, r: int, i, j):
        stored = T.bitwise_and(T.shift_right(self.bits[r], T.cast(j, "uint32")), T.uint32(1)) != T.uint32(0)
        return stored, T.cast(self.values[self.at[r]], "float32")

    def advance_scalar(self, r: int) -> None:
        T.buffer_store(self.at, self.at[r] + T.int64(1), [r])

    def few(self, r: int):
        """At most a sixth of the columns: then hardly any 64 of them have more than the 16 values one step takes."""
        if self.isa.lanes < 32 or self.spec.x_dtype != "bfloat16":
            return None
        row = self.rows[r]
        return (self.row_start[row + 1] - self.row_start[row]) * 6 <= self.spec.k

    def pair(self, r: int, i, acc, x):
        mask, values = self.mask[self.rows[r], i], self.values[self.at[r]]
        return self.isa.few(acc, T.address_of(mask), T.address_of(values), x)

    def advance_pair(self, r: int, i) -> None:
        count = self.isa.few_count(T.address_of(self.mask[self.rows[r], i]))
        T.buffer_store(self.at, self.at[r] + count, [r])
