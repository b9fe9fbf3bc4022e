"""The delta stream back to a dense matrix, on a GPU: a CTA takes a bin, and reads its words from DRAM once.

Where a segment ends only the words say. A few warps, the finders, walk the bin's streams a little ahead of all others
and look for nothing else; what they have read stands in L2 when it is read again. The other warps form teams. A team
takes a row: a lane takes a run of chunks of its class's segment, adds up the columns they pass, learns what the lanes
before it pass, and puts its values into the row, which stands in shared memory and is written whole.
"""

from __future__ import annotations

from dataclasses import dataclass

import tvm
from tvm.script import tirx as T

from tvm_sparse.formats.delta_bins import slots
from tvm_sparse.schedules.cuda.delta_code import place_code
from tvm_sparse.schedules.cuda.device_code import WARP, symbol
from tvm_sparse.schedules.spec import KernelSpec

_WARPS = 24  # of teams
_TEAMS = 12
_ROOM = 140 << 10  # bytes of their rows
_FINDERS = 8
_HELD = 5  # chunks of a lane at a time

_PTX = r"""
#ifndef TVMS_DECODE_DELTA_PTX
#define TVMS_DECODE_DELTA_PTX
__device__ __forceinline__ void tvms_meet(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" :: "r"(barrier), "r"(threads) : "memory");
}
__device__ __forceinline__ void tvms_pause() { asm volatile("nanosleep.u32 100;" ::: "memory"); }
#endif
"""

