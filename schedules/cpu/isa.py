"""The vector instructions the CPU kernels are written in, one library of a few LLVM functions for each code path.

A step is `lanes` columns of one row of W. `vector` is the type that holds a step's weights, `acc` that of a sum.

    expand(values, bits) -> vector     the next values under the lowest `lanes` bits of a mask, zeros elsewhere; may
                                       read `lanes` values whatever the mask
    expand_half(values, bits)          the same where at most half of the bits are set: reads lanes / 2 values
    load(weights) -> vector            a dense step
    dot_<dtype of x>(acc, vector, x)   acc + the step's products, x read from memory
    sum(acc) -> float32                in a fixed order

avx512 has a second way for bfloat16 x and masks of few bits, 64 columns at a time:

    few(acc, mask, values, x)          acc + the products of 64 columns
    few_count(mask) -> int64           the values they have

TVM's own bfloat16 arithmetic and its mask type stop short of these instructions, so they come as LLVM text that is
inlined into the kernels. Loads are marked invariant: nothing a kernel reads is written while it runs.

avx512 needs VBMI2 (`vpexpandw`) and BF16 (`vdpbf16ps`). That instruction adds the products of two neighbouring columns
one after the other, each rounded to nearest even, and takes subnormal inputs and results as zero. The other code
paths, and float32 x on all of them, multiply and add in IEEE float32.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx
from tvm.tirx.script import builder as T


@dataclass(frozen=True)
class Isa:
    name: str
    mcpu: str
    features: tuple[str, ...]
    lanes: int
    vector: str
    acc: str
    text: str

    @property
    def attributes(self) -> str:
        """LLVM attributes of every function of the library: equal to its callers', so that it can be inlined."""
        features = f' "target-features"="{",".join(self.features)}"' if self.features else ""
        return f'alwaysinline "target-cpu"="{self.mcpu}"{features}'

    @property
    def triple(self) -> str:
        return f"{'aarch64' if self.name == 'aarch64' else 'x86_64'}-unknown-linux-gnu"

    @property
    def llvm(self) -> str:
        body = self.text.replace("DEFINE", "define weak_odr").replace("@ts_", f"@ts_{self.prefix}_")
        facts = '!0 = !{}\n!1 = !{!"branch_weights", i32 1000, i32 1}'
        return f'target triple = "{self.triple}"\n{body.replace("ATTRS", self.attributes)}\n{facts}\n'

    @property
    def prefix(self) -> str:
        return self.name.replace("-", "_")

    @property
    def acc_lanes(self) -> int:
        return int(self.acc.rpartition("x")[2])

    def zero(self) -> tirx.PrimExpr:
        return T.broadcast(T.float32(0), self.acc_lanes)

    def expand(self, values, bits, half: bool = False) -> tirx.PrimExpr:
        return self._call(self.vector, "expand_half" if half else "expand", values, bits)

    def load(self, weights) -> tirx.PrimExpr:
        return self._call(self.vector, "load", weights)

    def dot(self, x_dtype: str, acc, vector, x) -> tirx.PrimExpr:
        return self._call(self.acc, f"dot_{x_dtype}", acc, vector, x)

    def few(self, acc, mask, values, x) -> tirx.PrimExpr:
        return self._call(self.acc, "few_bfloat16", acc, mask, values, x)

    def few_count(self, mask) -> tirx.PrimExpr:
        return self._call("int64", "few_count", mask)

    def sum(self, acc) -> tirx.PrimExpr:
        return self._call("float32", "sum", acc)

    def prefetch(self, address) -> tirx.PrimExpr:
        return self._call("void", "prefetch", address)

    def _call(self, dtype: str, name: str, *args) -> tirx.PrimExpr:
        return T.call_extern(dtype, f"ts_{self.prefix}_{name}", *args)


