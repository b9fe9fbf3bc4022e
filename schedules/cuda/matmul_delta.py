"""y = x W^T with W as a delta stream: the kernel of batch 1 on a GPU.

A CTA owns a group of 32 sorted rows, one warp each of its segments, a lane a row. The first chunks are on their way
before x is staged: x stands in shared memory as float32 times 2^96, token by token side by side, with the format's
zeros after it. Partial sums meet in shared memory and are added in the order of the segments, so two runs agree bit for
bit; the lanes' order is undone at the store. The residual is added from x itself.
"""

from __future__ import annotations

from collections.abc import Mapping

import tvm
from tvm.script import tirx as T

from tvm_sparse.formats.delta import Delta
from tvm_sparse.schedules.cuda.device_code import WARP, f32, symbol
from tvm_sparse.schedules.cuda.token_tile import tile_decision, tokens_of
from tvm_sparse.schedules.spec import KernelSpec
from tvm_sparse.schedules.table import Decision

# Programmatic dependent launch (CUDA): the kernel starts while the one before still runs, and waits for it itself.
LAUNCH_PARAMS, PROGRAMMATIC = "tirx.kernel_launch_params", ["tirx.use_programtic_dependent_launch"]

_LOAD = """
__device__ __forceinline__ uint4 tvms_stream_load(const void* words) {
  // Read once, by this SM alone: past L1. Volatile: it stays before the wait for the kernel before.
  uint4 w;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(w.x), "=r"(w.y), "=r"(w.z), "=r"(w.w) : "l"(words));
  return w;
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

_STAGE8 = (
    _SCALE
    + """