_SOURCE = r"""
#ifndef TVMS_DECODE_DELTA
#define TVMS_DECODE_DELTA
template <class Chunk, int WARPS, int CLASSES, int AHEAD>
__device__ __forceinline__ void tvms_find_ends(
    const uint4* words, unsigned steps, unsigned stream, const int* begins, volatile int* ends,
    volatile const int* taken) {
  // A warp, 32 / CLASSES chunks at a time: in one stream of each class, once all teams are near its first rows.
  const int UNITS = Chunk::UNITS, BATCH = 16 / UNITS, STREAMS = 32 / CLASSES;
  const int lane = threadIdx.x % 32, group = lane % CLASSES;
  const unsigned part = stream / STREAMS, nth = stream % STREAMS, begin = steps * part / WARPS;
  const int count = (int)(steps * (part + 1) / WARPS - begin), first = (int)begin * STREAMS + (int)nth * count;
  unsigned same = 0;
#pragma unroll
  for (int i = 0; i < 32; i += CLASSES) same |= 1u << i;
  same <<= group;
  const unsigned lower = same & ((1u << lane) - 1);
  int rank = begins[part * 32 + nth * CLASSES + group], lowest = rank;
#pragma unroll
  for (int d = 1; d < CLASSES; d *= 2) {
    const int other = __shfl_xor_sync(0xffffffffu, lowest, d);
    lowest = min(lowest, other);
  }
  while (__any_sync(0xffffffffu, taken[lane] + AHEAD < lowest)) tvms_pause();
  const unsigned* from = (const unsigned*)(words + begin * 32 + nth * CLASSES + group);
  for (int done = 0; done < count; done += BATCH * STREAMS) {
    const int chunk = done + lane / CLASSES;
    unsigned last[BATCH][UNITS];
#pragma unroll
    for (int j = 0; j < BATCH; ++j)
#pragma unroll
      for (int u = 0; u < UNITS; ++u)
        last[j][u] = chunk + j * STREAMS < count ? from[(chunk + j * STREAMS) * 128 + (u + 1) * 4 / UNITS - 1] : 0;
#pragma unroll
    for (int j = 0; j < BATCH; ++j) {
      int at = rank;
#pragma unroll
      for (int u = 0; u < UNITS; ++u) {
        const unsigned found = __ballot_sync(0xffffffffu, Chunk::ends(last[j][u]));
        at += __popc(found & lower);
        rank += __popc(found & same);
      }
#pragma unroll
      for (int u = 0; u < UNITS; ++u)
        if (Chunk::ends(last[j][u])) ends[at++ * CLASSES + group] = (first + chunk + j * STREAMS) * UNITS + u + 1;
    }
  }
}

__device__ __forceinline__ int tvms_wait_for_end(volatile const int* end) {
  int found;
  while ((found = *end) < 0) tvms_pause();
  return found;
}

template <int WARPS, int CLASSES, int HELD>
__device__ __forceinline__ void tvms_read_run(
    const uint4* words, unsigned steps, unsigned chunk, int count, uint4* run) {
  // Chunks `chunk` .. of a lane's class, which stand in at most two streams, one after the other; zeros after them.
  const unsigned STREAMS = 32 / CLASSES;
  const uint4 *from = words, *then = words;
  int left = 0;
  if (count > 0) {
    const unsigned warp = ((chunk / STREAMS + 1) * WARPS - 1) / steps, start = steps * warp / WARPS;
    const unsigned length = steps * (warp + 1) / WARPS - start, stream = (chunk - start * STREAMS) / length;
    const unsigned passed = chunk - start * STREAMS - stream * length;
    const unsigned next = stream + 1 == STREAMS ? (start + length) * 32 : start * 32 + (stream + 1) * CLASSES;
    left = (int)(length - passed);
    from += (start + passed) * 32 + stream * CLASSES;
    then += (int)next - 32 * left;
  }
#pragma unroll
  for (int j = 0; j < HELD; ++j) {
    run[j] = make_uint4(0, 0, 0, 0);
    if (j < count) run[j] = (j < left ? from : then)[32 * j];
  }
}

// Shared memory: taken [32], by team the rank it is at; ends [ROOM][CLASSES], the unit of its class's stream behind a
// segment, -1 before it is known; rows [2][ROOM], as packed; sums [TEAMS][2][ACROSS][CLASSES], columns that a warp's
// lanes pass, in turns; begins [WARPS * 32], the rank in which each stream begins; behind these TABLES numbers the
// teams' rows.
template <
    class Chunk, int K, int ROOM, int WARPS, int CLASSES, int TEAMS, int ACROSS, int FINDERS, int HELD, int TABLES>
__device__ __forceinline__ void tvms_decode_delta(
    const void* packed, const unsigned* streams, const int* table, const int* scale, const int* res_col,
    const void* res_val, void* dense, unsigned steps, int* shared) {
  const int LANES = ACROSS * 32 / CLASSES, THREADS = (TEAMS * ACROSS + FINDERS) * 32, UNITS = Chunk::UNITS;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane % CLASSES;
  int *taken = shared, *ends = taken + 32, *rows = ends + ROOM * CLASSES, *sums = rows + 2 * ROOM;
  int* begins = sums + 2 * TEAMS * ACROSS * CLASSES;
  const uint4* words = (const uint4*)packed + (long long)blockIdx.x * steps * 32;
  for (int i = threadIdx.x; i < WARPS * 32; i += THREADS) begins[i] = streams[blockIdx.x * (WARPS * 32) + i] >> 16;
  for (int i = threadIdx.x; i < ROOM * CLASSES; i += THREADS) ends[i] = -1;
  for (int i = threadIdx.x; i < 2 * ROOM; i += THREADS) rows[i] = table[blockIdx.x * (2 * ROOM) + i];
  for (int i = threadIdx.x; i < TEAMS * K / 8; i += THREADS) ((uint4*)(shared + TABLES))[i] = make_uint4(0, 0, 0, 0);
  if (threadIdx.x < 32) taken[threadIdx.x] = threadIdx.x < TEAMS ? 0 : ROOM;
  __syncthreads();
  if (warp >= TEAMS * ACROSS) {
    for (int stream = warp - TEAMS * ACROSS; stream < WARPS * 32 / CLASSES; stream += FINDERS)
      tvms_find_ends<Chunk, WARPS, CLASSES, 2 * TEAMS>(words, steps, stream, begins, ends, taken);
    return;
  }

  const int team = warp / ACROSS, own = threadIdx.x % (32 * ACROSS);
  const unsigned base = (unsigned)*scale * 0x00800080u, most = max(1u, min((unsigned)HELD, steps / WARPS));
  char* row = (char*)(shared + TABLES) + team * (2 * K);
  auto meet = [&]() {
    if (ACROSS > 1) tvms_meet(team, 32 * ACROSS);
    else __syncwarp();
  };
  for (int rank = team; rank < ROOM - 1 && rows[rank] >= 0; rank += TEAMS) {
    if (own == 0) *(volatile int*)(taken + team) = rank;
    const int begin = rank ? tvms_wait_for_end(ends + (rank - 1) * CLASSES + group) : 0;
    const int end = tvms_wait_for_end(ends + rank * CLASSES + group);
    const int first = begin / UNITS, behind = (end + UNITS - 1) / UNITS;
    unsigned longest = behind - first;
#pragma unroll
    for (int d = 1; d < CLASSES; d *= 2) {
      const unsigned other = __shfl_xor_sync(0xffffffffu, (int)longest, d);
      longest = max(longest, other);
    }
    const unsigned rounds = (longest + LANES * most - 1) / (LANES * most);
    const int each = (longest + LANES * rounds - 1) / (LANES * rounds);
    int before = (first * UNITS - begin) * Chunk::UNIT;
    for (int round = 0; round < (int)rounds; ++round) {
      const int chunk = first + (round * LANES + own / CLASSES) * each;
      uint4 run[HELD];
      tvms_read_run<WARPS, CLASSES, HELD>(words + group, steps, chunk, min(each, behind - chunk), run);
      int passed = 0;
#pragma unroll
      for (int j = 0; j < HELD; ++j) {
        if (UNITS == 2 && 2 * (chunk + j) < begin) run[j].x = run[j].y = 0;  // another segment's
        if (UNITS == 2 && 2 * (chunk + j) + 1 >= end) run[j].z = run[j].w = 0;
        if (j < each) passed += Chunk::passed(run[j]);
      }
      int upto = passed;
#pragma unroll
      for (int d = CLASSES; d < 32; d *= 2) {
        const int other = __shfl_up_sync(0xffffffffu, upto, d);
        upto += lane >= d ? other : 0;
      }
      int* turn = sums + (team * 2 + round % 2) * (ACROSS * CLASSES) + group;
      if (lane >= 32 - CLASSES) turn[warp % ACROSS * CLASSES] = upto;
      meet();
      int column = before + upto - passed;
#pragma unroll
      for (int w = 0; w < ACROSS; ++w) {
        before += turn[w * CLASSES];
        column += w < warp % ACROSS ? turn[w * CLASSES] : 0;
      }
      int at = (column * CLASSES + group) * 2;
#pragma unroll
      for (int j = 0; j < HELD; ++j)
        if (j < each) Chunk::put(run[j], base, row, at);
    }
    const int outside = rows[ROOM + rank + 1];
#pragma unroll 4
    for (int p = rows[ROOM + rank] + own; p < outside; p += 32 * ACROSS)
      ((ushort*)row)[res_col[p]] = ((const ushort*)res_val)[p];
    meet();
    uint4* to = (uint4*)dense + (long long)rows[rank] * (K / 8);
#pragma unroll 5
    for (int i = own; i < K / 8; i += 32 * ACROSS) {
      const uint4 v = ((uint4*)row)[i];
      ((uint4*)row)[i] = make_uint4(0, 0, 0, 0);
      __stcs(to + i, v);
    }
    meet();
  }
  if (own == 0) *(volatile int*)(taken + team) = ROOM;
}
#endif
"""


