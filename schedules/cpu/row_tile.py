"""The CPU matmul template: a tile of W's rows against a tile of tokens, 32 columns at a time.

Shared by every format that stores W row by row; a `Rows` says how a format's next weights come into a vector
register. A (row, token) has `unroll` accumulators that take the 32-column blocks in turn and are added in a fixed order
at the end: results depend neither on other tokens' values nor on the number of threads.

    parallel  chunks of rows
      tokens    tiles of `tokens`, then of half as many, ... down to 1 for what is left
        rows      tiles of `rows`, walked together: each loaded x serves them all
          columns   `unroll` blocks of 32 at a time

One token is bound by memory: a single row with several accumulators reads its values as one stream, which together with
prefetching is twice as fast as several rows side by side. Eight tokens are bound by arithmetic and by x: there
rows x tokens fill the registers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from tvm_sparse.schedules.cpu.isa import ISAS, Isa
from tvm_sparse.schedules.cpu.signature import arguments
from tvm_sparse.schedules.spec import KernelSpec
from tvm_sparse.schedules.table import Decision

BLOCK = 32


class Rows(Protocol):
    """How one format streams a tile of rows; made once for each tile, inside the kernel."""

    def start(self, r: int, row) -> None:
        """Row `row` becomes the tile's r-th."""

    def prefetch(self, r: int, i, u: int) -> None:
        """Asks for memory some way ahead; called before block i, the u-th of an unrolled group."""

    def block(self, r: int, i) -> None:
        """Makes the r-th row ready for columns 32 i to 32 i + 31."""

    def vector(self, r: int, i, step: int) -> tirx.PrimExpr:
        """The weights of one step of `isa.lanes` columns of that block, steps in order."""

    def advance(self, r: int, i) -> None:
        """Goes past the block."""

    def scalar(self, r: int, i, j: int) -> tuple[tirx.PrimExpr, tirx.PrimExpr]:
        """Whether column 32 i + j is stored, and the place of its float32 weight; columns in order, no steps."""

    def advance_scalar(self, r: int) -> None:
        """Goes past a stored column."""


def space(spec: KernelSpec) -> tuple[Decision, ...]:
    """Registers hold rows x tokens x unroll accumulators, at most `accumulators` of them.

    `prefetch` is how many cache lines ahead values are asked for, 0: not at all.
    """
    wide = spec.arch == "avx512"
    tokens = 1 if spec.m == 1 else min(8, 1 << (spec.m - 1).bit_length()) if spec.m else 8
    return (
        Decision("tokens", tuple(t for t in (1, 2, 4, 8) if t <= tokens), min(tokens, 8 if wide else 4)),
        Decision("rows", (1, 2, 3, 4, 6, 8), 1 if spec.m == 1 else 4 if wide else 2),
        Decision("unroll", (1, 2, 4, 8), 8 if spec.m == 1 else 1),
        Decision("accumulators", (8, 16, 24), 24 if wide else 8),
        Decision("chunk", (16, 32, 64, 128), 32),
        Decision("prefetch", (0, 4, 8, 16, 32), 16),
    )


def build(spec: KernelSpec, decisions: Mapping[str, int], rows_type: type) -> tirx.PrimFunc:
    """The kernel of `spec` with the format's `rows_type(isa, buffers, count, spec, prefetch)`."""
    isa = ISAS[spec.arch]
    m = tirx.Var("m", "int64") if spec.m is None else spec.m
    chunk = decisions["chunk"]
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("main")
        x, buffers, y = arguments(spec, m)
        with T.attr(T.int32(0), "pragma_import_llvm", isa.llvm), T.parallel(0, -(-spec.n // chunk)) as c:
            for width, first, count in token_tiles(m, decisions["tokens"]):
                rows = max(1, min(decisions["rows"], decisions["accumulators"] // width))
                unroll = max(1, min(decisions["unroll"], decisions["accumulators"] // (rows * width)))
                with T.serial(0, count) as tile, T.serial(0, -(-chunk // rows)) as group:
                    last = tirx.min(c * chunk + chunk, spec.n) - 1
                    # A tile that reaches past the chunk computes the chunk's last row again.
                    at = [tirx.min(c * chunk + group * rows + r, last) for r in range(rows)]
                    tokens = [first + tile * width + t for t in range(width)]
                    streams = rows_type(isa, buffers, rows, spec, decisions["prefetch"])
                    _tile(isa, spec, streams, x, y, at, tokens, unroll)
    return builder.get()


def token_tiles(m, most: int):
    """Yields (width, first token, number of tiles): all tokens, widths falling from `most` to 1."""
    yield most, 0, m // most
    width = most // 2
    while width:
        # The tokens past the last whole 2 * width hold one tile of this width or none.
        if not isinstance(m, int) or m & width:
            yield width, m // (2 * width) * (2 * width), m % (2 * width) // width
        width //= 2


def _tile(isa: Isa, spec: KernelSpec, streams: Rows, x, y, rows: list, tokens: list, unroll: int) -> None:
    count, width = len(rows), len(tokens)
    accs = T.alloc_buffer((count * width * unroll,), isa.acc, scope="local")
    weights = T.alloc_buffer((count,), isa.vector, scope="local")
    for r in range(count):
        streams.start(r, rows[r])
    for i in range(count * width * unroll):
        T.buffer_store(accs, isa.zero(), [i])

    def block(i, u: int) -> None:
        for r in range(count):
            streams.prefetch(r, i, u)
            streams.block(r, i)
        for step in range(BLOCK // isa.lanes):
            for r in range(count):
                T.buffer_store(weights, streams.vector(r, i, step), [r])
                for t, token in enumerate(tokens):
                    place = T.address_of(x[token, i * BLOCK + step * isa.lanes])
                    a = (r * width + t) * unroll + u
                    T.buffer_store(accs, isa.dot(spec.x_dtype, accs[a], weights[r], place), [a])
        for r in range(count):
            streams.advance(r, i)

    blocks = spec.k // BLOCK
    with T.serial(0, blocks // unroll) as i:
        for u in range(unroll):
            block(i * unroll + u, u)
    for u in range(blocks % unroll):
        block(T.int32(blocks // unroll * unroll + u), u)

    sums = T.alloc_buffer((count * width,), "float32", scope="local")
    for a in range(count * width):
        total = accs[a * unroll]
        for u in range(1, unroll):
            total = total + accs[a * unroll + u]
        T.buffer_store(sums, isa.sum(total), [a])
    _tail(spec, streams, x, sums, count, tokens)
    for r, row in enumerate(rows):
        for t, token in enumerate(tokens):
            T.buffer_store(y, T.cast(sums[r * width + t], spec.out_dtype), [token, row])


def _tail(spec: KernelSpec, streams: Rows, x, sums, count: int, tokens: list) -> None:
    """The last K mod 32 columns, one by one: no vector may read past the end of x."""
    whole = spec.k // BLOCK
    if spec.k % BLOCK == 0:
        return
    for r in range(count):
        streams.block(r, whole)
        with T.serial(0, spec.k % BLOCK) as j:
            stored, weight = streams.scalar(r, whole, j)
            with T.If(stored), T.Then():
                for t, token in enumerate(tokens):
                    a = r * len(tokens) + t
                    product = weight * T.cast(x[token, whole * BLOCK + j], "float32")
                    T.buffer_store(sums, sums[a] + product, [a])
                streams.advance_scalar(r)
