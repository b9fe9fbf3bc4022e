"""The delta stream on the CPU: as many rows as a register has float32 lanes walk their words side by side.

A lane is a row, as on the GPU: every word moves its lane's column on, x is gathered at the columns. Segments, which
cut a group's work for many warps, are not needed: a task walks its group from the first chunk to the last.
A word becomes its weight by integer arithmetic (exponent field base + code), so x needs no scaling.
"""

from __future__ import annotations

from collections.abc import Mapping

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from tvm_sparse.formats.delta import Delta
from tvm_sparse.schedules.cpu.isa import ISAS, Isa
from tvm_sparse.schedules.cpu.row_tile import token_tiles
from tvm_sparse.schedules.cpu.signature import arguments
from tvm_sparse.schedules.cpu.staged import stage
from tvm_sparse.schedules.spec import KernelSpec
from tvm_sparse.schedules.table import Decision

GROUP, CHUNK = 32, 8


def space(spec: KernelSpec) -> tuple[Decision, ...]:
    tokens = 1 if spec.m == 1 else 4
    return (Decision("tokens", tuple(t for t in (1, 2, 4) if t <= tokens), min(tokens, 2)),)


def build(spec: KernelSpec, decisions: Mapping[str, int]) -> tirx.PrimFunc:
    isa = ISAS[spec.arch]
    lanes = isa.acc_lanes
    m = tirx.Var("m", "int64") if spec.m is None else spec.m
    groups = -(-spec.n // GROUP)
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("main")
        x, buffers, y = arguments(spec, m)
        staged = stage(x, Delta.PAST(spec.choice))
        with T.attr(T.int32(0), "pragma_import_llvm", library(isa)), T.parallel(0, groups) as group:
            for width, first, count in token_tiles(m, decisions["tokens"]):
                with T.serial(0, count) as tile, T.serial(0, GROUP // lanes) as part:
                    tokens = [first + tile * width + t for t in range(width)]
                    _walk(isa, spec, buffers, staged, y, group, part * lanes, tokens)
    return builder.get()


def _walk(isa: Isa, spec: KernelSpec, buffers, staged, y, group, lane, tokens: list) -> None:
    """Rows `lane` and following of a group, as many as there are lanes, against a tile of tokens."""
    words, row_of, seg_chunk, seg_col, scale, res_start, res_col, res_val = buffers
    lanes, gap_bits = isa.acc_lanes, spec.choice.option("gap_bits")
    columns = T.alloc_buffer((1,), f"int32x{lanes}", scope="local")
    accs = T.alloc_buffer((len(tokens),), isa.acc, scope="local")
    T.buffer_store(columns, seg_col[group, 0, T.ramp(lane, 1, lanes)], [0])
    for t in range(len(tokens)):
        T.buffer_store(accs, isa.zero(), [t])

    begin = seg_chunk[group, 0]
    with T.serial(0, seg_chunk[group, spec.choice.option("segments")] - begin) as i:
        place = T.address_of(words[begin + i, lane, 0])
        for word in range(CHUNK):
            pair = _call(isa, f"int32x{lanes}", f"pair{word // 2}", place)
            here = pair if word % 2 == 0 else T.shift_right(pair, _all(16, lanes))
            gap = T.bitwise_and(T.shift_right(here, _all(15 - gap_bits, lanes)), _all((1 << gap_bits) - 1, lanes))
            T.buffer_store(columns, columns[0] + gap + _all(1, lanes), [0])
            keep = (0x8000 | (1 << (15 - gap_bits)) - 1) << 16
            bits = T.bitwise_and(T.shift_left(here, _all(16, lanes)), _all(keep - (1 << 32), lanes))
            base = T.broadcast(T.shift_left(scale[0], 23), lanes)
            weight = _call(isa, isa.acc, "weight", bits, base)
            for t, token in enumerate(tokens):
                row = T.address_of(staged[token, 0])
                T.buffer_store(accs, _call(isa, isa.acc, "gather_add", accs[t], weight, row, columns[0]), [t])

    sums = T.alloc_buffer((len(tokens), lanes), "float32", scope="local")
    for t in range(len(tokens)):
        T.buffer_store(sums, accs[t], [t, T.ramp(0, 1, lanes)])
    with T.serial(0, lanes) as r:
        row = row_of[group * GROUP + lane + r]
        with T.If(row >= 0), T.Then():
            for t, token in enumerate(tokens):
                with T.serial(0, res_start[row + 1] - res_start[row]) as i:
                    at = res_start[row] + i
                    product = T.cast(res_val[at], "float32") * staged[token, res_col[at]]
                    T.buffer_store(sums, sums[t, r] + product, [t, r])
                T.buffer_store(y, T.cast(sums[t, r], spec.out_dtype), [token, row])


def _all(value: int, lanes: int) -> tirx.PrimExpr:
    return T.broadcast(T.int32(value), lanes)


def _call(isa: Isa, dtype: str, name: str, *args) -> tirx.PrimExpr:
    return T.call_extern(dtype, f"ts_{isa.prefix}_lanes_{name}", *args)


def library(isa: Isa) -> str:
    """LLVM functions on one register of lanes L.

    pair<i>(words)                    words 2 i and 2 i + 1 of each lane's eight, as one int32 a lane
    weight(bits, base)                the float32 with `base` added to its exponent field; 0 stays 0
    gather_add(acc, weight, x, at)    acc + weight * x[at]
    """
    n, attributes = isa.acc_lanes, isa.attributes
    name = f"@ts_{isa.prefix}_lanes_"
    ints, floats = f"<{n} x i32>", f"<{n} x float>"
    lines = [f'target triple = "{isa.triple}"']
    for i in range(4):
        picks = ", ".join(f"i32 {4 * lane + i}" for lane in range(n))
        lines.append(f"""
define weak_odr {ints} {name}pair{i}(ptr %p) {attributes} {{
  %v = load <{4 * n} x i32>, ptr %p, align 2, !invariant.load !0
  %r = shufflevector <{4 * n} x i32> %v, <{4 * n} x i32> poison, {ints} <{picks}>
  ret {ints} %r
}}""")
    add = f"call {floats} @llvm.fma.v{n}f32({floats} %w, {floats} %x, {floats} %acc)"
    if isa.name == "x86-64":
        add = f"fadd {floats} %acc, %product"
    lines.append(f"""
define weak_odr {floats} {name}weight({ints} %bits, {ints} %base) {attributes} {{
  %s = add {ints} %bits, %base
  %z = icmp eq {ints} %bits, zeroinitializer
  %m = icmp eq {ints} %bits, splat (i32 -2147483648)
  %o = or <{n} x i1> %z, %m
  %r = select <{n} x i1> %o, {ints} zeroinitializer, {ints} %s
  %f = bitcast {ints} %r to {floats}
  ret {floats} %f
}}
define weak_odr {floats} {name}gather_add({floats} %acc, {floats} %w, ptr %x0, {ints} %at) {attributes} {{
  %p = getelementptr float, ptr %x0, {ints} %at
  %x = call {floats} @llvm.masked.gather.v{n}f32.v{n}p0(<{n} x ptr> align 4 %p, <{n} x i1> splat (i1 true),
                                                        {floats} poison)
  %product = fmul {floats} %w, %x
  %r = {add}
  ret {floats} %r
}}
declare {floats} @llvm.fma.v{n}f32({floats}, {floats}, {floats})
declare {floats} @llvm.masked.gather.v{n}f32.v{n}p0(<{n} x ptr>, <{n} x i1>, {floats})
!0 = !{{}}
""")
    return "\n".join(lines)
