"""y = x W^T with W as a delta stream: the kernel of batch 1 on a GPU.

A CTA owns a bin, all CTAs are there at once, every lane walks one stream of the bin. The first chunks are on their way
before x is staged: x stands in shared memory as float32 times 2^96, token by token side by side, with the format's
zeros after it. Where a row ends, a lane puts its sum away as a part and goes on with the next; the parts of a row are
added in order, so two runs agree bit for bit, and the bins' order is undone at the store. The residual is added from x
itself.
"""

from __future__ import annotations

from collections.abc import Mapping

import tvm
from tvm.script import tirx as T

from tvm_sparse.formats.delta import Delta
from tvm_sparse.formats.delta_bins import slots
from tvm_sparse.schedules.cuda.device_code import WARP, f32, symbol
from tvm_sparse.schedules.cuda.token_tile import SHARED_LIMIT, tile_decision, tokens_of
from tvm_sparse.schedules.spec import KernelSpec
from tvm_sparse.schedules.table import Decision

# Programmatic dependent launch (CUDA): the kernel starts while the one before still runs, and waits for it itself.
LAUNCH_PARAMS, PROGRAMMATIC = "tirx.kernel_launch_params", ["tirx.use_programtic_dependent_launch"]

_LOAD = """
__device__ __forceinline__ uint4 tvms_stream_load(const void* words, int step) {
  // Read once, by this SM alone: past L1. Volatile and not .nc, which ptxas would let sink below the wait for the
  // kernel before.
  uint4 w;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(w.x), "=r"(w.y), "=r"(w.z), "=r"(w.w) : "l"((const char*)words + 512ll * step));
  return w;
}
"""

_EARLY = """
__device__ __forceinline__ unsigned tvms_early_load(const void* from) {
  unsigned v;
  asm volatile("ld.global.u32 %0, [%1];" : "=r"(v) : "l"(from));
  return v;
}
"""

_SCALE = """
#ifndef TVMS_SCALE_X
#define TVMS_SCALE_X
__device__ __forceinline__ float tvms_scale_x(float x) {
  // 2^96 x; 2^32 and more would leave float32 and is clamped there.
  return fabsf(x) < 4294967296.f ? x * 79228162514264337593543950336.f : copysignf(3.0e38f, x);
}
#endif
"""

_READ = """
#ifndef TVMS_READ_X
#define TVMS_READ_X
// x is another kernel's work: volatile, so that no read of it moves before the wait for that kernel.
__device__ __forceinline__ unsigned tvms_read_pair(const void* x) {
  unsigned v;
  asm volatile("ld.global.u32 %0, [%1];" : "=r"(v) : "l"(x));
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


def stage_code(tile: int, copies: int) -> tuple[str, str]:
    """Name and source of the function that scales two columns of `tile` tokens and stores each `copies` times.

    Lanes that store one token several times begin at different places, which keeps them on different banks.
    """
    name = f"tvms_stage_t{tile}_c{copies}"
    scaled = [
        f"  float {column}{token} = tvms_scale_x(__uint_as_float({bits.format(token)}));"
        for token in range(tile)
        for column, bits in (("a", "v[{}] << 16"), ("b", "v[{}] & 0xffff0000u"))
    ]
    stored = [f"{column}{token}" for column in "ab" for _ in range(copies) for token in range(tile)]
    quads = [f"make_float4({', '.join(stored[i : i + 4])})" for i in range(0, len(stored), 4)]
    if len(stored) == 2:
        lines = ["  *(float2*)to = make_float2(a0, b0);"]
    elif tile == 1 and copies >= 4:
        lines = []
        for i in range(len(quads)):
            lines.append(f"  q = ({i} + (threadIdx.x >> {4 - len(quads).bit_length()})) & {len(quads) - 1};")
            lines.append(f"  f = q < {len(quads) // 2} ? a0 : b0;")
            lines.append("  ((float4*)to)[q] = make_float4(f, f, f, f);")
        lines.insert(0, "  int q;\n  float f;")
    else:
        lines = [f"  ((float4*)to)[{i}] = {quad};" for i, quad in enumerate(quads)]
    body = "\n".join([*scaled, *lines])
    return name, f"{_SCALE}__device__ __forceinline__ void {name}(const unsigned* v, float* to) {{\n{body}\n}}\n"


def chunk_code(gap_bits: int, tile: int, copies: int = 1) -> tuple[str, str]:
    """Name and source of the function that turns one lane's 8 words into `tile` sums; x stands there `copies` times.

    `at` is the byte offset of the column after the last word's, so that the j-th word of the chunk adds its gap - 1
    to it and reads at the constant offset j. The field is masked in place; as the upper half of a product its shift and
    the addition are one instruction.
    """
    column = 4 * tile * copies
    log = column.bit_length() - 1
    gap = (1 << gap_bits) - 1
    value = 0x80000000 | (((1 << (31 - gap_bits)) - 1) & 0xFFFF0000)
    name = f"tvms_delta_g{gap_bits}_t{tile}_c{copies}"
    vector = {1: "float", 2: "float2", 4: "float4", 8: "float4"}[tile]
    parts = ["x"] if tile == 1 else list("xyzw"[: min(tile, 4)])
    lines = []
    for j in range(8):
        word = f"w.{'xyzw'[j // 2]}"
        low = j % 2 == 0
        shift = (15 if low else 31) - gap_bits
        lines.append(f"  at += __umulhi({word} & {gap << shift:#x}u, {1 << (32 - shift + log):#x}u);")
        lines.append(f"  v = __uint_as_float({f'({word} << 16)' if low else word} & {value:#x}u);")
        for quad in range(-(-tile // 4)):
            lines.append(f"  a = *(const {vector}*)(x + at + {j * column + 16 * quad});")
            for i, part in enumerate(parts):
                element = "a" if tile == 1 else f"a.{part}"
                lines.append(f"  sum[{4 * quad + i}] = fmaf(v, {element}, sum[{4 * quad + i}]);")
    body = "\n".join(lines)
    source = f"""