@dataclass(frozen=True)
class Cut:
    """A CTA's `teams` teams of `across` warps; `tables`, numbers of 32 bits in shared memory before the rows."""

    teams: int
    across: int
    tables: int

    @property
    def threads(self) -> int:
        return WARP * (self.teams * self.across + _FINDERS)


def cut_of(spec: KernelSpec) -> Cut:
    """As many teams as their rows' room allows, of as many warps as there are."""
    room, classes = slots(spec.n, spec.choice.option("bins")), spec.choice.option("classes")
    teams = max(1, min(_TEAMS, _ROOM // (2 * spec.k)))
    tables = WARP + (classes + 2) * room + 2 * _WARPS * classes + WARP * spec.choice.option("warps")
    return Cut(teams, _WARPS // teams, -(-tables // 4) * 4)


def build(spec: KernelSpec) -> tvm.tirx.PrimFunc:
    """(words, lanes, rows, scale, res_col, res_val, w [n, k] bfloat16); k a multiple of 8."""
    n, k = spec.n, spec.k
    gap_bits, bins, warps, classes, unit, *_ = (value for _, value in spec.choice.options)
    cut = cut_of(spec)
    steps, extra = symbol("steps"), symbol("nr")
    chunk, chunk_source = place_code(gap_bits, unit, 2 * classes)
    numbers = (k, slots(n, bins), warps, classes, cut.teams, cut.across, _FINDERS, _HELD, cut.tables)

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
        T.launch_thread("threadIdx.x", cut.threads)
        shared = T.alloc_buffer((cut.tables + cut.teams * (k // 2),), "int32", scope="shared.dyn")
        T.evaluate(
            T.cuda.func_call(
                f"tvms_decode_delta<{chunk}, {', '.join(map(str, numbers))}>",
                T.address_of(words[0, 0, 0, 0]),
                T.address_of(lanes[0, 0]),
                T.address_of(rows[0, 0, 0]),
                T.address_of(scale[0]),
                T.address_of(res_col[0]),
                T.address_of(res_val[0]),
                T.address_of(w[0, 0]),
                T.cast(steps, "uint32"),
                shared.data,  # address_of would make TVM shrink it to one element
                source_code=chunk_source + _PTX + _SOURCE,
            )
        )

    return decode_delta
