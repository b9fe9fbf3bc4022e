"""Dense weights on the CPU, for matrices that stay dense and for the head: the row template with plain loads.

Weights kept in float32 (width 32, a matrix that is not exactly bfloat16) have a plain kernel of their own.
"""

from __future__ import annotations

from collections.abc import Mapping

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from tvm_sparse.schedules.cpu import row_tile
from tvm_sparse.schedules.cpu.isa import ISAS, Isa
from tvm_sparse.schedules.cpu.row_tile import space
from tvm_sparse.schedules.cpu.signature import arguments
from tvm_sparse.schedules.spec import KernelSpec

__all__ = ["build", "space"]


def build(spec: KernelSpec, decisions: Mapping[str, int]) -> tirx.PrimFunc:
    if spec.choice.options:
        return _build_float32(spec, decisions)
    return row_tile.build(spec, decisions, DenseRows)


class DenseRows(row_tile.Rows):
    def __init__(self, isa: Isa, buffers, count: int, spec: KernelSpec, prefetch: int):
        self.isa, self.ahead = isa, prefetch
        (self.weight,) = buffers
        self.rows: dict[int, tirx.PrimExpr] = {}
        self.following: dict[int, tirx.PrimExpr] = {}
        self.alone = count == 1

    def start(self, r: int, row, following) -> None:
        self.rows[r], self.following[r] = row, following

    def prefetch(self, r: int, i, u: int) -> None:
        if self.ahead:
            column = 32 * (i + self.ahead)
            place = self.weight[self.rows[r], column] if self.alone else self.weight[self.following[r], 32 * i]
            T.evaluate(self.isa.prefetch(T.address_of(place)))

    def block(self, r: int, i) -> None:
        pass

    def vector(self, r: int, i, step: int):
        return self.isa.load(T.address_of(self.weight[self.rows[r], 32 * i + step * self.isa.lanes]))

    def advance(self, r: int, i) -> None:
        pass

    def scalar(self, r: int, i, j):
        return tirx.const(True, "bool"), T.cast(self.weight[self.rows[r], 32 * i + j], "float32")

    def advance_scalar(self, r: int) -> None:
        pass


def _build_float32(spec: KernelSpec, decisions: Mapping[str, int]) -> tirx.PrimFunc:
    """One row against a tile of tokens; the accumulators are the lanes, then the columns that are left."""
    lanes = ISAS[spec.arch].acc_lanes
    m = tirx.Var("m", "int64") if spec.m is None else spec.m
    whole = spec.k // lanes
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("main")
        x, (weight,), y = arguments(spec, m)
        with T.parallel(0, spec.n) as row:
            for width, first, count in row_tile.token_tiles(m, decisions["tokens"]):
                accs = T.alloc_buffer((width,), f"float32x{lanes}", scope="local")
                sums = T.alloc_buffer((width,), "float32", scope="local")
                with T.serial(0, count) as tile:
                    tokens = [first + tile * width + t for t in range(width)]
                    for t in range(width):
                        T.buffer_store(accs, T.broadcast(T.float32(0), lanes), [t])
                    with T.serial(0, whole) as i:
                        at = T.ramp(i * lanes, 1, lanes)
                        for t, token in enumerate(tokens):
                            T.buffer_store(accs, accs[t] + weight[row, at] * T.cast(x[token, at], accs.dtype), [t])
                    for t, token in enumerate(tokens):
                        total = T.call_llvm_pure_intrin("float32", "llvm.vector.reduce.fadd", T.float32(0), accs[t])
                        T.buffer_store(sums, total, [t])
                        with T.serial(0, spec.k % lanes) as j:
                            column = whole * lanes + j
                            product = weight[row, column] * T.cast(x[token, column], "float32")
                            T.buffer_store(sums, sums[t] + product, [t])
                        T.buffer_store(y, T.cast(sums[t], spec.out_dtype), [token, row])
    return builder.get()
