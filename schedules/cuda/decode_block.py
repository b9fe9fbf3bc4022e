"""Blocks back to a dense matrix, on a GPU: a CTA takes a block row.

Which of its blocks stands at a block column is looked up in shared memory (none: -1), so that every element of the
dense rows is written once, 8 columns a thread and step.
"""

from __future__ import annotations

import tvm
from tvm.script import tirx as T

from tvm_sparse.schedules.cuda.device_code import symbol
from tvm_sparse.schedules.spec import KernelSpec

_THREADS = 256


def build(spec: KernelSpec) -> tvm.tirx.PrimFunc:
    """(blocks, cols, row_start, w [n, k] bfloat16); k a multiple of 8."""
    n, k = spec.n, spec.k
    rows, cols_each = spec.choice.option("rows"), spec.choice.option("cols")
    across, block_rows = -(-k // cols_each), -(-n // rows)
    whole = cols_each % 8 == 0  # 8 columns never leave a block
    count = symbol("nb")

    @T.prim_func(s_tir=True)
    def decode_block(
        blocks: T.Buffer((count, rows, cols_each), "bfloat16"),
        cols: T.Buffer((count,), "int32"),
        row_start: T.Buffer((block_rows + 1,), "int32"),
        w: T.Buffer((n, k), "bfloat16"),
    ):
        block = T.launch_thread("blockIdx.x", block_rows)
        thread = T.launch_thread("threadIdx.x", _THREADS)
        pairs = T.decl_buffer((n, k // 2), "uint32", data=w.data)
        bits = T.decl_buffer((count, rows, cols_each), "uint16", data=blocks.data)
        eights = T.decl_buffer((count, rows, T.max(cols_each // 8, 1), 4), "uint32", data=blocks.data)
        which = T.alloc_buffer((across,), "int32", scope="shared.dyn")
        pair = T.alloc_buffer((4,), "uint32", scope="local")
        at = T.alloc_buffer((4,), "int32", scope="local")  # row in the block, column, block, block of one column
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
        for turn in range(T.ceildiv(rows * k // 8, _THREADS)):
            if turn * _THREADS + thread < rows * k // 8:
                at[0] = (turn * _THREADS + thread) // (k // 8)
                at[1] = (turn * _THREADS + thread) % (k // 8) * 8
                if block * rows + at[0] < n:
                    for i in T.unroll(4):
                        pair[i] = T.uint32(0)
                    if T.bool(whole):
                        at[2] = which[at[1] // cols_each]
                        if at[2] >= 0:
                            for i in T.vectorized(4):
                                pair[i] = eights[at[2], at[0], at[1] % cols_each // 8, i]
                    else:
                        for i in T.unroll(8):
                            at[3] = which[(at[1] + i) // cols_each]
                            if at[3] >= 0:
                                pair[i // 2] |= T.shift_left(
                                    T.cast(bits[at[3], at[0], (at[1] + i) % cols_each], "uint32"),
                                    T.uint32(16 * (i % 2)),
                                )
                    for i in T.vectorized(4):
                        pairs[block * rows + at[0], at[1] // 2 + i] = pair[i]

    return decode_block
