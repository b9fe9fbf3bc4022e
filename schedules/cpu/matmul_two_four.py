"""2:4 weights on the CPU: the positions become a bitmap of 16 bits in 32, values stand in fixed places."""

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
    return row_tile.build(spec, decisions, TwoFourRows)


class TwoFourRows(row_tile.Rows):
    def __init__(self, isa: Isa, buffers, count: int, spec: KernelSpec, prefetch: int):
        self.isa, self.ahead = isa, prefetch
        self.values, self.meta = buffers
        self.rows: dict[int, tirx.PrimExpr] = {}
        self.following: dict[int, tirx.PrimExpr] = {}
        self.alone = count == 1
        self.bits = T.alloc_buffer((count,), "uint32", scope="local")

    def start(self, r: int, row, following) -> None:
        self.rows[r], self.following[r] = row, following

    def prefetch(self, r: int, i, u: int) -> None:
        # Two blocks hold a cache line of values, sixteen one of positions.
        row, ahead = (self.rows[r], 2 * self.ahead) if self.alone else (self.following[r], 0)
        if self.ahead and u % 2 == 0:
            T.evaluate(self.isa.prefetch(T.address_of(self.values[row, 16 * (i + ahead)])))
        if self.ahead and u == 0:
            T.evaluate(self.isa.prefetch(T.address_of(self.meta[row, 2 * (i + ahead)])))

    def block(self, r: int, i) -> None:
        if isinstance(i, int):  # the ragged end, which is read group by group
            return
        row = self.rows[r]
        words = [T.cast(self.meta[row, 2 * i + half], "uint32") for half in range(2)]
        T.buffer_store(self.bits, T.bitwise_or(words[0], T.shift_left(words[1], T.uint32(16))), [r])
        T.buffer_store(self.bits, kept_columns(self.bits[r]), [r])

    def vector(self, r: int, i, step: int):
        lanes = self.isa.lanes
        bits = self.bits[r]
        if lanes < 32:
            bits = T.bitwise_and(T.shift_right(bits, T.uint32(lanes * step)), T.uint32((1 << lanes) - 1))
        place = T.address_of(self.values[self.rows[r], 16 * i + lanes // 2 * step])
        return self.isa.expand(place, bits, half=True)

    def advance(self, r: int, i) -> None:
        pass

    def scalar(self, r: int, i, j):
        row, column = self.rows[r], 32 * i + j
        group = column // 4
        meta = T.cast(self.meta[row, column // 16], "int32")
        pair = T.bitwise_and(T.shift_right(meta, group % 4 * 4), 15)
        first, second = T.bitwise_and(pair, 3) == column % 4, T.shift_right(pair, 2) == column % 4
        weight = self.values[row, 2 * group + T.cast(second, "int32")]
        return tirx.any(first, second), T.cast(weight, "float32")

    def advance_scalar(self, r: int) -> None:
        pass


def kept_columns(meta) -> tirx.PrimExpr:
    """Eight groups' positions (i0 | i1 << 2 in four bits each) -> one bit for each of their 32 columns.

    All groups at once: `low0` and `high0` are the bits of i0 in their group's lowest bit, `low1` and `high1` of i1.
    """
    ones = T.uint32(0x11111111)
    low0, high0, low1, high1 = (T.bitwise_and(T.shift_right(meta, T.uint32(i)), ones) for i in range(4))

    def off(bit):
        return T.bitwise_xor(bit, ones)

    at0 = T.bitwise_and(off(low0), off(high0))
    at1 = T.bitwise_or(T.bitwise_and(low0, off(high0)), T.bitwise_and(low1, off(high1)))
    at2 = T.bitwise_or(T.bitwise_and(off(low0), high0), T.bitwise_and(off(low1), high1))
    at3 = T.bitwise_and(low1, high1)
    bits = at0
    for place, column in ((1, at1), (2, at2), (3, at3)):
        bits = T.bitwise_or(bits, T.shift_left(column, T.uint32(place)))
    return bits
