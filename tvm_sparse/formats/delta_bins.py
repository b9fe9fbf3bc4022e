"""Where the rows of a delta stream stand: in which bin, at which place, and how a bin is cut into lane streams."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from math import isqrt

import numpy as np
import torch

WARP = 32  # streams of a warp, one a lane


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

    The longest row first, each to the bin with a slot free where it adds least to the sum of e^load over the bins'
    classes, loads in a few standard deviations of a segment: only what is fuller than the rest counts. (The emptiest
    bin for each row would leave the fullest class 1 to 4 % above the average; this leaves it 0.2 to 1.5 %.)
    """
    n, classes = units.shape
    room, side = slots(n, bins), 2 if pairs else 1
    dealt = units.view(side, -1, classes).sum(0)
    order = dealt.sum(1).sort(descending=True, stable=True).indices.cpu()
    growth = dealt.cpu()[order].double().numpy()
    growth *= min(0.3 / max(growth.std(), 1.0), 50.0 / growth.max())
    shift = np.exp(-growth.sum(1) / (bins * classes))  # e^load is held relative to the average load
    growth = np.exp(growth)
    load, taken, place = np.ones((bins, classes)), [0] * bins, [0] * len(order)
    for i, grown in enumerate(growth):
        b = int((load @ (grown - 1)).argmin())
        place[i] = b * room + taken[b]
        taken[b] += side
        load *= shift[i]
        load[b] = load[b] * grown if taken[b] + side < room else np.inf
    first = torch.empty(len(order), dtype=torch.int64).index_copy_(0, order, torch.tensor(place))
    slot = torch.cat([first + i for i in range(side)]).to(units.device)
    row_of = slot.new_full((bins * room,), -1)
    row_of[slot] = torch.arange(n, device=slot.device)
    length = units.new_zeros(bins * room, classes)
    length[slot] = units
    end = length.view(bins, room, classes).cumsum(1).transpose(1, 2).contiguous()
    return Bins(slot, row_of.view(bins, room), end)


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
