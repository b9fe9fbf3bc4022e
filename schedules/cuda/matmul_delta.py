"""y = x W^T with W as a delta stream: the kernel of batch 1 on a GPU.

A CTA owns a bin and an SM, every lane walks one stream of the bin. The first chunks are on their way before x is
staged, and all that the weights alone decide is done: the kernel starts while the one before still runs, on the SMs
that are through with it.

x stands in shared memory as float32 times 2^96, column by column, a column `copies` times, the tokens of a tile side by
side: classes * copies * tile words are 32 where there is room, so a lane finds its class and its copy of it always on
the same banks, no two lanes of a warp (of a half or quarter warp, where a lane loads 2 or 4 tokens) on the same ones.
Where a segment ends, a lane puts its sum away as a part and goes on with the next; the parts of a row are added in
order, first those of a class, then the classes, so two runs agree bit for bit, and the bins' order is undone at the
store. The residual is added up while the first words are on their way.
"""

from __future__ import annotations

from collections.abc import Mapping

import tvm
from tvm.script import tirx as T

from tvm_sparse.formats.delta import in_pairs
from tvm_sparse.formats.delta_bins import slots
from tvm_sparse.formats.delta_chunks import words_of
from tvm_sparse.schedules.cuda.delta_code import (
    CLASS_SUM,
    EARLY,
    IN_ORDER,
    LOAD,
    NEXT_ROW,
    READ,
    SCALE,
    SHARED,
    chunk_code,
    row_code,
    stage_code,
    weight_code,
)
from tvm_sparse.schedules.cuda.delta_shared import DEPTHS, columns_of, copies_of, parts_of, room_of
from tvm_sparse.schedules.cuda.dependent_launch import ALONE, dependent, start_dependents, wait_for_inputs
from tvm_sparse.schedules.cuda.device_code import WARP, f32, silu, symbol, without_arguments
from tvm_sparse.schedules.cuda.token_tile import tile_decision, tokens_of
from tvm_sparse.schedules.spec import KernelSpec
from tvm_sparse.schedules.table import Decision


def space(spec: KernelSpec) -> tuple[Decision, ...]:
    """`tile` tokens a CTA, `depth` chunks in flight a lane, `overlap` with the kernel before."""
    return (
        tile_decision(spec, columns_of(spec) + parts_of(spec), room_of(spec)),
        _depth(spec),
        Decision("overlap", (0, 1), 1),
    )


def _depth(spec: KernelSpec) -> Decision:
    """With 56 registers a thread, which 4 chunks leave it at, 8 warps of 80 registers fit the same SM: where the next
    kernel is such a small one, and not a product, it starts and reads its state while this one still runs.
    """
    if spec.norm_eps and not spec.after:
        return Decision("depth", tuple(depth for depth in DEPTHS if depth <= 4), 4)
    return Decision("depth", DEPTHS, 6)


def fuses(spec: KernelSpec) -> bool:
    """For one token: every form, where x is staged 8 columns at a time and both rows of a gate are in one bin."""
    eights = spec.x_dtype == "bfloat16" and spec.k % 8 == 0
    return spec.m == 1 and (eights or not spec.norm_eps) and (in_pairs(spec.choice) or spec.after != "silu_mul")


