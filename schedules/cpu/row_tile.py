"""The CPU matmul template: a tile of W's rows against a tile of tokens, 32 columns at a time.

Shared by every format that stores W row by row; a `Rows` says how a format's next weights come into a vector
register. A (row, token) has `unroll` accumulators that take the 32-column blocks in turn and are added in a fixed order
at the end: results depend neither on other tokens' values nor on the number of threads.

    parallel  chunks of rows
      tokens    tiles of `tokens`, then of half as many, ... down to 1 for what is left
        rows      tiles of `rows`, walked together: each loaded x serves them all
          columns   `unroll` blocks of 32 at a time

One token is bound by memory: a single row with several accumulators reads its values as one stream, asked for 8 KB
ahead. With 1 KB it took 1.7 times as long at 50 % zeros, 1.5 times at 75 % (Zen 5, 5120 x 17408): what is in flight
has to cover bandwidth times latency. Several tokens are bound by arithmetic and by x, which comes from the second
cache: there rows x tokens fill the registers, each loaded x serves three rows, and what is asked for ahead is the next
tile. Two rows took 1.5 times as long at 50 % zeros, 1.1 times at 75 %, the same at 90 %.
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
STRIDE = 4  # blocks in the body of the innermost loop, at least: prefetches are made once for several


class Rows(Protocol):
    """How one format streams a tile of rows; made once for each tile, inside the kernel."""

    def start(self, r: int, row, following) -> None:
        """Row `row` becomes the tile's r-th; `following` will be the next tile's."""

    def prefetch(self, r: int, i, u: int) -> None:
        """Asks for memory ahead: further on in a single row, of several the same place in the following ones.

        Called before block i, the u-th of a stride.
        """

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

    def few(self, r: int) -> tirx.PrimExpr | None:
        """Whether the row has so few values that `pair` is faster; None: there is no such way."""
        return None

    def pair(self, r: int, i, acc, x) -> tirx.PrimExpr:
        """acc + the products of blocks i and i + 1 of a row of few values."""
        raise NotImplementedError

    def advance_pair(self, r: int, i) -> None:
        """Goes past both blocks."""
        raise NotImplementedError


def space(spec: KernelSpec) -> tuple[Decision, ...]:
    """`rows` are those of a tile of several tokens, `unroll` the accumulators of a single one.

    Registers hold rows x tokens x unroll accumulators: a tile of few tokens is unrolled until there are `accumulators`.
    `prefetch` is how many cache lines ahead the values of a single row are asked for; 0: nothing is asked for ahead.
    """
    wide = spec.arch == "avx512"
    tokens = 1 if spec.m == 1 else min(8, 1 << (spec.m - 1).bit_length()) if spec.m else 8
    return (
        Decision("tokens", tuple(t for t in (1, 2, 4, 8) if t <= tokens), min(tokens, 8 if wide else 4)),
        Decision("rows", (1, 2, 3, 4), 3 if wide else 2),
        Decision("unroll", (2, 4, 8), 8),
        Decision("accumulators", (8, 16, 24), 24 if wide else 8),
        Decision("chunk", (16, 32, 64), 32),
        Decision("prefetch", (0, 16, 32, 64, 128), 128),
    )


def build(spec: KernelSpec, decisions: Mapping[str, int], rows_type: type) -> tirx.PrimFunc:
    """The kernel of `spec` with the format's `rows_type(isa, buffers, count, spec, prefetch)`."""
    isa = ISAS[spec.arch]
    m = tirx.Var("m", "int64") if spec.m is None else spec.m
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("main")
        x, buffers, y = arguments(spec, m)
        with T.attr(T.int32(0), "pragma_import_llvm", isa.llvm), T.parallel(0, -(-spec.n // decisions["chunk"])) as c:
            for width, first, count in token_tiles(m, decisions["tokens"]):
                with T.serial(0, count) as tile:
                    tokens = [first + tile * width + t for t in range(width)]
                    _Tile(isa, spec, decisions, rows_type, buffers, x, y, c, tokens).emit()
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


class _Tile:
    """Emits one chunk of rows against one tile of tokens."""

    def __init__(self, isa: Isa, spec: KernelSpec, decisions: Mapping[str, int], rows_type, buffers, x, y, c, tokens):
        self.isa, self.spec, self.x, self.y, self.tokens = isa, spec, x, y, tokens
        width, chunk, most = len(tokens), decisions["chunk"], decisions["accumulators"]
        self.width = width
        self.count = 1 if width == 1 else max(1, min(decisions["rows"], most // width))
        self.unroll = decisions["unroll"] if width == 1 else max(1, most // (self.count * width))
        self.blocks = spec.k // BLOCK
        self.stride = max(self.unroll, STRIDE)
        self.first, self.chunk = c * chunk, chunk
        self.here = tirx.min(spec.n - c * chunk, chunk)
        self.groups = (self.here + self.count - 1) // self.count
        self.streams: Rows = rows_type(isa, buffers, self.count, spec, decisions["prefetch"])
        self.accs = T.alloc_buffer((self.count * width * self.unroll,), isa.acc, scope="local")
        self.weights = T.alloc_buffer((self.count,), isa.vector, scope="local")
        self.sums = T.alloc_buffer((self.count * width,), "float32", scope="local")

    def emit(self) -> None:
        with T.serial(0, self.groups) as group:
            rows = self._rows(group)
            for r, row in enumerate(rows):
                following = tirx.min(self.first + row + self.count, self.spec.n - 1)
                self.streams.start(r, self.first + row, following)
            for a in range(self.count * self.width * self.unroll):
                T.buffer_store(self.accs, self.isa.zero(), [a])
            few = self.streams.few(0) if self.width == 1 else None
            if few is None:
                self._columns(self._block, 1)
            else:
                with T.If(few):
                    with T.Then():
                        self._columns(self._pair, 2)
                    with T.Else():
                        self._columns(self._block, 1)
            self._finish(rows)

    def _columns(self, step, blocks: int) -> None:
        """`step` for all whole blocks, `blocks` at a time; what they leave goes one by one."""
        with T.serial(0, self.blocks // self.stride) as i:
            for u in range(0, self.stride, blocks):
                step(i * self.stride + u, u)
        first, rest = self.blocks // self.stride * self.stride, self.blocks % self.stride
        for u in range(0, rest // blocks * blocks, blocks):
            step(T.int32(first + u), u)
        for u in range(rest // blocks * blocks, rest):
            self._block(T.int32(first + u), u)

    def _rows(self, group) -> list:
        """The group's rows in the chunk; one past the end computes the chunk's last row again."""
        return [tirx.min(group * self.count + r, self.here - 1) for r in range(self.count)]

    def _block(self, i, u: int) -> None:
        """Columns 32 i and following; blocks of a stride take the accumulators of each row and token in turn."""
        isa, streams = self.isa, self.streams
        for r in range(self.count):
            streams.prefetch(r, i, u)
            streams.block(r, i)
        for step in range(BLOCK // isa.lanes):
            for r in range(self.count):
                T.buffer_store(self.weights, streams.vector(r, i, step), [r])
                for t, token in enumerate(self.tokens):
                    place = T.address_of(self.x[token, i * BLOCK + step * isa.lanes])
                    a = (r * self.width + t) * self.unroll + u % self.unroll
                    T.buffer_store(self.accs, isa.dot(self.spec.x_dtype, self.accs[a], self.weights[r], place), [a])
        for r in range(self.count):
            streams.advance(r, i)

    def _pair(self, i, u: int) -> None:
        self.streams.prefetch(0, i, u)
        a = u // 2 % self.unroll
        x = T.address_of(self.x[self.tokens[0], i * BLOCK])
        T.buffer_store(self.accs, self.streams.pair(0, i, self.accs[a], x), [a])
        self.streams.advance_pair(0, i)

    def _finish(self, rows: list) -> None:
        """Adds the accumulators up, then the last K mod 32 columns, and stores y."""
        for a in range(self.count * self.width):
            total = self.accs[a * self.unroll]
            for u in range(1, self.unroll):
                total = total + self.accs[a * self.unroll + u]
            T.buffer_store(self.sums, self.isa.sum(total), [a])
        self._tail()
        for r, row in enumerate(rows):
            for t, token in enumerate(self.tokens):
                value = T.cast(self.sums[r * self.width + t], self.spec.out_dtype)
                T.buffer_store(self.y, value, [token, self.first + row])

    def _tail(self) -> None:
        """One by one: no vector may read past the end of x."""
        if self.spec.k % BLOCK == 0:
            return
        for r in range(self.count):
            self.streams.block(r, self.blocks)
            with T.serial(0, self.spec.k % BLOCK) as j:
                stored, weight = self.streams.scalar(r, self.blocks, j)
                with T.If(stored), T.Then():
                    for t, token in enumerate(self.tokens):
                        a = r * self.width + t
                        product = weight * T.cast(self.x[token, self.blocks * BLOCK + j], "float32")
                        T.buffer_store(self.sums, self.sums[a] + product, [a])
                    self.streams.advance_scalar(r)
