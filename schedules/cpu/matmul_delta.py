"""The delta stream on the CPU: a task takes a bin, row after row; the 8 words of a chunk fill a register.

The columns of a chunk are a running sum of its gaps, x is gathered at them. Streams, which cut a bin for the lanes of a
GPU, are walked in order: a row goes on where the row before ended, until a chunk ends it. A word becomes its weight by
integer arithmetic (exponent field base + code), so x needs no scaling.
"""

from __future__ import annotations

from collections.abc import Mapping

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from tvm_sparse.errors import Refusal
from tvm_sparse.formats.delta_bins import WARP, slots
from tvm_sparse.formats.delta_words import END
from tvm_sparse.formats.stats import CHUNK
from tvm_sparse.schedules.cpu.isa import ISAS, Isa
from tvm_sparse.schedules.cpu.row_tile import token_tiles
from tvm_sparse.schedules.cpu.signature import arguments
from tvm_sparse.schedules.cpu.staged import stage
from tvm_sparse.schedules.spec import KernelSpec
from tvm_sparse.schedules.table import Decision

INTS, FLOATS = "int32x8", "float32x8"


def space(spec: KernelSpec) -> tuple[Decision, ...]:
    tokens = 1 if spec.m == 1 else 4
    return (Decision("tokens", tuple(t for t in (1, 2, 4) if t <= tokens), min(tokens, 2)),)


def build(spec: KernelSpec, decisions: Mapping[str, int]) -> tirx.PrimFunc:
    isa, bins = ISAS[spec.arch], spec.choice.option("bins")
    if spec.choice.option("classes") != 1 or spec.choice.option("unit") != CHUNK:
        raise Refusal(f"{spec.choice} on a CPU: it is cut for a GPU, a CPU takes classes=1, unit={CHUNK}")
    m = tirx.Var("m", "int64") if spec.m is None else spec.m
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("main")
        x, buffers, y = arguments(spec, m)
        staged = stage(x, CHUNK)
        source = library(isa, spec.choice.option("gap_bits"))
        with T.attr(T.int32(0), "pragma_import_llvm", source), T.parallel(0, bins) as bin:
            for width, first, count in token_tiles(m, decisions["tokens"]):
                with T.serial(0, count) as tile:
                    tokens = [first + tile * width + t for t in range(width)]
                    _walk(isa, spec, buffers, staged, y, bin, tokens)
    return builder.get()


def _walk(isa: Isa, spec: KernelSpec, buffers, staged, y, bin, tokens: list) -> None:
    """All rows of a bin against a tile of tokens."""
    words, _, rows, scale, res_col, res_val = buffers
    codes = T.decl_buffer(words.shape, "int16", data=words.data)
    steps, warps = T.cast(words.shape[1], "int32"), spec.choice.option("warps")
    place = T.alloc_buffer((5,), "int32", scope="local")  # warp, its first step, its end, lane, step
    ended = T.alloc_buffer((1,), "int32", scope="local")
    column = T.alloc_buffer((1,), "int32", scope="local")
    accs = T.alloc_buffer((len(tokens),), FLOATS, scope="local")
    sums = T.alloc_buffer((len(tokens),), "float32", scope="local")
    for i, value in enumerate((0, 0, T.truncdiv(steps, T.int32(warps)), 0, 0)):
        T.buffer_store(place, value, [i])

    def call(dtype: str, name: str, *args):
        return T.call_extern(dtype, f"ts_{isa.prefix}_delta{spec.choice.option('gap_bits')}_{name}", *args)

    def settle() -> None:
        """Where a stream has ended, the next lane's begins; after the last lane the next warp's."""
        with T.While(place[4] == place[2]):
            T.buffer_store(place, place[1], [4])
            T.buffer_store(place, place[3] + 1, [3])
            with T.If(place[3] == WARP), T.Then():
                T.buffer_store(place, place[0] + 1, [0])
                T.buffer_store(place, place[2], [1])
                T.buffer_store(place, T.truncdiv(steps * (place[0] + 1), T.int32(warps)), [2])
                T.buffer_store(place, place[1], [4])
                T.buffer_store(place, 0, [3])

    with T.serial(0, slots(spec.n, spec.choice.option("bins")) - 1) as rank:
        row = rows[bin, 0, rank]
        with T.If(row >= 0), T.Then():
            T.buffer_store(column, -1, [0])
            for t in range(len(tokens)):
                T.buffer_store(accs, T.broadcast(T.float32(0), 8), [t])
            T.buffer_store(ended, 0, [0])
            with T.While(ended[0] == 0):
                settle()
                chunk = T.address_of(words[bin, place[4], place[3], 0])
                columns = T.alloc_buffer((1,), INTS, scope="local")
                weights = T.alloc_buffer((1,), FLOATS, scope="local")
                T.buffer_store(columns, call(INTS, "columns", chunk, column[0]), [0])
                T.buffer_store(weights, call(FLOATS, "weights", chunk, T.shift_left(scale[0], 23)), [0])
                for t, token in enumerate(tokens):
                    x = T.address_of(staged[token, 0])
                    T.buffer_store(accs, call(FLOATS, "gather_add", accs[t], weights[0], x, columns[0]), [t])
                T.buffer_store(column, call("int32", "last", columns[0]), [0])
                last = T.cast(codes[bin, place[4], place[3], CHUNK - 1], "int32")
                T.buffer_store(ended, T.Select(last == END, 1, 0), [0])
                T.buffer_store(place, place[4] + 1, [4])
            for t, token in enumerate(tokens):
                T.buffer_store(sums, call("float32", "sum", accs[t]), [t])
                with T.serial(0, rows[bin, 1, rank + 1] - rows[bin, 1, rank]) as i:
                    at = rows[bin, 1, rank] + i
                    product = T.cast(res_val[at], "float32") * staged[token, res_col[at]]
                    T.buffer_store(sums, sums[t] + product, [t])
                T.buffer_store(y, T.cast(sums[t], spec.out_dtype), [token, row])