_PREFETCH = """
DEFINE void @ts_prefetch(ptr %p) ATTRS {
  call void @llvm.prefetch.p0(ptr %p, i32 0, i32 3, i32 1)
  ret void
}
declare void @llvm.prefetch.p0(ptr, i32, i32, i32)
"""

_AVX512 = """
DEFINE <16 x i32> @ts_expand(ptr %p, i32 %bits) ATTRS {
  ; vpexpandw waits for its destination although it overwrites it all (Zen 5: 5 clocks from one to the next into the
  ; same register, 1 into others); clearing it first costs no time and ends that.
  %v = load <32 x i16>, ptr %p, align 2, !invariant.load !0
  %k = bitcast i32 %bits to <32 x i1>
  %e = call <32 x i16> asm "vpxord $0, $0, $0; vpexpandw $1, $0 {$2} {z}", "=&v,v,^Yk"(<32 x i16> %v, <32 x i1> %k)
  %r = bitcast <32 x i16> %e to <16 x i32>
  ret <16 x i32> %r
}
DEFINE <16 x i32> @ts_expand_half(ptr %p, i32 %bits) ATTRS {
  %h = load <16 x i16>, ptr %p, align 2, !invariant.load !0
  %v = shufflevector <16 x i16> %h, <16 x i16> poison, <32 x i32> <
    i32 0, i32 1, i32 2, i32 3, i32 4, i32 5, i32 6, i32 7,
    i32 8, i32 9, i32 10, i32 11, i32 12, i32 13, i32 14, i32 15,
    i32 poison, i32 poison, i32 poison, i32 poison, i32 poison, i32 poison, i32 poison, i32 poison,
    i32 poison, i32 poison, i32 poison, i32 poison, i32 poison, i32 poison, i32 poison, i32 poison>
  %k = bitcast i32 %bits to <32 x i1>
  %e = call <32 x i16> @llvm.x86.avx512.mask.expand.v32i16(<32 x i16> %v, <32 x i16> zeroinitializer, <32 x i1> %k)
  %r = bitcast <32 x i16> %e to <16 x i32>
  ret <16 x i32> %r
}
DEFINE <16 x float> @ts_few_bfloat16(<16 x float> %acc, ptr %mask, ptr %p, ptr %x) ATTRS {
  ; 64 columns: their numbers are compressed under the mask, x is picked by them, and the values stay as they are.
  ; Two expansions need 6 operations of the two units that shuffle and write masks, this 5, and it reads 32 bytes of
  ; values instead of twice 64 that cross cache lines (Zen 5, 90 % zeros: 1.05 ns against 1.44).
  %m = load i64, ptr %mask, align 4, !invariant.load !0
  %n = call i64 @llvm.ctpop.i64(i64 %m)
  %y = getelementptr i16, ptr %x, i64 32
  %few = icmp ule i64 %n, 16
  br i1 %few, label %pick, label %spread, !prof !1
pick:
  %x0 = load <32 x i16>, ptr %x, align 2, !invariant.load !0
  %x1 = load <32 x i16>, ptr %y, align 2, !invariant.load !0
  %k = bitcast i64 %m to <64 x i1>
  ; -1 after the last. As text, because LLVM would make -1 out of the register's last use and so wait for it,
  %c = call <64 x i8> asm "vmovdqa64 $1, $0; vpcompressb $2, $0 {$3}", "=&v,v,v,^Yk"(
    <64 x i8> splat (i8 -1), <64 x i8> NUMBERS, <64 x i1> %k)
  %h = shufflevector <64 x i8> %c, <64 x i8> poison, <16 x i32> <i32 0, i32 1, i32 2, i32 3, i32 4, i32 5, i32 6, i32 7,
    i32 8, i32 9, i32 10, i32 11, i32 12, i32 13, i32 14, i32 15>
  %i = sext <16 x i8> %h to <16 x i16>
  ; and would make a mask register of this.
  %none = call <16 x i16> asm "vpsraw $$15, $1, $0", "=v,v"(<16 x i16> %i)
  %stored = xor <16 x i16> %none, splat (i16 -1)
  %v = load <16 x i16>, ptr %p, align 2, !invariant.load !0
  %w = and <16 x i16> %v, %stored
  %iz = shufflevector <16 x i16> %i, <16 x i16> zeroinitializer, <32 x i32> <WIDE>
  %wz = shufflevector <16 x i16> %w, <16 x i16> zeroinitializer, <32 x i32> <WIDE>
  %g = call <32 x i16> @llvm.x86.avx512.vpermi2var.hi.512(<32 x i16> %x0, <32 x i16> %iz, <32 x i16> %x1)
  %wb = bitcast <32 x i16> %wz to <32 x bfloat>
  %gb = bitcast <32 x i16> %g to <32 x bfloat>
  %r = call <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float> %acc, <32 x bfloat> %wb, <32 x bfloat> %gb)
  ret <16 x float> %r
spread:
  %low = trunc i64 %m to i32
  %rest = lshr i64 %m, 32
  %high = trunc i64 %rest to i32
  %q = call i32 @llvm.ctpop.i32(i32 %low)
  %o = zext i32 %q to i64
  %p1 = getelementptr i16, ptr %p, i64 %o
  %w0 = call <16 x i32> @ts_expand(ptr %p, i32 %low)
  %w1 = call <16 x i32> @ts_expand(ptr %p1, i32 %high)
  %a = call <16 x float> @ts_dot_bfloat16(<16 x float> %acc, <16 x i32> %w0, ptr %x)
  %b = call <16 x float> @ts_dot_bfloat16(<16 x float> %a, <16 x i32> %w1, ptr %y)
  ret <16 x float> %b
}
DEFINE i64 @ts_few_count(ptr %mask) ATTRS {
  %m = load i64, ptr %mask, align 4, !invariant.load !0
  %n = call i64 @llvm.ctpop.i64(i64 %m)
  ret i64 %n
}
declare i64 @llvm.ctpop.i64(i64)
declare i32 @llvm.ctpop.i32(i32)
declare <32 x i16> @llvm.x86.avx512.vpermi2var.hi.512(<32 x i16>, <32 x i16>, <32 x i16>)
DEFINE <16 x i32> @ts_load(ptr %p) ATTRS {
  %v = load <16 x i32>, ptr %p, align 2, !invariant.load !0
  ret <16 x i32> %v
}
DEFINE <16 x float> @ts_dot_bfloat16(<16 x float> %acc, <16 x i32> %w, ptr %p) ATTRS {
  %x = load <32 x bfloat>, ptr %p, align 2, !invariant.load !0
  %v = bitcast <16 x i32> %w to <32 x bfloat>
  %r = call <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float> %acc, <32 x bfloat> %v, <32 x bfloat> %x)
  ret <16 x float> %r
}
DEFINE <16 x float> @ts_dot_float32(<16 x float> %acc, <16 x i32> %w, ptr %p) ATTRS {
  %q = getelementptr float, ptr %p, i64 16
  %x0 = load <16 x float>, ptr %p, align 4, !invariant.load !0
  %x1 = load <16 x float>, ptr %q, align 4, !invariant.load !0
  %v = bitcast <16 x i32> %w to <32 x i16>
  %h0 = shufflevector <32 x i16> %v, <32 x i16> poison, <16 x i32> <i32 0, i32 1, i32 2, i32 3, i32 4, i32 5,
    i32 6, i32 7, i32 8, i32 9, i32 10, i32 11, i32 12, i32 13, i32 14, i32 15>
  %h1 = shufflevector <32 x i16> %v, <32 x i16> poison, <16 x i32> <i32 16, i32 17, i32 18, i32 19, i32 20, i32 21,
    i32 22, i32 23, i32 24, i32 25, i32 26, i32 27, i32 28, i32 29, i32 30, i32 31>
  %z0 = zext <16 x i16> %h0 to <16 x i32>
  %z1 = zext <16 x i16> %h1 to <16 x i32>
  %s0 = shl <16 x i32> %z0, splat (i32 16)
  %s1 = shl <16 x i32> %z1, splat (i32 16)
  %w0 = bitcast <16 x i32> %s0 to <16 x float>
  %w1 = bitcast <16 x i32> %s1 to <16 x float>
  %a = call <16 x float> @llvm.fma.v16f32(<16 x float> %w0, <16 x float> %x0, <16 x float> %acc)
  %r = call <16 x float> @llvm.fma.v16f32(<16 x float> %w1, <16 x float> %x1, <16 x float> %a)
  ret <16 x float> %r
}
DEFINE float @ts_sum(<16 x float> %acc) ATTRS {
  %r = call reassoc float @llvm.vector.reduce.fadd.v16f32(float 0.0, <16 x float> %acc)
  ret float %r
}
declare float @llvm.vector.reduce.fadd.v16f32(float, <16 x float>)
declare <16 x float> @llvm.fma.v16f32(<16 x float>, <16 x float>, <16 x float>)
declare <32 x i16> @llvm.x86.avx512.mask.expand.v32i16(<32 x i16>, <32 x i16>, <32 x i1>)
declare <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float>, <32 x bfloat>, <32 x bfloat>)
"""