__device__ __forceinline__ void {name}(uint4 w, const float* staged, int* place, float* sum) {{
  const char* x = (const char*)staged;
  unsigned at = *place;
  float v;
  {vector} a;
{body}
  *place = at + {8 * column};
}}
"""
    return name, source


def row_code(tile: int) -> tuple[str, str]:
    """Name and source of what a lane does before a chunk: where its row ends here, the sum is put away as a part.

    `row`: the step at which the row ends, the row's rank, and the chunk of the bin at which step 0 would stand.
    Rows without words end where they begin. `place` goes from column 0 at `first` to column K at `first + last`, where
    it is held: only padding would go beyond.
    """
    name = f"tvms_delta_row_t{tile}"
    source = f"""
__device__ __forceinline__ void {name}(
    const int* ends, float* parts, int step, int* row, int* place, float* sum, int first, int last) {{
  if (row[0] == step) {{
    do {{
      for (int i = 0; i < {tile}; ++i) {{
        parts[row[1] * {tile} + i] = sum[i];
        sum[i] = 0.f;
      }}
      row[1] += 1;
      row[0] = ends[row[1]] - row[2];
    }} while (row[0] == step);
    *place = first;
  }}
  *place = min(*place, first + last);
}}
"""
    return name, source


def space(spec: KernelSpec) -> tuple[Decision, ...]:
    """`tile` tokens a CTA, `depth` chunks in flight a lane, x in `copies`, `overlap` with the kernel before."""
    return (
        tile_decision(spec, spec.k + Delta.PAST(spec.choice) + _parts(spec)),
        Decision("depth", (2, 3, 4, 6), 4),
        Decision("copies", (1, 2, 4, 8), 4 if spec.m == 1 else 1),
        Decision("overlap", (0, 1), 1),
    )


def _fitting(spec: KernelSpec, tile: int, copies: int) -> int:
    """As many copies as are wanted, or have room."""
    columns = spec.k + Delta.PAST(spec.choice)
    while copies > 1 and 4 * tile * (copies * columns + _parts(spec)) > SHARED_LIMIT:
        copies //= 2
    return copies


def _parts(spec: KernelSpec) -> int:
    """Numbers a token's parts of rows take in a bin."""
    return spec.choice.option("warps") * WARP + slots(spec.n, spec.choice.option("bins"))