def library(isa: Isa, gap_bits: int) -> str:
    """LLVM functions on the 8 words of a chunk.

    columns(words, before)            before + the running sum of the words' gaps
    weights(words, base)              the float32 of each word, `base` added to its exponent field; 0 stays 0
    gather_add(acc, weights, x, at)   acc + weights * x[at]
    last(columns)                     the column of the last word
    sum(acc)                          in a fixed order
    """
    attributes, name = isa.attributes, f"@ts_{isa.prefix}_delta{gap_bits}_"
    keep = (0x8000 | (1 << (15 - gap_bits)) - 1) << 16
    add = "call <8 x float> @llvm.fma.v8f32(<8 x float> %w, <8 x float> %x, <8 x float> %acc)"
    if isa.name == "x86-64":
        add = "fadd <8 x float> %acc, %product"
    sums = []
    for distance, value, total in ((1, "%gap", "%a"), (2, "%a", "%b"), (4, "%b", "%c")):
        picks = ", ".join(f"i32 {0 if lane < distance else 8 + lane - distance}" for lane in range(8))
        sums.append(f"""
  {total}s = shufflevector <8 x i32> zeroinitializer, <8 x i32> {value}, <8 x i32> <{picks}>
  {total} = add <8 x i32> {value}, {total}s""")
    return f"""target triple = "{isa.triple}"

define weak_odr <8 x i32> {name}columns(ptr %p, i32 %before) {attributes} {{
  %h = load <8 x i16>, ptr %p, align 2, !invariant.load !0
  %w = zext <8 x i16> %h to <8 x i32>
  %s = lshr <8 x i32> %w, splat (i32 {15 - gap_bits})
  %m = and <8 x i32> %s, splat (i32 {(1 << gap_bits) - 1})
  %gap = add <8 x i32> %m, splat (i32 1){"".join(sums)}
  %i = insertelement <8 x i32> poison, i32 %before, i32 0
  %v = shufflevector <8 x i32> %i, <8 x i32> poison, <8 x i32> zeroinitializer
  %r = add <8 x i32> %c, %v
  ret <8 x i32> %r
}}
define weak_odr <8 x float> {name}weights(ptr %p, i32 %base) {attributes} {{
  %h = load <8 x i16>, ptr %p, align 2, !invariant.load !0
  %w = zext <8 x i16> %h to <8 x i32>
  %l = shl <8 x i32> %w, splat (i32 16)
  %bits = and <8 x i32> %l, splat (i32 {keep - (1 << 32)})
  %i = insertelement <8 x i32> poison, i32 %base, i32 0
  %v = shufflevector <8 x i32> %i, <8 x i32> poison, <8 x i32> zeroinitializer
  %s = add <8 x i32> %bits, %v
  %z = icmp eq <8 x i32> %bits, zeroinitializer
  %m = icmp eq <8 x i32> %bits, splat (i32 -2147483648)
  %o = or <8 x i1> %z, %m
  %r = select <8 x i1> %o, <8 x i32> zeroinitializer, <8 x i32> %s
  %f = bitcast <8 x i32> %r to <8 x float>
  ret <8 x float> %f
}}
define weak_odr <8 x float> {name}gather_add(<8 x float> %acc, <8 x float> %w, ptr %x0, <8 x i32> %at) {attributes} {{
  %p = getelementptr float, ptr %x0, <8 x i32> %at
  %x = call <8 x float> @llvm.masked.gather.v8f32.v8p0(<8 x ptr> align 4 %p, <8 x i1> splat (i1 true),
                                                       <8 x float> poison)
  %product = fmul <8 x float> %w, %x
  %r = {add}
  ret <8 x float> %r
}}
define weak_odr i32 {name}last(<8 x i32> %at) {attributes} {{
  %r = extractelement <8 x i32> %at, i32 7
  ret i32 %r
}}
define weak_odr float {name}sum(<8 x float> %acc) {attributes} {{
  %r = call reassoc float @llvm.vector.reduce.fadd.v8f32(float 0.0, <8 x float> %acc)
  ret float %r
}}
declare float @llvm.vector.reduce.fadd.v8f32(float, <8 x float>)
declare <8 x float> @llvm.fma.v8f32(<8 x float>, <8 x float>, <8 x float>)
declare <8 x float> @llvm.masked.gather.v8f32.v8p0(<8 x ptr>, <8 x i1>, <8 x float>)
!0 = !{{}}
"""