def _lanes(numbers) -> str:
    return ", ".join(f"i32 {number}" for number in numbers)


_AVX512 = _AVX512.replace("NUMBERS", f"<{', '.join(f'i8 {i}' for i in range(64))}>")
_AVX512 = _AVX512.replace("WIDE", _lanes([*range(16), *[16] * 16]))

_EIGHT = """
DEFINE <8 x float> @ts_load(ptr %p) ATTRS {
  %h = load <8 x i16>, ptr %p, align 2, !invariant.load !0
  %z = zext <8 x i16> %h to <8 x i32>
  %s = shl <8 x i32> %z, splat (i32 16)
  %r = bitcast <8 x i32> %s to <8 x float>
  ret <8 x float> %r
}
DEFINE float @ts_sum(<8 x float> %acc) ATTRS {
  %r = call reassoc float @llvm.vector.reduce.fadd.v8f32(float 0.0, <8 x float> %acc)
  ret float %r
}
DEFINE <8 x float> @ts_dot_bfloat16(<8 x float> %acc, <8 x float> %w, ptr %p) ATTRS {
  %h = load <8 x i16>, ptr %p, align 2, !invariant.load !0
  %z = zext <8 x i16> %h to <8 x i32>
  %s = shl <8 x i32> %z, splat (i32 16)
  %x = bitcast <8 x i32> %s to <8 x float>
  MULTIPLY_ADD
  ret <8 x float> %r
}
DEFINE <8 x float> @ts_dot_float32(<8 x float> %acc, <8 x float> %w, ptr %p) ATTRS {
  %x = load <8 x float>, ptr %p, align 4, !invariant.load !0
  MULTIPLY_ADD
  ret <8 x float> %r
}
declare float @llvm.vector.reduce.fadd.v8f32(float, <8 x float>)
declare <8 x float> @llvm.fma.v8f32(<8 x float>, <8 x float>, <8 x float>)
"""

