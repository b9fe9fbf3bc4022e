"""Block weights on the CPU: dense rectangles against the matching columns of x, empty ones never touched."""

from __future__ import annotations

from collections.abc import Mapping

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from tvm_sparse.schedules.cpu.isa import ISAS
from tvm_sparse.schedules.cpu.row_tile import token_tiles
from tvm_sparse.schedules.cpu.signature import arguments
from tvm_sparse.schedules.cpu.staged import stage
from tvm_sparse.schedules.spec import KernelSpec
from tvm_sparse.schedules.table import Decision


def space(spec: KernelSpec) -> tuple[Decision, ...]:
    wide = spec.arch == "avx512"
    tokens = 1 if spec.m == 1 else 4
    return (
        Decision("tokens", tuple(t for t in (1, 2, 4) if t <= tokens), tokens),
        Decision("rows", (1, 2, 4, 8), 4 if wide else 2),
    )


def build(spec: KernelSpec, decisions: Mapping[str, int]) -> tirx.PrimFunc:
    m = tirx.Var("m", "int64") if spec.m is None else spec.m
    block_rows = spec.choice.option("rows")
    rows = min(decisions["rows"], block_rows)
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("main")
        x, buffers, y = arguments(spec, m)
        staged = stage(x, -spec.k % spec.choice.option("cols"))
        with T.parallel(0, -(-spec.n // block_rows)) as block_row:
            for width, first, count in token_tiles(m, decisions["tokens"]):
                with T.serial(0, count) as tile, T.serial(0, -(-block_rows // rows)) as part:
                    tokens = [first + tile * width + t for t in range(width)]
                    inside = [tirx.min(part * rows + r, block_rows - 1) for r in range(rows)]
                    _strip(spec, buffers, staged, y, block_row, inside, tokens)
    return builder.get()


def _strip(spec: KernelSpec, buffers, staged, y, block_row, inside: list, tokens: list) -> None:
    """Some rows of one block row against a tile of tokens."""
    blocks, cols, row_start = buffers
    block_rows, block_cols = spec.choice.option("rows"), spec.choice.option("cols")
    lanes = next(lanes for lanes in (ISAS[spec.arch].acc_lanes, 8, 4, 1) if block_cols % lanes == 0)
    vector = f"float32x{lanes}" if lanes > 1 else "float32"
    pairs = [(r, t) for r in range(len(inside)) for t in range(len(tokens))]
    accs = T.alloc_buffer((len(pairs),), vector, scope="local")
    for a in range(len(pairs)):
        T.buffer_store(accs, T.broadcast(T.float32(0), lanes) if lanes > 1 else T.float32(0), [a])

    begin = row_start[block_row]
    with T.serial(0, row_start[block_row + 1] - begin) as i, T.serial(0, block_cols // lanes) as step:
        block = begin + i
        here, there = step * lanes, cols[block] * block_cols + step * lanes
        if lanes > 1:
            here, there = T.ramp(here, 1, lanes), T.ramp(there, 1, lanes)
        for a, (r, t) in enumerate(pairs):
            weight = T.cast(blocks[block, inside[r], here], vector)
            T.buffer_store(accs, accs[a] + weight * staged[tokens[t], there], [a])

    for a, (r, t) in enumerate(pairs):
        total = accs[a]
        if lanes > 1:
            total = T.call_llvm_pure_intrin("float32", "llvm.vector.reduce.fadd", T.float32(0), accs[a])
        row = block_row * block_rows + inside[r]
        with T.If(row < spec.n), T.Then():
            T.buffer_store(y, T.cast(total, spec.out_dtype), [tokens[t], row])
