"""The delta stream back to a dense matrix, on a GPU: a CTA takes a bin, and walks it twice.

The words say where segments end, so a first walk over the bin's streams, each lane its own, only looks for that. Then a
warp takes a row at a time: the lanes of a class take the chunks of its segment in turn, add up the columns before their
chunk among themselves, and put values into the row, which stands in shared memory and is written whole.
"""

from __future__ import annotations

import tvm
from tvm.script import tirx as T

from tvm_sparse.formats.delta_bins import slots
from tvm_sparse.formats.delta_chunks import words_of
from tvm_sparse.schedules.cuda.delta_code import words_code
from tvm_sparse.schedules.cuda.device_code import WARP, symbol
from tvm_sparse.schedules.cuda.token_tile import SHARED_LIMIT
from tvm_sparse.schedules.spec import KernelSpec

_WARPS = 16


def _source(spec: KernelSpec, rows_at_once: int) -> tuple[str, str]:
    """Name and source of the kernel's body. `ends`, in shared memory: the unit of its class's stream behind each
    segment, by rank and class; after it the rows of `rows_at_once` warps.
    """
    gap_bits, bins, warps, classes, unit, *_ = (value for _, value in spec.choice.options)
    chunk, lanes = words_of(unit), WARP // classes
    per = chunk // unit
    words_name, words_source = words_code(gap_bits, unit)
    room, k = slots(spec.n, bins), spec.k
    name = f"tvms_decode_{spec.n}_{k}_g{gap_bits}_w{warps}_r{classes}_u{unit}"
    looks = "".join(
        f"    if (value[{unit * nth - 1}] == 0x8000)"
        f" ends[rank++ * {classes} + lane % {classes}] = {per} * (first + i) + {nth};\n"
        for nth in range(1, per + 1)
    )
    source = f"""
{words_source}
__device__ __forceinline__ void {name}_ends(const uint4* words, int steps, int stream, int rank, int* ends) {{
  int warp = stream / 32, lane = stream % 32;
  int begin = steps * warp / {warps}, count = steps * (warp + 1) / {warps} - begin;
  int first = begin * {lanes} + lane / {classes} * count;
#pragma unroll 8
  for (int i = 0; i < count; ++i) {{
    unsigned gap[{chunk}], value[{chunk}];
    {words_name}(words[(begin + i) * 32 + lane], gap, value);
{looks}  }}
}}

__device__ __forceinline__ void {name}_expand(
    const uint4* words, int steps, int begin, int end, int base, ushort* row) {{
  // A warp: units [begin, end) of each lane's class.
  int lane = threadIdx.x % 32, group = lane % {classes}, before = 0;
  int rounds = ((end + {per - 1}) / {per} - begin / {per} + {lanes - 1}) / {lanes};
#pragma unroll
  for (int d = 1; d < {classes}; d *= 2) {{
    int other = __shfl_xor_sync(0xffffffffu, rounds, d);
    rounds = max(rounds, other);
  }}
#pragma unroll 2
  for (int round = 0; round < rounds; ++round) {{
    int chunk = begin / {per} + round * {lanes} + lane / {classes};
    bool here = {per} * chunk < end;
    uint4 w = make_uint4(0, 0, 0, 0);
    if (here) {{
      int warp = ((chunk / {lanes} + 1) * {warps} - 1) / steps;
      int start = steps * warp / {warps}, count = steps * (warp + 1) / {warps} - start;
      int rest = chunk - start * {lanes};
      w = words[(start + rest % count) * 32 + rest / count * {classes} + group];
    }}
    unsigned gap[{chunk}], value[{chunk}];
    {words_name}(w, gap, value);
    int own = 0;
#pragma unroll
    for (int j = 0; j < {chunk}; ++j) {{
      int at = {per} * chunk + j / {unit};
      own += here && at >= begin && at < end ? gap[j] + 1 : 0;
    }}
    int upto = own;
#pragma unroll
    for (int d = {classes}; d < 32; d *= 2) {{
      int other = __shfl_up_sync(0xffffffffu, upto, d);
      upto += lane >= d ? other : 0;
    }}
    int column = before + upto - own - 1;
    before += __shfl_sync(0xffffffffu, upto, {WARP - classes} + group);
#pragma unroll
    for (int j = 0; j < {chunk}; ++j) {{
      int at = {per} * chunk + j / {unit};
      bool real = here && at >= begin && at < end;
      column += real ? 1 + gap[j] : 0;
      if (real && (value[j] & 0x7fff)) row[column * {classes} + group] = value[j] + (base << 7);
    }}
  }}
}}

__device__ __forceinline__ void {name}(
    const void* packed, const uint* streams, const int* rows, const int* scale, const int* res_col,
    const void* res_val, void* dense, int steps, void* shared) {{
  const uint4* words = (const uint4*)packed + (long long)blockIdx.x * steps * 32;
  int* ends = (int*)shared;
  for (int s = threadIdx.x; s < {WARP * warps}; s += {_WARPS * WARP})
    {name}_ends(words, steps, s, streams[blockIdx.x * {WARP * warps} + s] >> 16, ends);
  uint4* zeros = (uint4*)(ends + {_ends(spec)});
  for (int i = threadIdx.x; i < {rows_at_once * k // 8}; i += {_WARPS * WARP}) zeros[i] = make_uint4(0, 0, 0, 0);
  __syncthreads();
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (warp >= {rows_at_once}) return;
  uint4* own = zeros + warp * {k // 8};
  ushort* row = (ushort*)own;
  rows += blockIdx.x * {2 * room};
  for (int rank = warp; rank < {room - 1} && rows[rank] >= 0; rank += {rows_at_once}) {{
    int at = rank * {classes} + lane % {classes};
    {name}_expand(words, steps, rank ? ends[at - {classes}] : 0, ends[at], *scale, row);
    for (int p = rows[{room} + rank] + lane; p < rows[{room} + rank + 1]; p += 32)
      row[res_col[p]] = ((const ushort*)res_val)[p];
    __syncwarp();
    uint4* to = (uint4*)dense + (long long)rows[rank] * {k // 8};
    for (int i = lane; i < {k // 8}; i += 32) {{
      to[i] = own[i];
      own[i] = make_uint4(0, 0, 0, 0);
    }}
    __syncwarp();
  }}
}}
"""
    return name, source


