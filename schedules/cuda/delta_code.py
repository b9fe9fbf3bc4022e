"""The CUDA of the delta kernel: how a lane reads a chunk, multiplies it, ends a segment, and adds a row's parts."""

from __future__ import annotations

from tvm_sparse.formats.delta_chunks import PLACE, SLOTS, bits_of, spare_bit, words_of

LOAD = """
__device__ __forceinline__ uint4 tvms_stream_load(const void* words, int step, int ahead) {
  // Read once, by this SM alone: first to leave L2, where x is to stay. Volatile and not .nc, which ptxas would let
  // sink below the wait for the kernel before.
  uint4 w;
  asm volatile("ld.global.cs.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(w.x), "=r"(w.y), "=r"(w.z), "=r"(w.w) : "l"((const char*)words + 512ll * step + 512 * ahead));
  return w;
}
"""

IN_ORDER = """
__device__ __forceinline__ void tvms_in_order() {
  // ptxas would move loads of global memory behind what follows them, to save registers.
  __syncwarp();
}
"""

EARLY = """
__device__ __forceinline__ unsigned tvms_early_load(const void* from) {
  unsigned v;
  asm volatile("ld.global.u32 %0, [%1];" : "=r"(v) : "l"(from));
  return v;
}
"""

SCALE = """
#ifndef TVMS_SCALE_X
#define TVMS_SCALE_X
__device__ __forceinline__ float tvms_scale_x(float x) {
  // 2^96 x; 2^32 and more would leave float32 and is clamped there.
  return fminf(fmaxf(x * 79228162514264337593543950336.f, -3.402823466e38f), 3.402823466e38f);
}
#endif
"""

READ = """
#ifndef TVMS_READ_X
#define TVMS_READ_X
// x is another kernel's work: volatile, so that no read of it moves before the wait for that kernel.
__device__ __forceinline__ uint4 tvms_read_8(const void* x) {
  uint4 v;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(x));
  return v;
}
__device__ __forceinline__ float2 tvms_read_pair(const float* from) {
  float2 v;
  asm volatile("ld.global.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "l"(from));
  return v;
}
__device__ __forceinline__ float tvms_read_x(const nv_bfloat16* x) {
  unsigned short v;
  asm volatile("ld.global.u16 %0, [%1];" : "=h"(v) : "l"(x));
  return __uint_as_float((unsigned)v << 16);
}
__device__ __forceinline__ float tvms_read_x(const float* x) {
  float v;
  asm volatile("ld.global.f32 %0, [%1];" : "=f"(v) : "l"(x));
  return v;
}
#endif
"""


def _first_pair(width: int) -> str:
    """Lanes begin with different columns, which keeps what a warp stores at a time on different banks."""
    return f"threadIdx.x >> { {1: 2, 2: 1}.get(width, 0)} & 3"


def weight_code(copies: int) -> tuple[str, str]:
    """Name and source of the function that reads the norm's weights of 4 out of 8 columns, first those that
    `stage_code` takes first.
    """
    name = f"tvms_norm_weights_c{copies}"
    source = f"""
__device__ __forceinline__ float4 {name}(const float* from, int half) {{
  int turn = ({_first_pair(copies)}) + 2 * half;
  float2 a = tvms_read_pair(from + 2 * (turn & 3)), b = tvms_read_pair(from + 2 * (turn + 1 & 3));
  return make_float4(a.x, a.y, b.x, b.y);
}}
"""
    return name, READ + source