_FMA = "%r = call <8 x float> @llvm.fma.v8f32(<8 x float> %w, <8 x float> %x, <8 x float> %acc)"
_MUL_ADD = "%q = fmul <8 x float> %w, %x\n  %r = fadd <8 x float> %acc, %q"


def _shuffles() -> str:
    """For each 8-bit mask the byte shuffle that spreads 8 values under it: 128 picks a zero."""
    rows = []
    for mask in range(256):
        picks: list[int] = []
        for bit in range(8):
            rank = 2 * (mask & ((1 << bit) - 1)).bit_count()
            picks += [rank, rank + 1] if mask >> bit & 1 else [128, 128]
        rows.append(f"<16 x i8> <{', '.join(f'i8 {pick}' for pick in picks)}>")
    return f"@ts_shuffles = weak_odr constant [256 x <16 x i8>] [{', '.join(rows)}], align 16"


_AVX2 = """
DEFINE <8 x float> @ts_spread(<16 x i8> %v, i32 %bits) ATTRS {
  %i = zext i32 %bits to i64
  %a = getelementptr [256 x <16 x i8>], ptr @ts_shuffles, i64 0, i64 %i
  %s = load <16 x i8>, ptr %a, align 16, !invariant.load !0
  %e = call <16 x i8> @llvm.x86.ssse3.pshuf.b.128(<16 x i8> %v, <16 x i8> %s)
  %h = bitcast <16 x i8> %e to <8 x i16>
  %z = zext <8 x i16> %h to <8 x i32>
  %t = shl <8 x i32> %z, splat (i32 16)
  %r = bitcast <8 x i32> %t to <8 x float>
  ret <8 x float> %r
}
DEFINE <8 x float> @ts_expand(ptr %p, i32 %bits) ATTRS {
  %v = load <16 x i8>, ptr %p, align 2, !invariant.load !0
  %r = call <8 x float> @ts_spread(<16 x i8> %v, i32 %bits)
  ret <8 x float> %r
}
DEFINE <8 x float> @ts_expand_half(ptr %p, i32 %bits) ATTRS {
  %h = load i64, ptr %p, align 2, !invariant.load !0
  %d = insertelement <2 x i64> zeroinitializer, i64 %h, i64 0
  %v = bitcast <2 x i64> %d to <16 x i8>
  %r = call <8 x float> @ts_spread(<16 x i8> %v, i32 %bits)
  ret <8 x float> %r
}
declare <16 x i8> @llvm.x86.ssse3.pshuf.b.128(<16 x i8>, <16 x i8>)
"""

