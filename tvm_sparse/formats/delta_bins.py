"""Where the rows of a delta stream stand: in which bin, at which chunk, and how a bin is cut into lane streams."""

from __future__ import annotations

from dataclasses import dataclass
from heapq import heapify, heappop, heapreplace
from itertools import pairwise
from math import isqrt

import torch

WARP = 32  # streams of a warp, one a lane
UNUSED = 1 << 30  # where a slot without a row ends: never reached


def slots(rows: int, bins: int) -> int:
    """Slots of a bin: more than the average number of rows, so that long rows stand with short ones; one is free."""
    mean = -(-rows // bins)
    return mean + isqrt(mean) + 1


@dataclass(frozen=True)
class Bins:
    """Rows dealt to `bins` bins; within a bin rows stand one after the other, each `chunks` chunks long.

    slot     int64 [N]                  the row's place: bin * slots + rank
    row_of   int64 [bins, slots]        the way back; -1 where there is none
    row_end  int64 [bins, slots]        chunk of the bin at which the row ends; UNUSED where there is none
    steps    warp-wide chunks (32 chunks, one a lane) of the fullest bin
    """

    slot: torch.Tensor
    row_of: torch.Tensor
    row_end: torch.Tensor
    steps: int


def deal(chunks: torch.Tensor, bins: int) -> Bins:
    """int64 [N] -> Bins: the longest row first, each to the bin with the fewest chunks so far that has a slot free."""
    room = slots(len(chunks), bins)
    order = chunks.sort(descending=True, stable=True).indices
    rows, lengths = order.tolist(), chunks[order].tolist()
    heap, taken, place = [(0, b) for b in range(bins)], [0] * bins, [0] * len(rows)
    heapify(heap)
    for row, length in zip(rows, lengths, strict=True):
        load, b = heap[0]
        place[row] = b * room + taken[b]
        taken[b] += 1
        if taken[b] < room - 1:
            heapreplace(heap, (load + length, b))
        else:
            heappop(heap)
    slot = torch.tensor(place, device=chunks.device)
    row_of = slot.new_full((bins * room,), -1)
    row_of[slot] = torch.arange(len(slot), device=slot.device)
    length = chunks.new_zeros(bins * room)
    length[slot] = chunks
    end = length.view(bins, room).cumsum(1)
    # More room than chunks, always: a row without any ends where a lane is still to come by and put its sum away.
    steps = int(end[:, -1].max()) // WARP + 1
    return Bins(slot, row_of.view(bins, room), end.masked_fill_(row_of.view(bins, room) < 0, UNUSED), steps)


def warp_begin(steps: int, warps: int) -> list[int]:
    """Steps at which each warp begins, and the end: as equal as whole numbers are."""
    return [steps * warp // warps for warp in range(warps + 1)]


def stream_begin(steps: int, warps: int, device: torch.device) -> torch.Tensor:
    """int64 [warps * 32]: the chunk of the bin at which each lane's stream begins, ascending."""
    cuts = torch.tensor(warp_begin(steps, warps), device=device)
    lane = torch.arange(WARP, device=device)
    return (cuts[:-1, None] * WARP + cuts.diff()[:, None] * lane).view(-1)


def weave(words: torch.Tensor, warps: int) -> None:
    """int16 [bins, steps, 32, 8], a bin's chunks in order -> in place, the lanes of a warp side by side."""
    wide = words.view(torch.int64)
    cuts = warp_begin(words.shape[1], warps)
    for begin, end in pairwise(cuts):
        if end - begin > 1:
            part = wide[:, begin:end]
            part.copy_(part.reshape(len(part), WARP, end - begin, 2).transpose(1, 2).contiguous())


def unweave(words: torch.Tensor, warps: int) -> torch.Tensor:
    """The way back, as a copy: int16 [bins, steps, 32, 8] -> int16 [bins, steps * 32, 8], a bin's chunks in order."""
    bins, steps = words.shape[:2]
    wide = words.view(torch.int64)
    cuts = warp_begin(steps, warps)
    parts = [wide[:, a:b].transpose(1, 2).reshape(bins, -1, 2) for a, b in pairwise(cuts)]
    return torch.cat(parts, 1).view(torch.int16)
