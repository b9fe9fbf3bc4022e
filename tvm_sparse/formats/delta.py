"""The delta stream: one 16-bit word per non-zero, index included. The format for batch 1 on a GPU.

How a word becomes a product, how the words are cut for the lanes of a machine, and what the residual holds, stands at
`Delta`. Packing takes two passes over row blocks: the first counts each row's words, which deals the rows to bins; the
second writes the words.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import pad

from tvm_sparse.errors import Refusal
from tvm_sparse.formats.base import Buffer, FormatChoice, Packed, Shape
from tvm_sparse.formats.bits import as_bits
from tvm_sparse.formats.blocks import over_blocks
from tvm_sparse.formats.delta_bins import WARP, Bins, deal, slots, stream_begin, unweave, weave
from tvm_sparse.formats.delta_words import Code, Survey, best_code, columns_before, survey, write_rows
from tvm_sparse.formats.stats import CHUNK, GAP_BITS, Stats, row_chunks
from tvm_sparse.targets import Machine

_FIELD = 1 << 16  # a column, and a row's rank in its bin, fit 16 bits


class Delta:
    """Options `gap_bits` g (3 to 6), `bins` B and `warps` W of a bin.

    A word, here for g = 4:

        bit   15      14..11     10..7           6..0
              sign    gap - 1    exponent code   bf16 mantissa

    `gap` is the number of columns since the row's previous word, 1 to 2^g; a larger one inserts fillers, words of
    value 0 with the largest gap. Placed into a float32, `(w << 16) & 0x87ff0000` (the gap's bits masked), the code is
    the exponent field itself: code c >= 1 means exponent field base + c; code 0 stands with mantissa 0 only and
    is exactly 0. So value = float(that) * 2^base, and y = 2^(base - 96) * sum(float(that) * (2^96 x)).

    Rows are dealt to bins of nearly equal size: a bin is what one CTA does, and B the CTAs a GPU holds at once. A row
    takes whole chunks of 8 words. A bin's rows stand one after the other, `rank` is a row's place among them, and the
    bin's `steps` * 32 chunks are cut into one stream for each lane, in order: warp w has steps [steps * w // W,
    steps * (w + 1) // W), each of its lanes so many chunks. A stream begins and ends anywhere in a row and may touch
    many. What stream s has of the row of rank r is part s + r: every part of a bin is one number of 0 .. 32 W + rows,
    those of a row are neighbours, and adding them in order gives the same sum in every run.

        words      uint16 [B, steps, 32, 8]    chunk i of lane l in warp w: [bin, steps * w // W + i, l]
        lanes      uint32 [B, 32 W]            where a stream begins: rank << 16 | columns of that row already passed
        rows       int32  [B, 4, slots]        by rank: the original row, -1 for none; the chunk, counted in the bin, at
                                               which it ends, 2^30 for none; its first part; its first residual value.
                                               The last slot is free, so that the next one's first is a row's end
        scale      int32  [1]                  base
        res_col    int32  [nr]                 residual, by bin and rank: ascending within a row
        res_val    bfloat16 [nr]               bf16 subnormals, and exponents outside the window

    Padding words are 0 (value 0, gap 1). A stream that starts a chunk at a column of at most K reads no column beyond
    K - 1 + PAST; only padding at a bin's end would start further on, and a kernel starts it at K. The residual keeps
    one triple of value 0 where a matrix has none, so that no buffer is empty.
    """

    name = "delta"

    def choice(self, gap_bits: int = 4, bins: int = 132, warps: int = 24) -> FormatChoice:
        if gap_bits not in GAP_BITS or bins < 1 or not 1 <= warps <= 32:
            asked = f"delta gap_bits={gap_bits}, bins={bins}, warps={warps}"
            raise Refusal(f"{asked}: gap_bits is 3 to 6, bins at least 1, warps 1 to 32")
        return FormatChoice(self.name, (("gap_bits", gap_bits), ("bins", bins), ("warps", warps)))

    def choices(self, stats: Stats, machine: Machine) -> Sequence[FormatChoice]:
        """One split: the usual one, unless another saves 2 % or more: every split is one more kernel to tune."""
        cut = {"bins": machine.cores, "warps": 24} if machine.is_gpu else {"bins": 64, "warps": 1}
        usual = self.choice(**cut)
        if not _fits(stats.shape, usual):
            return ()
        best = min((self.choice(g, **cut) for g in GAP_BITS), key=lambda choice: self.nbytes(stats, choice))
        return (best if self.nbytes(stats, best) < 0.98 * self.nbytes(stats, usual) else usual,)

    def nbytes(self, stats: Stats, choice: FormatChoice) -> int:
        """An estimate, because only packing deals the rows: the fullest bin has one row more than another."""
        g, bins, (n, _) = choice.option("gap_bits"), choice.option("bins"), stats.shape
        fullest = max(stats.longest[g], -(-n // bins) * stats.chunks[g] // n)
        streamed = bins * (fullest // WARP + 1) * 2 * WARP * CHUNK
        residual = stats.nnz - best_code(stats.exponents, g)[1]
        tables = 4 * bins * WARP * choice.option("warps") + 16 * bins * slots(n, bins) + 4
        return streamed + tables + 6 * max(1, residual)

    def buffers(self, shape: Shape, choice: FormatChoice) -> tuple[Buffer, ...]:
        bins, warps = choice.option("bins"), choice.option("warps")
        room = slots(shape[0], bins)
        return (
            Buffer("words", (bins, "steps", WARP, CHUNK), "uint16"),
            Buffer("lanes", (bins, WARP * warps), "uint32"),
            Buffer("rows", (bins, 4, room), "int32"),
            Buffer("scale", (1,), "int32"),
            Buffer("res_col", ("nr",), "int32"),
            Buffer("res_val", ("nr",), "bfloat16"),
        )

    @staticmethod
    def PAST(choice: FormatChoice) -> int:
        """Zeros a kernel must be able to read after column K - 1 of x, if it starts no chunk beyond column K."""
        return CHUNK << choice.option("gap_bits")

    def pack(self, weight: torch.Tensor, choice: FormatChoice) -> Packed:
        bits = as_bits(weight)
        (n, k), device = bits.shape, bits.device
        if not _fits((n, k), choice):
            raise Refusal(f"[{n}, {k}] in {choice}: more than {_FIELD - 1} columns, or rows of a bin: use more bins")
        bins, warps = choice.option("bins"), choice.option("warps")
        code, surveys = _surveyed(bits, choice.option("gap_bits"))
        chunks = row_chunks(torch.cat([part.words for part in surveys]))
        dealt = deal(chunks, bins)
        words = bits.new_zeros(bins, dealt.steps, WARP, CHUNK)
        starts = dealt.row_end.view(-1)[dealt.slot] - chunks + dealt.slot // dealt.row_of.shape[1] * dealt.steps * WARP
        out = words.view(-1)
        over_blocks(lambda a, b: write_rows(out, bits[a:b], starts[a:b] * CHUNK, code), n, k, device)
        begin = stream_begin(dealt.steps, warps, device)
        rank = torch.searchsorted(dealt.row_end, begin.expand(bins, -1).contiguous())
        first = pad(dealt.row_end, (1, 0)).gather(1, rank)
        in_order = words.view(bins, -1, CHUNK)

        def passed(a: int, b: int) -> torch.Tensor:
            before = columns_before(in_order[a:b], code)
            return before[:, begin] - before.gather(1, first[a:b].clamp(max=before.shape[1] - 1))

        column = torch.cat(over_blocks(passed, bins, dealt.steps * WARP * CHUNK, device)).clamp_(0, k)
        weave(words, warps)
        ends = pad(dealt.row_end, (1, -1), value=-1)  # of the row before
        part = torch.searchsorted(begin, ends, right=True) - 1 + torch.arange(ends.shape[1], device=device)
        part[:, 0] = 0
        res_start, res_col, res_val = _residual(surveys, dealt)
        buffers = {
            "words": words.view(torch.uint16),
            "lanes": (rank << 16 | column).to(torch.int32).view(torch.uint32),
            "rows": torch.stack([dealt.row_of, dealt.row_end, part, res_start], 1).to(torch.int32),
            "scale": torch.tensor([code.base], dtype=torch.int32, device=device),
            "res_col": res_col,
            "res_val": res_val,
        }
        return Packed(choice, (n, k), sum(part.nnz for part in surveys), buffers)

    def unpack(self, packed: Packed) -> torch.Tensor:
        n, k = packed.shape
        parts = packed.buffers
        code = Code(packed.choice.option("gap_bits"), int(parts["scale"]))
        words = unweave(parts["words"].view(torch.int16), packed.choice.option("warps"))
        out = words.new_zeros(n, k)
        row_of, end, _, res_start = parts["rows"].long().unbind(1)
        end = end.masked_fill(row_of < 0, 0)
        end = end.cummax(1).values
        length = end.diff(dim=1, prepend=end.new_zeros(len(end), 1))

        def expand(a: int, b: int) -> None:
            counts = length[a:b].reshape(-1)
            slot = torch.repeat_interleave(torch.arange(len(counts), device=out.device), counts)
            chunk = torch.arange(words.shape[1], device=out.device) < end[a:b, -1:]
            before = columns_before(words[a:b], code)
            first = before.gather(1, end[a:b] - length[a:b]).view(-1)[slot]
            here = words[a:b][chunk]
            column = (before[:, :-1][chunk] - first)[:, None] + code.gaps(here).cumsum(1) - 1
            values = code.values(here)
            at, word = (values != 0).nonzero(as_tuple=True)
            out[row_of[a:b].reshape(-1)[slot[at]], column[at, word]] = values[at, word]

        over_blocks(expand, len(words), words.shape[1] * CHUNK, words.device)
        row = torch.repeat_interleave(row_of[:, :-1].reshape(-1), res_start.diff().view(-1))
        out[row, parts["res_col"][: len(row)].long()] = parts["res_val"].view(torch.int16)[: len(row)]
        return out.view(torch.bfloat16)


def _fits(shape: Shape, choice: FormatChoice) -> bool:
    n, k = shape
    return k < _FIELD and slots(n, choice.option("bins")) + WARP * choice.option("warps") < _FIELD


def _surveyed(bits: torch.Tensor, gap_bits: int) -> tuple[Code, list[Survey]]:
    """The window, and the survey of each row block under it: only rows with values outside it are read again."""
    n, k = bits.shape
    blind = over_blocks(lambda a, b: (a, survey(bits[a:b], gap_bits)), n, k, bits.device)
    code, _ = best_code(torch.stack([part.exponents for _, part in blind]).sum(0).tolist(), gap_bits)
    at = dict(blind)
    again = over_blocks(lambda a, b: at[a].under(code, bits[a:b]), n, k, bits.device)
    return code, again


def _residual(surveys: Sequence[Survey], dealt: Bins) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """First value of each slot, columns and values; one zero outside every row where there is none."""
    slot = torch.repeat_interleave(dealt.slot, torch.cat([part.res_count for part in surveys]))
    order = slot.sort(stable=True).indices
    start = pad(slot.bincount(minlength=dealt.row_of.numel()).cumsum(0), (1, -1)).view(dealt.row_of.shape)
    col = torch.cat([part.res_col for part in surveys])[order]
    val = torch.cat([part.res_val for part in surveys])[order]
    if not col.numel():
        col, val = col.new_zeros(1), val.new_zeros(1)
    return start, col.to(torch.int32), val.view(torch.bfloat16)