def build(spec: KernelSpec, decisions: Mapping[str, int]) -> tvm.tirx.PrimFunc:
    """(x [m, k], words, lanes, rows, scale, res_col, res_val, y [m, n]); with norm and residual see KernelSpec."""
    n, k, m = spec.n, spec.k, tokens_of(spec)
    gap_bits, bins, warps, classes, unit, *_ = (value for _, value in spec.choice.options)
    tile, depth, overlap = (decisions[key] for key in ("tile", "depth", "overlap"))
    normed, add, gated = spec.norm_eps > 0, spec.after == "add", spec.after == "silu_mul"
    copies = copies_of(spec, tile)
    width = tile * copies  # numbers a column takes
    room, threads = slots(n, bins), warps * WARP
    streams = threads // classes
    span = streams + room  # parts of a class
    padded = columns_of(spec, depth)
    parts = padded * width  # where the parts begin; after them the first part of each segment, then the table of rows
    firsts = parts + -(-classes * span * tile // 4) * 4
    table = firsts + -(-classes * room // 8) * 4
    outside = table + 2 * room  # what values outside the window add to each row
    squared = outside + room * tile  # the warps' sums of squares of x
    total_words = squared + (warps if normed else 0)
    if overlap and tile == 1:
        total_words = max(total_words, ALONE // 4)
    helpers = 1  # lanes that add up a row
    most = min(classes, WARP // 2) if gated else classes  # both rows of a pair in one warp
    while 2 * helpers <= most and 2 * helpers * room <= threads:
        helpers *= 2
    row_turns = -(-(room - 1) * helpers // threads)
    step_bytes = 4 * classes * width  # from a class column to the next
    group_step, end = words_of(unit) * step_bytes, -(-k // classes) * step_bytes
    steps, extra = symbol("steps"), symbol("nr")
    chunk_name, chunk_source = chunk_code(gap_bits, tile, classes * width, unit)
    row_name, row_source = row_code(classes, classes // helpers, tile)
    stage_name, stage_source = stage_code(tile, copies, normed)
    weight_name, weight_source = weight_code(copies)
    eights = spec.x_dtype == "bfloat16" and k % 8 == 0
    turns = -(-k // (8 * threads))  # a thread reads 8 columns at a time, several times `together` before it waits
    together = min(turns, max(1, 3 // tile))

    def load(words, bin, lane, step, ahead):
        return T.cuda.func_call(
            "tvms_stream_load",
            T.address_of(words[bin, 0, lane, 0]),
            step,
            ahead,
            source_code=LOAD,
            return_type="uint32x4",
        )

    def in_order():
        return T.evaluate(T.cuda.func_call("tvms_in_order", source_code=IN_ORDER))

    def early(element):
        return T.cuda.func_call("tvms_early_load", T.address_of(element), source_code=EARLY, return_type="uint32")

    def multiply(ring, at, part, sums, d, first):
        pointers = [T.address_of(buffer[0]) for buffer in (at, part, sums)]
        call = T.cuda.func_call(chunk_name, ring[d], d * group_step, *pointers, first, source_code=chunk_source)
        return T.evaluate(call)

    def address(element):
        return T.cuda.func_call("tvms_address", T.address_of(element), source_code=SHARED, return_type="int32")

    def put(at, value):
        return T.evaluate(T.cuda.func_call("tvms_put", at, value, source_code=SHARED))

    def add_parts(begin, shared, total):
        pointers = T.address_of(begin), T.address_of(shared[parts]), T.address_of(total[0])
        return T.evaluate(T.cuda.func_call(row_name, *pointers, source_code=row_source))

    def read_8(x, token, column):
        where = T.address_of(x[token, column])
        return T.cuda.func_call("tvms_read_8", where, source_code=READ, return_type="uint32x4")

    def read(x, token, column):
        where = T.address_of(x[token, column])
        return T.cuda.func_call("tvms_read_x", where, source_code=READ, return_type="float32")

    def norm_weights(norm, column, half):
        where = T.address_of(norm[column])
        return T.cuda.func_call(weight_name, where, half, source_code=weight_source, return_type="float32x4")

    def stage_8(eight, first, shared, column, weight, turn, squares):
        pointers = [T.address_of(eight[first]), T.address_of(shared[column * width])]
        if normed:
            pointers += [weight[2 * turn], weight[2 * turn + 1], T.address_of(squares[0])]
        return T.evaluate(T.cuda.func_call(stage_name, *pointers, source_code=stage_source))

    def scaled(value):
        return T.cuda.func_call("tvms_scale_x", value, source_code=SCALE, return_type="float32")

    def lane_sum(value, lanes):
        return T.cuda.func_call("tvms_class_sum", value, lanes, source_code=CLASS_SUM, return_type="float32")

    def next_row(value):
        return T.cuda.func_call("tvms_next_row", value, helpers, source_code=NEXT_ROW, return_type="float32")

    def rounded(value):
        return f32(T.cast(value, spec.out_dtype))

    row_loop = T.unroll if add else T.serial  # what a thread keeps must be in registers

    @T.prim_func(s_tir=True)
    def matmul_delta(
        x: T.Buffer((m, k), spec.x_dtype),
        norm: T.Buffer((k,), "float32"),
        words: T.Buffer((bins, steps, WARP, 8), "uint16"),
        lanes: T.Buffer((bins, threads), "uint32"),
        rows: T.Buffer((bins, 2, room), "int32"),
        scale: T.Buffer((1,), "int32"),
        res_col: T.Buffer((extra,), "int32"),
        res_val: T.Buffer((extra,), "bfloat16"),
        residual: T.Buffer((m, n), spec.out_dtype),
        y: T.Buffer((m, spec.out_features), spec.out_dtype),
    ):
        bin = T.launch_thread("blockIdx.x", bins)
        tiles = T.launch_thread("blockIdx.y", T.ceildiv(m, tile))
        thread = T.launch_thread("threadIdx.x", threads)
        lane: T.let[T.int32] = thread % WARP
        warp: T.let[T.int32] = thread // WARP
        group: T.let[T.int32] = thread % classes
        stream: T.let[T.int32] = thread // classes
        # One buffer for all: as several, the allocator would lay parts over x while other warps still read it.
        shared = T.alloc_buffer((total_words,), "float32", scope="shared.dyn")
        own = T.decl_buffer((total_words,), "int32", data=shared.data, scope="shared.dyn")
        begins = T.decl_buffer((2 * total_words,), "uint16", data=shared.data, scope="shared.dyn")
        flat = T.decl_buffer((bins, 2 * room), "int32", data=rows.data)
        ring = T.alloc_buffer((depth,), "uint32x4", scope="local")
        eight = T.alloc_buffer((together * tile,), "uint32x4", scope="local")
        step = T.alloc_buffer((2,), "int32", scope="local")  # next to multiply, end
        start = T.alloc_buffer((2,), "uint32", scope="local")
        rank = T.alloc_buffer((2,), "int32", scope="local")  # where the stream begins, where the next one does
        at = T.alloc_buffer((1,), "int32", scope="local")
        origin = T.alloc_buffer((1,), "int32", scope="local")  # of the lane's class of x
        part = T.alloc_buffer((1,), "int32", scope="local")
        sums = T.alloc_buffer((tile,), "float32", scope="local")
        row = T.alloc_buffer((1,), "int32", scope="local")
        rest = T.alloc_buffer((2,), "int32", scope="local")
        column = T.alloc_buffer((1,), "int32", scope="local")
        total = T.alloc_buffer((tile,), "float32", scope="local")
        left = T.alloc_buffer((1,), "float32", scope="local")
        base = T.alloc_buffer((1,), "int32", scope="local")
        up = T.alloc_buffer((1,), "float32", scope="local")
        weight = T.alloc_buffer((turns * 2,), "float32x4", scope="local")
        squares = T.alloc_buffer((1,), "float32", scope="local")
        kept = T.alloc_buffer((row_turns,), "float32", scope="local")

        if T.bool(overlap == 1):
            start_dependents()
        step[0] = T.cast(steps, "int32") * warp // warps
        step[1] = T.cast(steps, "int32") * (warp + 1) // warps
        for d in T.unroll(depth):
            if step[0] + d < step[1]:
                ring[d] = load(words, bin, lane, step[0], d)
        start[0] = early(lanes[bin, thread])
        start[1] = T.uint32((room - 1) << 16)
        if thread < threads - classes:
            start[1] = early(lanes[bin, thread + classes])
        base[0] = T.reinterpret("int32", early(scale[0]))
        for turn in T.unroll(T.ceildiv(room, 2 * threads)):
            if turn * threads + thread < room // 2:
                T.evaluate(
                    T.ptx["cp.async.cg.shared.global"](
                        T.address_of(own[table + (turn * threads + thread) * 4]),
                        T.address_of(flat[bin, (turn * threads + thread) * 4]),
                        16,
                    )
                )
        for turn in range(T.ceildiv((padded - k) * width, threads)):
            if turn * threads + thread < (padded - k) * width:
                shared[k * width + turn * threads + thread] = T.float32(0)
        for token in T.unroll(tile):
            sums[token] = T.float32(0)
        rank[0] = T.cast(T.shift_right(start[0], T.uint32(16)), "int32")
        rank[1] = T.cast(T.shift_right(start[1], T.uint32(16)), "int32")
        origin[0] = address(shared[(group * copies + stream % copies) * tile])
        at[0] = T.cast(T.bitwise_and(start[0], T.uint32(0xFFFF)), "int32") * (4 * classes * width) + origin[0]
        part[0] = address(shared[parts + (group * span + stream + rank[0]) * tile])
        # Segments that begin in this stream have their first part in it.
        if stream == 0:
            begins[2 * firsts + group] = T.cast(group * span, "uint16")
        for r in range(rank[1] - rank[0]):
            begins[2 * firsts + (rank[0] + 1 + r) * classes + group] = T.cast(
                group * span + stream + rank[0] + 1 + r, "uint16"
            )

        if T.bool(normed):
            squares[0] = T.float32(0)
            for turn in T.unroll(turns):
                if (turn * threads + thread) * 8 < k:
                    weight[2 * turn] = norm_weights(norm, (turn * threads + thread) * 8, 0)
                    weight[2 * turn + 1] = norm_weights(norm, (turn * threads + thread) * 8, 1)

        if T.bool(overlap == 1):  # weights never depend on the kernel before, x does
            wait_for_inputs()
        if T.bool(eights):
            for block in range(T.ceildiv(turns, together)):
                for turn in T.unroll(together):
                    if ((block * together + turn) * threads + thread) * 8 < k:
                        for token in T.unroll(tile):
                            eight[turn * tile + token] = T.broadcast(T.uint32(0), 4)
                            if tiles * tile + token < m:
                                eight[turn * tile + token] = read_8(
                                    x, tiles * tile + token, ((block * together + turn) * threads + thread) * 8
                                )
                in_order()
                for turn in T.unroll(together):
                    if ((block * together + turn) * threads + thread) * 8 < k:
                        stage_8(
                            eight,
                            turn * tile,
                            shared,
                            ((block * together + turn) * threads + thread) * 8,
                            weight,
                            block * together + turn,
                            squares,
                        )
        else:
            for token in T.unroll(tile):
                for turn in range(T.ceildiv(k, threads)):
                    if turn * threads + thread < k:
                        left[0] = T.float32(0)
                        if tiles * tile + token < m:
                            left[0] = scaled(read(x, tiles * tile + token, turn * threads + thread))
                        for copy in T.unroll(copies):
                            shared[(turn * threads + thread) * width + copy * tile + token] = left[0]
        if T.bool(normed):
            squares[0] = lane_sum(squares[0], WARP)
            if lane == 0:
                shared[squared + warp] = squares[0]
        T.evaluate(T.ptx["cp.async.wait_all"]())
        T.tvm_storage_sync("shared.dyn")
        # What no word can hold, while the first words are still on their way. `put`: TVM would see a race with x.
        for turn in range(T.ceildiv(room - 1, threads)):
            if turn * threads + thread < room - 1:
                rest[0] = own[table + room + turn * threads + thread]
                rest[1] = own[table + room + turn * threads + thread + 1]
                for token in T.unroll(tile):
                    left[0] = T.float32(0)
                    for p in range(rest[1] - rest[0]):
                        column[0] = res_col[rest[0] + p]
                        left[0] += f32(res_val[rest[0] + p]) * (
                            shared[column[0] * width + token] * T.float32(2.0**-96)
                        )
                    put(address(shared[outside + (turn * threads + thread) * tile + token]), left[0])
        if T.bool(add):  # of the rows whose sums this thread is to finish
            for turn in T.unroll(row_turns):
                row[0] = -1
                if (turn * threads + thread) // helpers < room - 1 and thread % helpers == 0:
                    row[0] = own[table + (turn * threads + thread) // helpers]
                if row[0] >= 0:
                    kept[turn] = read(residual, 0, row[0])

        # A chunk's registers are refilled only once it is multiplied: a copy would wait for the load it is to hide.
        while step[0] + 2 * depth <= step[1]:
            for d in T.unroll(depth):
                multiply(ring, at, part, sums, d, origin[0])
                ring[d] = load(words, bin, lane, step[0], d + depth)
                in_order()
            at[0] = T.min(at[0] + depth * group_step, origin[0] + end)
            step[0] = step[0] + depth
        if step[0] + depth <= step[1]:
            for d in T.unroll(depth):
                multiply(ring, at, part, sums, d, origin[0])
                if step[0] + d + depth < step[1]:
                    ring[d] = load(words, bin, lane, step[0], d + depth)
            at[0] = T.min(at[0] + depth * group_step, origin[0] + end)
            step[0] = step[0] + depth
        for d in T.unroll(depth - 1):
            if step[0] + d < step[1]:
                multiply(ring, at, part, sums, d, origin[0])
        for token in T.unroll(tile):
            put(part[0] + 4 * token, sums[token])
        if T.bool(normed):
            squares[0] = T.float32(0)
            if lane < warps:
                squares[0] = shared[squared + lane]
            squares[0] = T.rsqrt(lane_sum(squares[0], WARP) / T.float32(k) + T.float32(spec.norm_eps))
        T.tvm_storage_sync("shared.dyn")

        for turn in row_loop(row_turns):
            slot: T.let[T.int32] = (turn * threads + thread) // helpers
            row[0] = -1
            if slot < room - 1:
                row[0] = own[table + slot]
            for token in T.unroll(tile):
                total[token] = T.float32(0)
            if row[0] >= 0:
                add_parts(
                    begins[2 * firsts + slot * classes + thread % helpers * (classes // helpers)], shared, total
                )
            for token in T.unroll(tile):
                total[token] = lane_sum(total[token], helpers)
            if row[0] >= 0 and thread % helpers == 0:
                for token in T.unroll(tile):
                    if tiles * tile + token < m:
                        # 2^(base - 96), built as the exponent field of a float32
                        total[token] = (
                            total[token]
                            * T.reinterpret("float32", T.shift_left(base[0] + (127 - 96), T.int32(23)))
                            + shared[outside + slot * tile + token]
                        )
                        if T.bool(normed):
                            total[token] = total[token] * squares[0]
                        if T.bool(add):
                            total[token] = rounded(total[token]) + kept[turn]
                        if T.bool(not gated):
                            y[tiles * tile + token, row[0]] = T.cast(total[token], spec.out_dtype)
            if T.bool(gated):
                up[0] = next_row(total[0])
                if row[0] >= 0 and thread % (2 * helpers) == 0:
                    y[0, row[0]] = T.cast(silu(rounded(total[0])) * rounded(up[0]), spec.out_dtype)

    unused = ([] if normed else ["norm"]) + ([] if add else ["residual"])
    made = without_arguments(matmul_delta, unused)
    return dependent(made) if overlap else made