def stage_code(tile: int, copies: int, normed: bool = False) -> tuple[str, str]:
    """Name and source of the function that scales 8 columns of `tile` tokens and stores each `copies` times.

    Where one token is to be `normed` it is multiplied with the norm's weights first, and the sum of its squares added.
    """
    name = f"tvms_stage_t{tile}_c{copies}" + ("_normed" if normed else "")
    width = tile * copies
    lines = [f"  int turn = {_first_pair(width)}, at;", "  uint4 u;"]
    lines += [f"  float {column}{token};" for token in range(tile) for column in "ab"]
    lines += [f"  unsigned p{token}[4];" for token in range(tile)]
    for token in range(tile):
        lines.append(f"  u = turn & 1 ? make_uint4({', '.join(f'v[{token}].{i}' for i in 'yzwx')}) : v[{token}];")
        for i, (straight, turned) in enumerate(zip("xyzw", "zwxy", strict=True)):
            lines.append(f"  p{token}[{i}] = turn & 2 ? u.{turned} : u.{straight};")
    if width >= 4:
        lines.append("  int second = threadIdx.x >> 2 & 1;")
    for j in range(4):
        lines.append(f"  at = ({j} + turn & 3) * {2 * width};")
        for token in range(tile):
            lines.append(f"  a{token} = __uint_as_float(p{token}[{j}] << 16);")
            lines.append(f"  b{token} = __uint_as_float(p{token}[{j}] & 0xffff0000u);")
            if normed:
                lines.append("  *squares = fmaf(a0, a0, fmaf(b0, b0, *squares));")
                half, (first, second) = j // 2, ("xy", "zw")[j % 2]
                lines.append(f"  a0 *= weight{half}.{first}, b0 *= weight{half}.{second};")
            lines += [f"  {column}{token} = tvms_scale_x({column}{token});" for column in "ab"]
        column = {c: [f"{c}{token}" for _ in range(copies) for token in range(tile)] for c in "ab"}
        if width == 1:
            lines.append("  *(float2*)(to + at) = make_float2(a0, b0);")
        elif width == 2:
            lines.append(f"  *(float4*)(to + at) = make_float4({', '.join(column['a'] + column['b'])});")
        else:
            for order in ("", "!"):
                for i in range(0, width, 4):
                    a, b = (f"make_float4({', '.join(column[c][i : i + 4])})" for c in "ab")
                    place = f"to + at + ({order}second ? {width} : 0) + {i}"
                    lines.append(f"  *(float4*)({place}) = {order}second ? {b} : {a};")
    body = "\n".join(lines)
    more = ", float4 weight0, float4 weight1, float* squares" if normed else ""
    return name, f"{SCALE}__device__ __forceinline__ void {name}(const uint4* v, float* to{more}) {{\n{body}\n}}\n"


SHARED = """
#ifndef TVMS_SHARED
#define TVMS_SHARED
// Shared memory by address, which leaves the address of x to the offset of the instruction.
__device__ __forceinline__ int tvms_address(const void* shared) {
  return (int)__cvta_generic_to_shared(shared);
}
__device__ __forceinline__ float tvms_get(int at) {
  float v;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(at));
  return v;
}
__device__ __forceinline__ float2 tvms_get2(int at) {
  float2 v;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(at));
  return v;
}
__device__ __forceinline__ float4 tvms_get4(int at) {
  float4 v;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(at));
  return v;
}
__device__ __forceinline__ void tvms_put(int at, float value) {
  asm volatile("st.shared.f32 [%0], %1;" :: "r"(at), "f"(value) : "memory");
}
#endif
"""


def end_code(tile: int) -> tuple[str, str]:
    """Name and source of what follows a unit: where the value of its last word is -0.0 the sums become part `part` (an
    address), and the next segment starts at `first`, `back` bytes before it.
    """
    name = f"tvms_end_t{tile}"
    stores = "".join(f"@p st.shared.f32 [%1+{4 * i}], %{2 + i}; " for i in range(tile))
    clears = "".join(f"@p mov.f32 %{2 + i}, 0f00000000; " for i in range(tile))
    sums = ", ".join(f'"+f"(sum[{i}])' for i in range(tile))
    body = f"""
__device__ __forceinline__ void {name}(unsigned value, int first, int back, int* at, int* part, float* sum) {{
  asm volatile(
      "{{.reg .pred p; setp.eq.u32 p, %{2 + tile}, 0x80000000; {stores}@p add.s32 %1, %1, {4 * tile}; {clears}"
      "@p sub.s32 %0, %{3 + tile}, %{4 + tile};}}"
      : "+r"(*at), "+r"(*part), {sums} : "r"(value), "r"(first), "r"(back));
}}
"""
    return name, body