_PLAIN = """
DEFINE <8 x float> @ts_expand(ptr %p, i32 %bits) ATTRS {
  %b = trunc i32 %bits to i8
  %k = bitcast i8 %b to <8 x i1>
  %h = call <8 x i16> @llvm.masked.expandload.v8i16(ptr %p, <8 x i1> %k, <8 x i16> zeroinitializer)
  %z = zext <8 x i16> %h to <8 x i32>
  %s = shl <8 x i32> %z, splat (i32 16)
  %r = bitcast <8 x i32> %s to <8 x float>
  ret <8 x float> %r
}
DEFINE <8 x float> @ts_expand_half(ptr %p, i32 %bits) ATTRS {
  %r = call <8 x float> @ts_expand(ptr %p, i32 %bits)
  ret <8 x float> %r
}
declare <8 x i16> @llvm.masked.expandload.v8i16(ptr, <8 x i1>, <8 x i16>)
"""

ISAS = {
    isa.name: isa
    for isa in (
        Isa(
            "avx512", "x86-64-v4", ("+avx512vbmi2", "+avx512bf16"), 32, "int32x16", "float32x16", _AVX512 + _PREFETCH
        ),
        Isa(
            "avx2", "x86-64-v3", (), 8, "float32x8", "float32x8",
            _shuffles() + _EIGHT.replace("MULTIPLY_ADD", _FMA) + _AVX2 + _PREFETCH,
        ),
        Isa(
            "x86-64", "x86-64", (), 8, "float32x8", "float32x8",
            _EIGHT.replace("MULTIPLY_ADD", _MUL_ADD) + _PLAIN + _PREFETCH,
        ),
        Isa(  # emitted and inspected, never run
            "aarch64", "generic", (), 8, "float32x8", "float32x8",
            _EIGHT.replace("MULTIPLY_ADD", _FMA) + _PLAIN + _PREFETCH,
        ),
    )
}  # fmt: skip