def build(spec: KernelSpec, decisions: Mapping[str, int]) -> tvm.tirx.PrimFunc:
    """(x [m, k], words, lanes, rows, scale, res_col, res_val, y [m, n])."""
    n, k, m = spec.n, spec.k, tokens_of(spec)
    gap_bits, bins, warps = (spec.choice.option(key) for key in ("gap_bits", "bins", "warps"))
    tile, depth, overlap = (decisions[key] for key in ("tile", "depth", "overlap"))
    copies = _fitting(spec, tile, decisions["copies"])
    width = tile * copies  # numbers a column takes; lanes share the copies, which halves or quarters their conflicts
    room, threads = slots(n, bins), warps * WARP
    padded = -(-(k + Delta.PAST(spec.choice)) // 8) * 8
    parts = padded * width  # where the parts begin, and after them the table of rows
    table = parts + -(-_parts(spec) * tile // 4) * 4
    steps, extra = symbol("steps"), symbol("nr")
    function, source = chunk_code(gap_bits, tile, copies)
    turn_name, turn_source = row_code(tile)
    stage_name, stage_source = stage_code(tile, copies)
    pairs = spec.x_dtype == "bfloat16" and k % 2 == 0
    turns = -(-k // (2 * threads))  # a thread reads 2 columns at a time, several times `together` before it waits
    together = min(turns, max(1, 12 // tile))

    def load(words, bin, lane, step):
        return T.cuda.func_call(
            "tvms_stream_load",
            T.address_of(words[bin, 0, lane, 0]),
            step,
            source_code=_LOAD,
            return_type="uint32x4",
        )

    def early(element):
        return T.cuda.func_call("tvms_early_load", T.address_of(element), source_code=_EARLY, return_type="uint32")

    def multiply(ring, shared, place, sums, d):
        pointers = [T.address_of(buffer[0]) for buffer in (shared, place, sums)]
        return T.evaluate(T.cuda.func_call(function, ring[d], *pointers, source_code=source))

    def turn_row(own, shared, step, stream, flip, place, sums, origin):
        ends, part = T.address_of(own[table + room]), T.address_of(shared[parts + stream * tile])
        pointers = [T.address_of(buffer[0]) for buffer in (flip, place, sums)]
        call = T.cuda.func_call(turn_name, ends, part, step, *pointers, origin, 4 * width * k, source_code=turn_source)
        return T.evaluate(call)

    def read_pair(x, token, column):
        where = T.address_of(x[token, column])
        return T.cuda.func_call("tvms_read_pair", where, source_code=_READ, return_type="uint32")

    def read(x, token, column):
        where = T.address_of(x[token, column])
        return T.cuda.func_call("tvms_read_x", where, source_code=_READ, return_type="float32")

    def stage_pair(pair, first, shared, column):
        pointers = T.address_of(pair[first]), T.address_of(shared[column * width])
        return T.evaluate(T.cuda.func_call(stage_name, *pointers, source_code=stage_source))

    def scaled(value):
        return T.cuda.func_call("tvms_scale_x", value, source_code=_SCALE, return_type="float32")

    @T.prim_func(s_tir=True)
    def matmul_delta(
        x: T.Buffer((m, k), spec.x_dtype),
        words: T.Buffer((bins, steps, WARP, 8), "uint16"),
        lanes: T.Buffer((bins, threads), "uint32"),
        rows: T.Buffer((bins, 4, room), "int32"),
        scale: T.Buffer((1,), "int32"),
        res_col: T.Buffer((extra,), "int32"),
        res_val: T.Buffer((extra,), "bfloat16"),
        y: T.Buffer((m, n), spec.out_dtype),
    ):
        bin = T.launch_thread("blockIdx.x", bins)
        tiles = T.launch_thread("blockIdx.y", T.ceildiv(m, tile))
        thread = T.launch_thread("threadIdx.x", threads)
        lane: T.let[T.int32] = thread % WARP
        origin: T.let[T.int32] = thread % copies * (4 * tile)  # of the lane's copy of x
        warp: T.let[T.int32] = thread // WARP
        # One buffer for all: as several, the allocator would lay parts over x while other warps still read it.
        shared = T.alloc_buffer((table + 4 * room,), "float32", scope="shared.dyn")
        own = T.decl_buffer((table + 4 * room,), "int32", data=shared.data, scope="shared.dyn")
        flat = T.decl_buffer((bins, 4 * room), "int32", data=rows.data)
        ring = T.alloc_buffer((depth,), "uint32x4", scope="local")
        pair = T.alloc_buffer((together * tile,), "uint32", scope="local")
        step = T.alloc_buffer((2,), "int32", scope="local")  # next to multiply, end
        start = T.alloc_buffer((1,), "uint32", scope="local")
        flip = T.alloc_buffer((3,), "int32", scope="local")  # step at which the row ends, its rank, chunk of step 0
        place = T.alloc_buffer((1,), "int32", scope="local")
        sums = T.alloc_buffer((tile,), "float32", scope="local")
        row = T.alloc_buffer((1,), "int32", scope="local")
        first = T.alloc_buffer((2,), "int32", scope="local")
        rest = T.alloc_buffer((2,), "int32", scope="local")
        total = T.alloc_buffer((1,), "float32", scope="local")
        left = T.alloc_buffer((1,), "float32", scope="local")
        base = T.alloc_buffer((1,), "int32", scope="local")

        if T.bool(overlap == 1):
            T.evaluate(T.ptx["griddepcontrol.launch_dependents"]())
        step[0] = T.cast(steps, "int32") * warp // warps
        step[1] = T.cast(steps, "int32") * (warp + 1) // warps
        for d in T.unroll(depth):
            if step[0] + d < step[1]:
                ring[d] = load(words, bin, lane, step[0] + d)
        start[0] = early(lanes[bin, thread])
        base[0] = T.reinterpret("int32", early(scale[0]))
        for turn in T.unroll(T.ceildiv(room, threads)):
            if turn * threads + thread < room:
                T.evaluate(
                    T.ptx["cp.async.cg.shared.global"](
                        T.address_of(own[table + (turn * threads + thread) * 4]),
                        T.address_of(flat[bin, (turn * threads + thread) * 4]),
                        16,
                    )
                )
        flip[1] = T.cast(T.shift_right(start[0], T.uint32(16)), "int32")
        place[0] = T.cast(T.bitwise_and(start[0], T.uint32(0xFFFF)), "int32") * (4 * width) + origin
        flip[2] = step[0] * WARP + lane * (step[1] - step[0]) - step[0]

        if T.bool(overlap == 1):  # weights never depend on the kernel before, x does
            T.evaluate(T.ptx["griddepcontrol.wait"]())
        if T.bool(pairs):
            for block in range(T.ceildiv(turns, together)):
                for turn in T.unroll(together):
                    if ((block * together + turn) * threads + thread) * 2 < k:
                        for token in T.unroll(tile):
                            pair[turn * tile + token] = T.uint32(0)
                            if tiles * tile + token < m:
                                pair[turn * tile + token] = read_pair(
                                    x, tiles * tile + token, ((block * together + turn) * threads + thread) * 2
                                )
                for turn in T.unroll(together):
                    if ((block * together + turn) * threads + thread) * 2 < k:
                        stage_pair(pair, turn * tile, shared, ((block * together + turn) * threads + thread) * 2)
        else:
            for token in T.unroll(tile):
                for turn in range(T.ceildiv(k, threads)):
                    if turn * threads + thread < k:
                        left[0] = T.float32(0)
                        if tiles * tile + token < m:
                            left[0] = scaled(read(x, tiles * tile + token, turn * threads + thread))
                        for copy in T.unroll(copies):
                            shared[(turn * threads + thread) * width + copy * tile + token] = left[0]
        for turn in range(T.ceildiv((padded - k) * width, threads)):
            if turn * threads + thread < (padded - k) * width:
                shared[k * width + turn * threads + thread] = T.float32(0)
        T.evaluate(T.ptx["cp.async.wait_all"]())
        T.tvm_storage_sync("shared.dyn")

        flip[0] = own[table + room + flip[1]] - flip[2]
        for token in T.unroll(tile):
            sums[token] = T.float32(0)
        # A chunk's registers are refilled only once it is multiplied: a copy would wait for the load it is to hide.
        while step[0] + 2 * depth <= step[1]:
            for d in T.unroll(depth):
                turn_row(own, shared, step[0] + d, thread, flip, place, sums, origin)
                multiply(ring, shared, place, sums, d)
                ring[d] = load(words, bin, lane, step[0] + d + depth)
            step[0] = step[0] + depth
        while step[0] < step[1]:
            for d in T.unroll(depth):
                if step[0] + d < step[1]:
                    turn_row(own, shared, step[0] + d, thread, flip, place, sums, origin)
                    multiply(ring, shared, place, sums, d)
                if step[0] + d + depth < step[1]:
                    ring[d] = load(words, bin, lane, step[0] + d + depth)
            step[0] = step[0] + depth
        for token in T.unroll(tile):
            shared[parts + (thread + flip[1]) * tile + token] = sums[token]
        T.tvm_storage_sync("shared.dyn")

        for turn in range(T.ceildiv(room, threads)):
            if turn * threads + thread < room - 1:
                row[0] = own[table + turn * threads + thread]
                first[0] = own[table + 2 * room + turn * threads + thread]
                first[1] = own[table + 2 * room + turn * threads + thread + 1]
                rest[0] = own[table + 3 * room + turn * threads + thread]
                rest[1] = own[table + 3 * room + turn * threads + thread + 1]
                if row[0] >= 0:
                    for token in T.unroll(tile):
                        if tiles * tile + token < m:
                            total[0] = T.float32(0)
                            for p in range(first[1] - first[0]):
                                total[0] += shared[parts + (first[0] + p) * tile + token]
                            left[0] = T.float32(0)
                            for p in range(rest[1] - rest[0]):
                                left[0] += f32(res_val[rest[0] + p]) * read(
                                    x, tiles * tile + token, res_col[rest[0] + p]
                                )
                            # 2^(base - 96), built as the exponent field of a float32
                            y[tiles * tile + token, row[0]] = T.cast(
                                total[0]
                                * T.reinterpret(
                                    "float32", T.shift_left(base[0] + (127 - 96), T.int32(23))
                                )
                                + left[0],
                                spec.out_dtype,
                            )

    if overlap:
        return matmul_delta.with_attr(LAUNCH_PARAMS, PROGRAMMATIC)
    return matmul_delta