__device__ __forceinline__ void tvms_stage_bf16x8(const void* from, float* to) {
  uint4 v = *(const uint4*)from;
  float4 a, b;
  a.x = tvms_scale_x(__uint_as_float(v.x << 16)); a.y = tvms_scale_x(__uint_as_float(v.x & 0xffff0000u));
  a.z = tvms_scale_x(__uint_as_float(v.y << 16)); a.w = tvms_scale_x(__uint_as_float(v.y & 0xffff0000u));
  b.x = tvms_scale_x(__uint_as_float(v.z << 16)); b.y = tvms_scale_x(__uint_as_float(v.z & 0xffff0000u));
  b.z = tvms_scale_x(__uint_as_float(v.w << 16)); b.w = tvms_scale_x(__uint_as_float(v.w & 0xffff0000u));
  ((float4*)to)[0] = a;
  ((float4*)to)[1] = b;
}
"""
)


def chunk_code(gap_bits: int, tile: int) -> tuple[str, str]:
    """Name and source of the function that turns one lane's 8 words into `tile` sums.

    `at` is the byte offset of the column after the last word's, so that the j-th word of the chunk adds its gap - 1
    to it and reads at the constant offset j: the field is masked in place, already times the bytes of a column.
    """
    column = 4 * tile
    log = column.bit_length() - 1
    mask = ((1 << gap_bits) - 1) << log
    value = 0x80000000 | (((1 << (31 - gap_bits)) - 1) & 0xFFFF0000)
    name = f"tvms_delta_g{gap_bits}_t{tile}"
    vector = {1: "float", 2: "float2", 4: "float4", 8: "float4"}[tile]
    parts = ["x"] if tile == 1 else list("xyzw"[: min(tile, 4)])
    lines = []
    for j in range(8):
        word = f"w.{'xyzw'[j // 2]}"
        low = j % 2 == 0
        lines.append(f"  at += ({word} >> {(15 if low else 31) - gap_bits - log}) & {mask:#x}u;")
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


def space(spec: KernelSpec) -> tuple[Decision, ...]:
    """`tile` tokens a CTA, `depth` chunks of 16 bytes in flight a lane, `overlap` with the kernel before."""
    columns = spec.k + Delta.PAST(spec.choice)
    # Measured on an H200 at 75 %: few warps want deep pipelines; only with many does the overlap pay, since the next
    # kernel's CTAs then find no room before this one's are done, and spread over the SMs evenly.
    many = spec.choice.option("segments") >= 24
    depth = Decision("depth", (1, 2, 3, 4, 6), 2 if many else 4)
    return (tile_decision(spec, columns), depth, Decision("overlap", (0, 1), int(many)))


def build(spec: KernelSpec, decisions: Mapping[str, int]) -> tvm.tirx.PrimFunc:
    """(x [m, k], words, row_of, seg_chunk, seg_col, scale, res_start, res_col, res_val, y [m, n])."""
    n, k, m = spec.n, spec.k, tokens_of(spec)
    gap_bits, segments = spec.choice.option("gap_bits"), spec.choice.option("segments")
    groups = -(-n // WARP)
    tile, depth, overlap = decisions["tile"], decisions["depth"], bool(decisions["overlap"])
    columns = k + Delta.PAST(spec.choice)
    padded = -(-columns // 8) * 8
    partial = padded * tile  # where the partial sums begin
    threads = segments * WARP
    chunks, extra = symbol("chunks"), symbol("nr")
    function, source = chunk_code(gap_bits, tile)
    eights = spec.x_dtype == "bfloat16" and k % 8 == 0 and tile == 1
    reducers = min(segments, tile)  # warps that finish tokens, one or more each

    def load(words, chunk, lane):
        return T.cuda.func_call(
            "tvms_stream_load",
            T.address_of(words[chunk, lane, 0]),
            source_code=_LOAD,
            return_type="uint32x4",
        )

    def multiply(ring, shared, place, sums, d):
        pointers = [T.address_of(buffer[0]) for buffer in (shared, place, sums)]
        return T.evaluate(T.cuda.func_call(function, ring[d], *pointers, source_code=source))

    def scaled(value):
        return T.cuda.func_call("tvms_scale_x", value, source_code=_SCALE, return_type="float32")

    @T.prim_func(s_tir=True)
    def matmul_delta(
        x: T.Buffer((m, k), spec.x_dtype),
        words: T.Buffer((chunks, WARP, 8), "uint16"),
        row_of: T.Buffer((groups * WARP,), "int32"),
        seg_chunk: T.Buffer((groups, segments + 1), "int32"),
        seg_col: T.Buffer((groups, segments, WARP), "int32"),
        scale: T.Buffer((1,), "int32"),
        res_start: T.Buffer((n + 1,), "int32"),
        res_col: T.Buffer((extra,), "int32"),
        res_val: T.Buffer((extra,), "bfloat16"),
        y: T.Buffer((m, n), spec.out_dtype),
    ):
        group = T.launch_thread("blockIdx.x", groups)
        tiles = T.launch_thread("blockIdx.y", T.ceildiv(m, tile))
        thread = T.launch_thread("threadIdx.x", threads)
        lane: T.let[T.int32] = thread % WARP
        warp: T.let[T.int32] = thread // WARP
        # One buffer for both: as two, the allocator would lay the partial sums over x while other warps still read it.
        shared = T.alloc_buffer((padded * tile + segments * tile * WARP,), "float32", scope="shared.dyn")
        ring = T.alloc_buffer((depth,), "uint32x4", scope="local")
        chunk = T.alloc_buffer((2,), "int32", scope="local")  # next to multiply, end
        place = T.alloc_buffer((1,), "int32", scope="local")
        sums = T.alloc_buffer((tile,), "float32", scope="local")
        row = T.alloc_buffer((1,), "int32", scope="local")
        rest = T.alloc_buffer((2,), "int32", scope="local")
        total = T.alloc_buffer((1,), "float32", scope="local")
        left = T.alloc_buffer((1,), "float32", scope="local")

        if T.bool(overlap):
            T.evaluate(T.ptx["griddepcontrol.launch_dependents"]())
        chunk[0] = seg_chunk[group, warp]
        chunk[1] = seg_chunk[group, warp + 1]
        place[0] = (seg_col[group, warp, lane] + 1) * (4 * tile)
        for d in T.unroll(depth):
            if chunk[0] + d < chunk[1]:
                ring[d] = load(words, chunk[0] + d, lane)
        row[0] = row_of[group * WARP + lane]

        if T.bool(overlap):  # weights never depend on the kernel before, x does
            T.evaluate(T.ptx["griddepcontrol.wait"]())
        if T.bool(eights):
            for step in range(T.ceildiv(k // 8, threads)):
                if step * threads + thread < k // 8:
                    T.evaluate(
                        T.cuda.func_call(
                            "tvms_stage_bf16x8",
                            T.address_of(x[tiles, (step * threads + thread) * 8]),
                            T.address_of(shared[(step * threads + thread) * 8]),
                            source_code=_STAGE8,
                        )
                    )
            for step in range(T.ceildiv(padded - k, threads)):
                if step * threads + thread < padded - k:
                    shared[k + step * threads + thread] = T.float32(0)
        else:
            for token in T.unroll(tile):
                for step in range(T.ceildiv(padded, threads)):
                    if step * threads + thread < padded:
                        shared[(step * threads + thread) * tile + token] = T.float32(0)
                        if tiles * tile + token < m and step * threads + thread < k:
                            shared[(step * threads + thread) * tile + token] = scaled(
                                f32(x[tiles * tile + token, step * threads + thread])
                            )
        T.tvm_storage_sync("shared.dyn")

        for token in T.unroll(tile):
            sums[token] = T.float32(0)
        # A chunk's registers are refilled only once it is multiplied: a copy would wait for the load it is to hide.
        while chunk[0] + 2 * depth <= chunk[1]:
            for d in T.unroll(depth):
                multiply(ring, shared, place, sums, d)
                ring[d] = load(words, chunk[0] + d + depth, lane)
            chunk[0] = chunk[0] + depth
        while chunk[0] < chunk[1]:
            for d in T.unroll(depth):
                if chunk[0] + d < chunk[1]:
                    multiply(ring, shared, place, sums, d)
                if chunk[0] + d + depth < chunk[1]:
                    ring[d] = load(words, chunk[0] + d + depth, lane)
            chunk[0] = chunk[0] + depth

        for token in T.unroll(tile):
            shared[partial + (warp * tile + token) * WARP + lane] = sums[token]
        T.tvm_storage_sync("shared.dyn")
        if warp < reducers and row[0] >= 0:
            rest[0] = res_start[row[0]]
            rest[1] = res_start[row[0] + 1]
            for turn in T.unroll(T.ceildiv(tile, reducers)):
                if (
                    turn * reducers + warp < tile
                    and tiles * tile + turn * reducers + warp < m
                ):
                    total[0] = T.float32(0)
                    for s in T.unroll(segments):
                        total[0] += shared[partial + (s * tile + turn * reducers + warp) * WARP + lane]
                    left[0] = T.float32(0)
                    for p in range(rest[1] - rest[0]):
                        left[0] += f32(res_val[rest[0] + p]) * f32(
                            x[tiles * tile + turn * reducers + warp, res_col[rest[0] + p]]
                        )
                    # 2^(base - 96), built as the exponent field of a float32
                    y[tiles * tile + turn * reducers + warp, row[0]] = T.cast(
                        total[0]
                        * T.reinterpret(
                            "float32", T.shift_left(scale[0] + (127 - 96), T.int32(23))
                        )
                        + left[0],
                        spec.out_dtype,
                    )

    if overlap:
        return matmul_delta.with_attr(LAUNCH_PARAMS, PROGRAMMATIC)
    return matmul_delta