def chunk_code(gap_bits: int, tile: int, width: int, unit: int) -> tuple[str, str]:
    """Name and source of the function that multiplies one lane's chunk with `tile` tokens; a class column is `width`
    numbers from the next.

    `at` is the address of the class column after the last word's, `past` bytes before it: within a group of chunks it
    stays as it is, so that the j-th word adds its gap - 1 to it and reads at the constant offset past + j. Each gap
    stands within a byte of its register: masked in place, both of a register at a time, a scalar product of bytes
    shifts one and adds it.
    """
    step = 4 * width
    value = 0x80000000 | (((1 << (bits_of(unit) + 15 - gap_bits)) - 1) & 0xFFFF0000)
    name = f"tvms_delta_g{gap_bits}_t{tile}_w{width}_u{unit}"
    vector = min(tile, 4)
    end, end_source = end_code(tile)
    lines: list[str] = []
    count = 0

    def word(fields: str, byte: int, value_bits: str, field_shift: int) -> None:
        """`fields`: the gap alone in its byte, `field_shift` bits up."""
        nonlocal count
        factor = step / (1 << field_shift)
        shift = max(0, field_shift - step.bit_length() + 1)  # where columns are fewer bytes apart than the field counts
        shifted = f"({fields} >> {shift})" if shift else fields
        factor = step << shift >> field_shift
        most = min(factor, 128)
        added = f"__dp4a({shifted}, {most << 8 * byte:#x}u, {'(unsigned)*at' if most == factor else '0u'})"
        lines.append(f"  *at = {added};" if most == factor else f"  *at += {added} * {factor // most};")
        offset = count * step
        lines.append(f"  v = {value_bits} & {value:#x}u;")
        for quad in range(-(-tile // 4)):
            lines.append(f"  a = tvms_get{vector if vector > 1 else ''}(*at + past + {offset + 16 * quad});")
            for i in range(vector):
                x = "a" if tile == 1 else f"a.{'xyzw'[i]}"
                lines.append(f"  sum[{4 * quad + i}] = fmaf(__uint_as_float(v), {x}, sum[{4 * quad + i}]);")
        count += 1
        if count % unit == 0:
            lines.append(f"  {end}(v, first, past + {offset + step}, at, part, sum);")

    field = (1 << gap_bits) - 1
    if words_of(unit) > SLOTS:
        lines += spread_code(gap_bits)
        lines.append(f"  m = spread & {field << 31 - gap_bits:#x}u;")
        word("m", 3, "spread", 7 - gap_bits)
    for register, name_of in enumerate("xyzw"):
        low = gap_place(register, gap_bits, unit)
        lines.append(f"  m = w.{name_of} & {0x01000100 * (field << low):#x}u;")
        word("m", 1, f"(w.{name_of} << 16)", low)
        word("m", 3, f"w.{name_of}", low)
    body = "\n".join(lines)
    kind = {1: "float", 2: "float2", 4: "float4"}[vector]
    source = f"""{SHARED}#ifndef {name.upper()}
#define {name.upper()}
#ifndef {end.upper()}
#define {end.upper()}{end_source}#endif
__device__ __forceinline__ void {name}(uint4 w, int past, int* at, int* part, float* sum, int first) {{
  unsigned v, m;
  {kind} a;
{body}
}}
#endif
"""
    return name, source


def place_code(gap_bits: int, unit: int, step: int) -> tuple[str, str]:
    """Name and source of a type that knows a chunk: `ends` where this register is the last of a segment's, `passed`
    columns in all, and `put`, which stores its values in a row whose columns of a class are `step` bytes apart.

    `at` is the place of the column after the last word's; gaps are added as in `chunk_code`.
    """
    name = f"tvms_chunk_g{gap_bits}_u{unit}_s{step}"
    field, magnitude = (1 << gap_bits) - 1, (1 << (bits_of(unit) - 1 - gap_bits)) - 1
    passed: list[str] = []
    put: list[str] = ["    unsigned m, v;"]
    count = 0

    def word(byte: int, low: int, high: bool, of: str) -> None:
        """Its gap alone in byte `byte` of m, `low` bits up; its value in half of v, as of register `of`."""
        nonlocal count
        shift = max(0, low - step.bit_length() + 1)
        factor = (step << shift >> low) << 8 * byte
        there = f"{of} & {magnitude << (16 if byte == 3 else 0):#x}u"
        put.append(f"    at = (int)__dp4a({f'm >> {shift}' if shift else 'm'}, {factor:#x}u, (unsigned)at);")
        put.append(f"    if ({there}) *(ushort*)(row + at + {count * step}) = (ushort)({'v >> 16' if high else 'v'});")
        count += 1

    def body(lines: list[str]) -> str:
        return "\n".join(f"    {line.strip()}" for line in lines)

    if words_of(unit) > SLOTS:
        passed += [*spread_code(gap_bits), f"  columns += spread >> {31 - gap_bits} & {field};"]
        put += [*spread_code(gap_bits), f"  m = spread & {field << 31 - gap_bits:#x}u;"]
        put.append(f"  v = (spread >> 16 & {0x8000 | magnitude:#x}u) + base;")
        word(3, 7 - gap_bits, False, "spread")
    lows = [gap_place(register, gap_bits, unit) for register in range(4)]
    for of, low in zip("xyzw", lows, strict=True):
        mask = 0x01000100 * (field << low)
        passed.append(f"  sum{low} = __dp4a(w.{of} & {mask:#x}u, 0x01000100u, sum{low});")
        put += [f"  m = w.{of} & {mask:#x}u;", f"  v = (w.{of} & {0x00010001 * (0x8000 | magnitude):#x}u) + base;"]
        word(1, low, False, f"w.{of}")
        word(3, low, True, f"w.{of}")
    passed[:0] = [f"  unsigned sum{low} = 0;" for low in sorted(set(lows))]
    passed += [f"  columns += sum{low} >> {low};" for low in sorted(set(lows))]
    source = f"""
#ifndef {name.upper()}
#define {name.upper()}
struct {name} {{
  enum {{ UNIT = {unit}, WORDS = {words_of(unit)}, UNITS = {words_of(unit) // unit} }};
  static __device__ __forceinline__ bool ends(unsigned last) {{
    return (last >> 16 & {0x8000 | magnitude:#x}) == 0x8000;
  }}
  static __device__ __forceinline__ int passed(uint4 w) {{
    unsigned columns = WORDS;
{body(passed)}
    return (int)columns;
  }}
  // base: of both halves.
  static __device__ __forceinline__ void put(uint4 w, unsigned base, char* row, int& at) {{
{body(put)}
    at += {count * step};
  }}
}};
#endif
"""
    return name, source


def gap_place(register: int, gap_bits: int, unit: int) -> int:
    """Where in its byte, the upper one of its slot, a gap begins."""
    return 7 - gap_bits - (2 if words_of(unit) > SLOTS and spare_bit(register, gap_bits) == 5 else 0)


def spread_code(gap_bits: int) -> list[str]:
    """The first of 9 words, whose bits stand two by two in the slots of the others, as the upper half of `spread`."""
    shifts: dict[int, str] = {}
    taken: dict[int, int] = {}
    for register, name in enumerate("xyzw"):
        spare = spare_bit(register, gap_bits)
        shift = PLACE[register] - spare
        mask = 0x03000300 << spare
        if shift in shifts:
            shifts[shift] = f"({shifts[shift]} & {~mask & 0xFFFFFFFF:#x}u | w.{name} & {mask:#x}u)"
        else:
            shifts[shift] = f"w.{name}"
        taken[shift] = taken.get(shift, 0) | 0x03000300 << PLACE[register]
    lines = ["  unsigned spread;"]
    for shift, bits in shifts.items():
        moved = f"({bits} << {shift})" if shift > 0 else f"({bits} >> {-shift})" if shift else bits
        if len(lines) == 1:
            lines.append(f"  spread = {moved};")
        else:
            lines.append(f"  spread = spread & {~taken[shift] & 0xFFFFFFFF:#x}u | {moved} & {taken[shift]:#x}u;")
    return [*lines, "  spread = __byte_perm(spread, 0, 0x3100);"]


CLASS_SUM = """
#ifndef TVMSCLASS_SUM
#define TVMSCLASS_SUM
__device__ __forceinline__ float tvms_class_sum(float value, int lanes) {
  // Over neighbouring lanes, in a fixed tree.
  for (int step = lanes / 2; step > 0; step >>= 1) value += __shfl_xor_sync(0xffffffffu, value, step);
  return value;
}
#endif
"""

NEXT_ROW = """
__device__ __forceinline__ float tvms_next_row(float value, int lanes) {
  // For an even row: what the lanes of the row after it have.
  return __shfl_xor_sync(0xffffffffu, value, lanes);
}
"""


def row_code(classes: int, each: int, tile: int) -> tuple[str, str]:
    """Name and source of the function that adds the parts of `each` classes of a row.

    `first`: where the row's parts of each class begin, then where the next row's do. Nearly all segments have one or
    two parts: those are read without waiting for one another.
    """
    name = f"tvms_row_{classes}_{each}_t{tile}"
    source = f"""
__device__ __forceinline__ void {name}(const ushort* first, const float* parts, float* total) {{
  int a[{each}], b[{each}];
#pragma unroll
  for (int k = 0; k < {each}; ++k) {{
    a[k] = first[k];
    b[k] = first[{classes} + k];
  }}
#pragma unroll
  for (int t = 0; t < {tile}; ++t) {{
    float own = 0.f, cut = 0.f;
#pragma unroll
    for (int k = 0; k < {each}; ++k) {{
      own += parts[a[k] * {tile} + t];
      cut += b[k] - a[k] > 1 ? parts[(a[k] + 1) * {tile} + t] : 0.f;
    }}
    total[t] = own + cut;
  }}
  for (int k = 0; k < {each}; ++k)
    for (int p = a[k] + 2; p < b[k]; ++p)
      for (int t = 0; t < {tile}; ++t) total[t] += parts[p * {tile} + t];
}}
"""
    return name, source
