"""The delta stream: one 16-bit word per non-zero, index included. The format for batch 1 on a GPU.

How a word becomes a product, and what the residual holds, stands at `Delta`. Packing takes two passes over row
blocks: the first counts each row's words, which orders the rows and sizes the chunks; the second writes the words.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import pad

from tvm_sparse.errors import Refusal
from tvm_sparse.formats.base import Buffer, FormatChoice, Packed, Shape
from tvm_sparse.formats.bits import as_bits
from tvm_sparse.formats.blocks import over_blocks
from tvm_sparse.formats.delta_words import Code, Lanes, Survey, best_code, survey
from tvm_sparse.formats.stats import CHUNK, GAP_BITS, GROUP, Stats, group_chunks


class Delta:
    """Options `gap_bits` g (3 to 6) and `segments` S.

    A word, here for g = 4:

        bit   15      14..11     10..7           6..0
              sign    gap - 1    exponent code   bf16 mantissa

    `gap` is the number of columns since the row's previous word, 1 to 2^g; a larger one inserts fillers, words of
    value 0 with the largest gap. Placed into a float32, `(w << 16) & 0x87ff0000` (the gap's bits masked), the code is
    the exponent field itself: code c >= 1 means exponent field base + c; code 0 stands with mantissa 0 only and
    is exactly 0. So value = float(that) * 2^base, and y = 2^(base - 96) * sum(float(that) * (2^96 x)).

        words      uint16 [chunks, 32, 8]      chunk, lane, word: a warp loads 512 contiguous bytes
        row_of     int32  [groups * 32]        the original row that lane l of group g walks; -1: none
        seg_chunk  int32  [groups, S + 1]      first chunk of each segment, and the end: S equal cuts of a group
        seg_col    int32  [groups, S, 32]      the column before the lane's first word in the segment; -1 at a row start
        scale      int32  [1]                  base
        res_start  int32  [N + 1]              residual, original rows in order: where each row's values begin
        res_col    int32  [nr]                 ascending within a row
        res_val    bfloat16 [nr]               bf16 subnormals, and exponents outside the window

    Groups are 32 rows, rows sorted by their number of words, most first, equal ones in their own order. A shorter
    lane ends in padding words: value 0, gap 1. Every word advances the column, padding too, and no lane ever
    stands beyond column K - 1 + PAST(choice): with that many zeros after x a kernel needs no bounds check. (A lane that
    would run further stores some of its zeros as words instead of padding at its end.) `words` and the residual
    keep one chunk and one triple, of value 0, where a matrix has none, so that no buffer is empty.
    """

    name = "delta"

    def choice(self, gap_bits: int = 4, segments: int = 8) -> FormatChoice:
        if gap_bits not in GAP_BITS or segments < 1:
            raise Refusal(f"delta gap_bits={gap_bits}, segments={segments}: gap_bits is 3 to 6, segments at least 1")
        return FormatChoice(self.name, (("gap_bits", gap_bits), ("segments", segments)))

    def choices(self, stats: Stats) -> Sequence[FormatChoice]:
        """One split: the usual one, unless another saves 2 % or more: every split is one more kernel to tune."""
        usual = self.choice()
        best = min((self.choice(g) for g in GAP_BITS), key=lambda choice: self.nbytes(stats, choice))
        return (best if self.nbytes(stats, best) < 0.98 * self.nbytes(stats, usual) else usual,)

    def nbytes(self, stats: Stats, choice: FormatChoice) -> int:
        g, segments = choice.option("gap_bits"), choice.option("segments")
        n = stats.shape[0]
        residual = stats.nnz - best_code(stats.exponents, g)[1]
        tables = -(-n // GROUP) * 4 * (GROUP + segments + 1 + GROUP * segments)
        return 2 * GROUP * CHUNK * max(1, stats.chunks[g]) + tables + 4 + 4 * (n + 1) + 6 * max(1, residual)

    def buffers(self, shape: Shape, choice: FormatChoice) -> tuple[Buffer, ...]:
        groups, segments = -(-shape[0] // GROUP), choice.option("segments")
        return (
            Buffer("words", ("chunks", GROUP, CHUNK), "uint16"),
            Buffer("row_of", (groups * GROUP,), "int32"),
            Buffer("seg_chunk", (groups, segments + 1), "int32"),
            Buffer("seg_col", (groups, segments, GROUP), "int32"),
            Buffer("scale", (1,), "int32"),
            Buffer("res_start", (shape[0] + 1,), "int32"),
            Buffer("res_col", ("nr",), "int32"),
            Buffer("res_val", ("nr",), "bfloat16"),
        )

    @staticmethod
    def PAST(choice: FormatChoice) -> int:
        """Zeros a kernel must be able to read after column K - 1 of x."""
        return 2 * CHUNK << choice.option("gap_bits")

    def pack(self, weight: torch.Tensor, choice: FormatChoice) -> Packed:
        bits = as_bits(weight)
        (n, k), device = bits.shape, bits.device
        segments = choice.option("segments")
        code, surveys = _surveyed(bits, choice.option("gap_bits"))
        order = torch.cat([part.words for part in surveys])
        chunks = group_chunks(order)
        order = order.sort(descending=True, stable=True).indices
        ends = chunks.cumsum(0)
        starts = ends - chunks
        words = bits.new_zeros(max(1, int(ends[-1])), GROUP, CHUNK)
        cuts = torch.arange(segments + 1, device=device)
        seg_chunk = starts[:, None] + chunks[:, None] * cuts // segments
        seg_col = torch.empty(len(chunks), segments, GROUP, dtype=torch.int32, device=device)

        def write(first: int, last: int) -> None:
            """Groups [first, last): their rows lie apart in the matrix, their words side by side."""
            begin = int(starts[first])
            lanes = Lanes(words[begin : int(ends[last - 1])], starts[first:last] - begin, chunks[first:last], code)
            rows = bits[order[first * GROUP : last * GROUP]]
            lanes.write(rows)
            lanes.hold_back(rows, k - 1 + self.PAST(choice))
            before = lanes.columns_before()
            seg_col[first:last] = before[seg_chunk[first:last, :-1] - begin] - before[lanes.starts][:, None] - 1

        over_blocks(write, len(chunks), k * GROUP, device)
        row_of = torch.full((len(chunks) * GROUP,), -1, dtype=torch.int32, device=device)
        row_of[:n] = order
        res_start, res_col, res_val = _residual(surveys)
        buffers = {
            "words": words.view(torch.uint16),
            "row_of": row_of,
            "seg_chunk": seg_chunk.to(torch.int32),
            "seg_col": seg_col,
            "scale": torch.tensor([code.base], dtype=torch.int32, device=device),
            "res_start": res_start,
            "res_col": res_col,
            "res_val": res_val,
        }
        return Packed(choice, (n, k), sum(part.nnz for part in surveys), buffers)

    def unpack(self, packed: Packed) -> torch.Tensor:
        n, k = packed.shape
        parts = packed.buffers
        code = Code(packed.choice.option("gap_bits"), int(parts["scale"]))
        words = parts["words"].view(torch.int16)
        out = words.new_zeros(n, k)
        seg_chunk = parts["seg_chunk"].long()

        def expand(first: int, last: int) -> None:
            begin, end = int(seg_chunk[first, 0]), int(seg_chunk[last - 1, -1])
            starts = seg_chunk[first:last, 0] - begin
            counts = seg_chunk[first:last, -1] - begin - starts
            lanes = Lanes(words[begin:end], starts, counts, code)
            before = lanes.columns_before()
            group = torch.repeat_interleave(torch.arange(last - first, device=words.device), counts)
            column = (before[:-1] - before[starts][group])[..., None] + code.gaps(lanes.words).cumsum(2) - 1
            values = code.values(lanes.words)
            chunk, lane, word = (values != 0).nonzero(as_tuple=True)
            row = parts["row_of"].view(-1, GROUP)[first:last][group[chunk], lane]
            out[row.long(), column[chunk, lane, word].long()] = values[chunk, lane, word]

        over_blocks(expand, len(seg_chunk), k * GROUP, words.device)
        counts = parts["res_start"].diff().long()
        row = torch.repeat_interleave(torch.arange(n, device=words.device), counts)
        out[row, parts["res_col"][: len(row)].long()] = parts["res_val"].view(torch.int16)[: len(row)]
        return out.view(torch.bfloat16)


def _surveyed(bits: torch.Tensor, gap_bits: int) -> tuple[Code, list[Survey]]:
    """The window, and the survey of each row block under it: only rows with values outside it are read again."""
    n, k = bits.shape
    blind = over_blocks(lambda a, b: (a, survey(bits[a:b], gap_bits)), n, k, bits.device)
    code, _ = best_code(torch.stack([part.exponents for _, part in blind]).sum(0).tolist(), gap_bits)
    at = dict(blind)
    again = over_blocks(lambda a, b: at[a].under(code, bits[a:b]), n, k, bits.device)
    return code, again


def _residual(surveys: Sequence[Survey]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """res_start, res_col, res_val; one zero triple outside every row where there is none."""
    start = pad(torch.cat([part.res_count for part in surveys]).cumsum(0), (1, 0))
    col = torch.cat([part.res_col for part in surveys])
    val = torch.cat([part.res_val for part in surveys])
    if not col.numel():
        col, val = col.new_zeros(1), val.new_zeros(1)
    return start.to(torch.int32), col.to(torch.int32), val.view(torch.bfloat16)
