"""Where the rows of a delta stream stand: in which bin, at which place, and how a bin is cut into lane streams."""

from __future__ import annotations

from dataclasses import dataclass
from heapq import heappop, heapreplace
from itertools import pairwise
from math import isqrt

import numpy as np
import torch

WARP = 32  # streams of a warp, one a lane
STEPS, TRIED = 48, 16  # of levelling bins: exchanges of a bin, and how many rows it offers at each


def slots(rows: int, bins: int) -> int:
    """Slots of a bin: more than the average number of rows, so that long rows stand with short ones; one is free.

    An even number: a GPU copies the table of rows 16 bytes at a time.
    """
    mean = -(-rows // bins)
    return (mean + isqrt(mean) + 2) // 2 * 2


@dataclass(frozen=True)
class Bins:
    """Rows dealt to `bins` bins; within a bin the segments of a class stand one after the other.

    slot     int64 [N]                      the row's place: bin * slots + rank
    row_of   int64 [bins, slots]            the way back; -1 where there is none
    end      int64 [bins, classes, slots]   unit of the class's stream at which the row's segment ends
    """

    slot: torch.Tensor
    row_of: torch.Tensor
    end: torch.Tensor


def deal(units: torch.Tensor, bins: int, pairs: bool = False) -> Bins:
    """int64 [N, classes], units of each segment -> Bins; as `pairs`, rows r and r + N / 2 are neighbours.

    The longest row first, each to the emptiest bin with a slot free. That would leave the fullest class of a bin 1 to
    4 % above the average: then bins exchange rows until their classes are alike as well, which leaves 0.1 to 1.5 %.
    """
    n, classes = units.shape
    room, side = slots(n, bins), 2 if pairs else 1
    dealt = units.view(side, -1, classes).sum(0).cpu().numpy()
    order = (-dealt.sum(1)).argsort(kind="stable")
    rows = _longest_first(dealt[order].sum(1).tolist(), bins, (room - 1) // side)
    _level(rows, dealt[order])
    rows.sort(1)  # without gaps
    bin, rank = (rows < len(order)).nonzero()
    place = np.empty_like(order)
    place[order[rows[bin, rank]]] = bin * room + rank * side
    first = torch.from_numpy(place)
    slot = torch.cat([first + i for i in range(side)]).to(units.device)
    row_of = slot.new_full((bins * room,), -1)
    row_of[slot] = torch.arange(n, device=slot.device)
    length = units.new_zeros(bins * room, classes)
    length[slot] = units
    end = length.view(bins, room, classes).cumsum(1).transpose(1, 2).contiguous()
    return Bins(slot, row_of.view(bins, room), end)


def _longest_first(lengths: list[int], bins: int, places: int) -> np.ndarray:
    """Lengths in falling order -> int64 [bins, places]: which of them stand there, their number where none does."""
    rows = np.full((bins, places), len(lengths))
    emptiest, taken, at = [(0, b) for b in range(bins)], [0] * bins, []
    for length in lengths:
        load, b = emptiest[0]
        at.append(b * places + taken[b])
        taken[b] += 1
        if taken[b] < places:
            heapreplace(emptiest, (load + length, b))
        else:
            heappop(emptiest)
    rows.reshape(-1)[at] = np.arange(len(lengths))
    return rows


def _level(rows: np.ndarray, units: np.ndarray) -> None:
    """Bins exchange rows, in place: each step, full bins with empty ones, the pair of rows that brings two nearest.

    Nearest is the least sum of squares over the classes; of every bin a few rows are tried at a time. All numbers are
    whole, and exact in float64: the result does not depend on the machine.
    """
    held = np.append(units, np.zeros_like(units[:1]), 0).astype(np.float64)[rows]  # [bins, places, classes]
    load = held.sum(1)
    half, stride = len(rows) // 2, -(-rows.shape[1] // TRIED)
    for step in range(STEPS):
        fullness = load[:, step // 2 % load.shape[1]] if step % 2 else load.max(1)
        order = fullness.argsort(kind="stable")
        a, b = order[:half], order[::-1][:half]
        part = slice(step % stride, None, stride)
        x, y, apart = held[a, part], held[b, part], (load[a] - load[b])[:, None]
        # By four times this |apart - 2 (x - y)|^2 is less than |apart|^2.
        gain = 2 * x @ y.transpose(0, 2, 1)
        gain += np.einsum("hic,hic->hi", apart - x, x)[:, :, None]
        gain -= np.einsum("hjc,hjc->hj", apart + y, y)[:, None]
        best = gain.reshape(half, x.shape[1] ** 2).argmax(1)
        i, j = np.divmod(best, x.shape[1])
        some = gain[np.arange(half), i, j] > 0
        mine, other = (a[some], part.start + stride * i[some]), (b[some], part.start + stride * j[some])
        moved = held[mine] - held[other]
        load[mine[0]] -= moved
        load[other[0]] += moved
        held[mine], held[other] = held[other], held[mine]
        rows[mine], rows[other] = rows[other], rows[mine]


def warp_begin(steps: int, warps: int) -> list[int]:
    """Steps at which each warp begins, and the end: as equal as whole numbers are."""
    return [steps * warp // warps for warp in range(warps + 1)]


def stream_begin(steps: int, warps: int, classes: int, device: torch.device) -> torch.Tensor:
    """int64 [warps * 32 / classes]: the chunk of its class at which each stream of a class begins, ascending."""
    lanes = WARP // classes
    cuts = torch.tensor(warp_begin(steps, warps), device=device)
    return (cuts[:-1, None] * lanes + cuts.diff()[:, None] * torch.arange(lanes, device=device)).view(-1)


def weave(words: torch.Tensor, warps: int) -> torch.Tensor:
    """int16 [bins, classes, chunks, 8], in order -> int16 [bins, steps, 32, 8], the lanes of a warp side by side."""
    bins, classes, chunks = words.shape[:3]
    lanes = WARP // classes
    steps = chunks // lanes
    wide = words.view(torch.int64)
    out = torch.empty(bins, steps, lanes, classes, 2, dtype=torch.int64, device=words.device)
    for begin, end in pairwise(warp_begin(steps, warps)):
        part = wide[:, :, begin * lanes : end * lanes].view(bins, classes, lanes, end - begin, 2)
        out[:, begin:end] = part.permute(0, 3, 2, 1, 4)
    return out.view(torch.int16).view(bins, steps, WARP, 8)


def unweave(words: torch.Tensor, warps: int, classes: int) -> torch.Tensor:
    """The way back: int16 [bins, steps, 32, 8] -> int16 [bins, classes, chunks, 8], each class's chunks in order."""
    bins, steps = words.shape[:2]
    lanes = WARP // classes
    wide = words.view(torch.int64).view(bins, steps, lanes, classes, 2)
    cuts = pairwise(warp_begin(steps, warps))
    parts = [wide[:, a:b].permute(0, 3, 2, 1, 4).reshape(bins, classes, -1, 2) for a, b in cuts]
    return torch.cat(parts, 2).view(torch.int16).view(bins, classes, -1, 8)
