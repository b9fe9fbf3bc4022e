"""Blocks back to a dense matrix, on a GPU: a CTA takes a part of the columns of a block row.

Which of its blocks stands at a block column is looked up in shared memory (none: -1), so that every element of the
dense rows is written once; a thread has several loads of 8 columns on their way.
"""

from __future__ import annotations

import tvm
from tvm.script import tirx as T

from tvm_sparse.schedules.cuda.device_code import symbol
from tvm_sparse.schedules.spec import KernelSpec

_THREADS = 256
_DEPTH = 4  # loads a thread has in flight


def build(spec: KernelSpec) -> tvm.tirx.PrimFunc:
    """(blocks, cols, row_start, w [n, k] bfloat16); k a multiple of 8."""
    n, k = spec.n, spec.k
    rows, cols_each = spec.choice.option("rows"), spec.choice.option("cols")
    across, block_rows = -(-k // cols_each), -(-n // rows)
    whole = cols_each % 8 == 0  # 8 columns never leave a block
    turns = -(-rows * k // (8 * _THREADS * _DEPTH))
    parts = 2 if turns % 2 == 0 else 1
    turns //= parts  # of each part
    count = symbol("nb")

    @T.prim_func(s_tir=True)
    def decode_block(
        blocks: T.Buffer((count, rows, cols_each), "bfloat16"),
        cols: T.Buffer((count,), "int32"),
        row_start: T.Buffer((block_rows + 1,), "int32"),
        w: T.Buffer((n, k), "bfloat16"),
    ):
        block = T.launch_thread("blockIdx.x", block_rows)
        part = T.launch_thread("blockIdx.y", parts)
        thread = T.launch_thread("threadIdx.x", _THREADS)
        pairs = T.decl_buffer((n, k // 2), "uint32", data=w.data)
        bits = T.decl_buffer((count, rows, cols_each), "uint16", data=blocks.data)
        eights = T.decl_buffer((count, rows, T.max(cols_each // 8, 1), 4), "uint32", data=blocks.data)
        which = T.alloc_buffer((across,), "int32", scope="shared.dyn")
        pair = T.alloc_buffer((_DEPTH, 4), "uint32", scope="local")
        row = T.alloc_buffer((_DEPTH,), "int32", scope="local")  # in the block
        column = T.alloc_buffer((_DEPTH,), "int32", scope="local")
        found = T.alloc_buffer((1,), "int32", scope="local")
        for turn in range(T.ceildiv(across, _THREADS)):
            if turn * _THREADS + thread < across:
                which[turn * _THREADS + thread] = -1
        T.tvm_storage_sync("shared.dyn")
        for turn in range(T.ceildiv(row_start[block + 1] - row_start[block], _THREADS)):
            if turn * _THREADS + thread < row_start[block + 1] - row_start[block]:
                which[cols[row_start[block] + turn * _THREADS + thread]] = (
                    row_start[block] + turn * _THREADS + thread
                )
        T.tvm_storage_sync("shared.dyn")
        for turn in range(turns):
            for d in T.unroll(_DEPTH):
                row[d] = (((part * turns + turn) * _DEPTH + d) * _THREADS + thread) // (k // 8)
                column[d] = (((part * turns + turn) * _DEPTH + d) * _THREADS + thread) % (k // 8) * 8
                for i in T.unroll(4):
                    pair[d, i] = T.uint32(0)
                if row[d] < rows:
                    if T.bool(whole):
                        found[0] = which[column[d] // cols_each]
                        if found[0] >= 0:
                            for i in T.vectorized(4):
                                pair[d, i] = eights[found[0], row[d], column[d] % cols_each // 8, i]
                    else:
                        for i in T.unroll(8):
                            found[0] = which[(column[d] + i) // cols_each]
                            if found[0] >= 0:
                                pair[d, i // 2] |= T.shift_left(
                                    T.cast(bits[found[0], row[d], (column[d] + i) % cols_each], "uint32"),
                                    T.uint32(16 * (i % 2)),
                                )
            for d in T.unroll(_DEPTH):
                if row[d] < rows and block * rows + row[d] < n:
                    for i in T.vectorized(4):
                        pairs[block * rows + row[d], column[d] // 2 + i] = pair[d, i]

    return decode_block
