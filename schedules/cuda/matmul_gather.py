"""y = x W^T with W in the gather format, on a GPU's tensor cores: the kernel of 3 to 16 tokens where most of W is zero.

A CTA owns a bin of rows, one CTA an SM. formats/gather.py says how its warps share the bin, gather_code.py how a warp
multiplies. Words are on their way before x is staged; the pieces of a row are added in order, so two runs agree bit for
bit. A float32 x is the sum of three bfloat16 and goes through the words three times.
"""

from __future__ import annotations

from collections.abc import Mapping

import tvm
from tvm.script import tirx as T

from tvm_sparse.errors import Refusal
from tvm_sparse.formats.gather import ROWS, SHARED, cut_of, shared_bytes, tokens_at_once
from tvm_sparse.schedules.cuda.dependent_launch import ALONE, dependent
from tvm_sparse.schedules.cuda.device_code import TYPES, WARP, symbol
from tvm_sparse.schedules.cuda.gather_code import SOURCE as GATHER
from tvm_sparse.schedules.cuda.tensor_core import SOURCE as TENSOR_CORE
from tvm_sparse.schedules.cuda.token_tile import tokens_of
from tvm_sparse.schedules.spec import KernelSpec
from tvm_sparse.schedules.table import Decision

SOURCE = TENSOR_CORE + GATHER


def space(spec: KernelSpec) -> tuple[Decision, ...]:
    """`tile` tokens a CTA multiplies at a time, `depth` chunks in flight a lane."""
    cut = cut_of((spec.n, spec.k), spec.choice)
    most = tokens_at_once(cut, spec.m)
    return (
        Decision("tile", (8, 16) if most == 16 else (8,), most),
        Decision("depth", (2, 3, 4, 6), 3 if most == 16 else 6 if cut.warps <= 16 else 4),
    )


def build(spec: KernelSpec, decisions: Mapping[str, int]) -> tvm.tirx.PrimFunc:
    """(x [m, k], words, warps, groups, rows, scale, res_col, res_val, y [m, n])."""
    n, k, m = spec.n, spec.k, tokens_of(spec)
    cut, tile = cut_of((n, k), spec.choice), decisions["tile"]
    chunks, nr = symbol("chunks"), symbol("nr")
    numbers = (cut.gap_bits, cut.warps, cut.classes, cut.spans, cut.groups, tile, decisions["depth"], n, k)
    arguments = ", ".join([*map(str, numbers), TYPES[spec.x_dtype], TYPES[spec.out_dtype]])
    room = max(ALONE, shared_bytes(cut, tile))
    if room > SHARED:
        raise Refusal(f"[{n}, {k}] in {spec.choice}: x of {tile} tokens takes {room} bytes: use more spans")

    @T.prim_func(s_tir=True)
    def matmul_gather(
        x: T.Buffer((m, k), spec.x_dtype),
        words: T.Buffer((chunks, WARP, 8), "uint16"),
        warps: T.Buffer((cut.bins * cut.spans * cut.warps + 1, 2), "int32"),
        groups: T.Buffer((cut.bins, cut.spans, cut.groups + 1), "int32"),
        rows: T.Buffer((3, ROWS * cut.bins * cut.groups), "int32"),
        scale: T.Buffer((1,), "int32"),
        res_col: T.Buffer((nr,), "int32"),
        res_val: T.Buffer((nr,), "bfloat16"),
        y: T.Buffer((m, n), spec.out_dtype),
    ):
        block = T.launch_thread("blockIdx.x", cut.bins * cut.spans)
        T.launch_thread("clusterCtaIdx.x", cut.spans)
        tiles = T.launch_thread("blockIdx.y", T.ceildiv(m, tile))
        thread = T.launch_thread("threadIdx.x", cut.warps * WARP)
        shared = T.alloc_buffer((room // 4,), "uint32", scope="shared.dyn")
        T.evaluate(
            T.cuda.func_call(
                f"tvms_gather<{arguments}>",
                T.address_of(x[tiles * tile, 0]),
                T.address_of(words[0, 0, 0]),
                T.address_of(warps[0, 0]),
                T.address_of(groups[0, 0, 0]),
                T.address_of(rows[0, 0]),
                T.address_of(rows[1, 0]),
                T.address_of(rows[2, 0]),
                T.address_of(scale[0]),
                T.address_of(res_col[0]),
                T.address_of(res_val[0]),
                T.address_of(y[tiles * tile, 0]),
                shared.data,  # address_of would make TVM shrink it to one element
                block // cut.spans,
                block % cut.spans,
                T.cast(m - tiles * tile, "int32"),
                source_code=SOURCE,
            )
        )

    return dependent(matmul_gather)