def _ends(spec: KernelSpec) -> int:
    return -(-slots(spec.n, spec.choice.option("bins")) * spec.choice.option("classes") // 4) * 4


def build(spec: KernelSpec) -> tvm.tirx.PrimFunc:
    """(words, lanes, rows, scale, res_col, res_val, w [n, k] bfloat16); k a multiple of 8."""
    n, k = spec.n, spec.k
    bins, warps = spec.choice.option("bins"), spec.choice.option("warps")
    rows_at_once = max(1, min(_WARPS, (SHARED_LIMIT - 4 * _ends(spec)) // (2 * k)))
    steps, extra = symbol("steps"), symbol("nr")
    name, source = _source(spec, rows_at_once)

    @T.prim_func(s_tir=True)
    def decode_delta(
        words: T.Buffer((bins, steps, WARP, 8), "uint16"),
        lanes: T.Buffer((bins, WARP * warps), "uint32"),
        rows: T.Buffer((bins, 2, slots(n, bins)), "int32"),
        scale: T.Buffer((1,), "int32"),
        res_col: T.Buffer((extra,), "int32"),
        res_val: T.Buffer((extra,), "bfloat16"),
        w: T.Buffer((n, k), "bfloat16"),
    ):
        T.launch_thread("blockIdx.x", bins)
        T.launch_thread("threadIdx.x", _WARPS * WARP)
        shared = T.alloc_buffer((_ends(spec) + rows_at_once * (k // 2),), "uint32", scope="shared.dyn")
        T.evaluate(
            T.cuda.func_call(
                name,
                T.address_of(words[0, 0, 0, 0]),
                T.address_of(lanes[0, 0]),
                T.address_of(rows[0, 0, 0]),
                T.address_of(scale[0]),
                T.address_of(res_col[0]),
                T.address_of(res_val[0]),
                T.address_of(w[0, 0]),
                T.cast(steps, "int32"),
                shared.data,  # address_of would make TVM shrink it to one element
                source_code=source,
            )
        )

    return decode_delta
