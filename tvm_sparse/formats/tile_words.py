"""The streams of the tiles format: which words a warp's 32 lanes take in each round, and what it then multiplies."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from tvm_sparse.formats.delta_words import Code

LANES = 32
TAKEN = 4  # words of a stream in a round: 16 bytes for the two of a lane
RING = 64  # places of a stream: the halves of as many registers
MOST = 15  # steps after one round, in 4 bits
_NEVER = 1 << 30  # where a stream without further words stands


@dataclass(frozen=True)
class Streams:
    """words int16 [rounds of all warps, 32, 8], warp after warp; counts int64, one a round; rounds int64 [warps]."""

    words: torch.Tensor
    counts: torch.Tensor
    rounds: torch.Tensor


@dataclass(frozen=True)
class Lap:
    """How steps of `step` registers lie in a ring: as many as fit, and what is left over stays empty."""

    step: int

    @property
    def registers(self) -> int:
        """Of the steps once round the ring."""
        return RING // self.step * self.step

    def place(self, register: torch.Tensor) -> torch.Tensor:
        """Number of a register in a lane's order -> its position; the place in the ring is that modulo RING."""
        return register + register // self.registers * (RING - self.registers)

    def register(self, place: torch.Tensor) -> torch.Tensor:
        """The way back; the first of the next lap for a position that holds none."""
        return place // RING * self.registers + (place % RING).clamp_max(self.registers)


def streams(dense: torch.Tensor, code: Code, step: int, steps: torch.Tensor) -> Streams:
    """int16 [warps, 64, registers] -> the streams of each warp; all values are held by the code, as its value bits.

    A lane's two streams are neighbours, a warp's rounds even in number. A step is so many registers; `steps` int64
    [warps] of them each warp has. All warps take their rounds side by side.
    """
    warps, of_warp = dense.shape[:2]
    lap = Lap(step)
    position, word, first = _entries(dense, code, lap)
    at = first
    done = steps.new_zeros(warps)
    alive = (position[first].view(warps, of_warp) < _NEVER).any(1)
    ahead = torch.arange(TAKEN, device=dense.device)
    last = position[_ends(first, position)].view(warps, of_warp).amax(1)
    low = (1 << code.gap_shift) - 1
    taken_words: list[torch.Tensor] = []
    counts: list[torch.Tensor] = []
    took: list[torch.Tensor] = []
    while not took or len(took) % 2 or bool(alive.any()):
        entry = at[:, None] + ahead
        begin = lap.place(done * step)
        fits = position[entry] < (begin + RING).repeat_interleave(of_warp)[:, None]
        at = at + fits.sum(1)
        kept = word[at - 1] & (low | -0x8000)
        idle = torch.where(position[at - 1] >= begin.repeat_interleave(of_warp), kept, 0)
        taken_words.append(torch.where(fits, word[entry], idle[:, None]))
        ahead_of = position[at].view(warps, of_warp).amin(1)
        count = torch.minimum(lap.register(ahead_of) // step, steps).sub_(done).clamp_(0, MOST)
        counts.append(count)
        took.append(alive)
        done = done + count
        if len(took) % 2 == 0:
            alive = alive & ((ahead_of < _NEVER) | (lap.place(done * step) <= last))
    return _by_warp(taken_words, counts, torch.stack(took, 1))


def _entries(dense: torch.Tensor, code: Code, lap: Lap) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Position and word of every entry, stream after stream, and where each stream's begin.

    Before a stream's entries stands one of value 0 at position 0, after them TAKEN at _NEVER.
    """
    warps, lanes, length = dense.shape
    flat = dense.view(-1).nonzero().view(-1)
    values = dense.view(-1)[flat]
    lane = flat // length
    place = lap.place(flat - lane * length).to(torch.int32)
    per_lane = lane.bincount(minlength=warps * lanes)
    begin = per_lane.cumsum(0) - per_lane
    gap = place.diff(prepend=place.new_zeros(1))
    firsts = begin[per_lane > 0]
    gap[firsts] = place[firsts]
    fillers = (gap - 1).clamp_min_(0) // code.gap_mask
    ends = (fillers + 1).cumsum(0)
    words_before = pad(ends, (1, 0))[begin]
    needed = pad(ends, (1, 0))[begin + per_lane] - words_before
    room = needed + 1 + TAKEN
    first = room.cumsum(0) - room + 1
    at = ends - 1 + torch.repeat_interleave(first - words_before, per_lane)

    total = int(room.sum())
    position = torch.full((total,), _NEVER, dtype=torch.int32, device=dense.device)
    word = dense.new_zeros(total)
    position[first - 1] = 0
    position[at] = place
    word[at] = values | ((gap - fillers * code.gap_mask) << code.gap_shift).to(torch.int16)
    some = fillers.nonzero().view(-1)
    count = fillers[some]
    each = torch.repeat_interleave(some, count)
    nth = torch.arange(len(each), device=dense.device) - torch.repeat_interleave(count.cumsum(0) - count, count)
    here = at[each] - fillers[each] + nth
    position[here] = place[each] - gap[each] + code.gap_mask * (nth + 1).to(torch.int32)
    word[here] = code.filler
    return position, word, first


def _ends(first: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """The last entry of each stream, the one before its own where it has none."""
    return pad(first[1:], (0, 1), value=len(position) + 1) - 2 - TAKEN


def _by_warp(words: list[torch.Tensor], counts: list[torch.Tensor], took: torch.Tensor) -> Streams:
    warp, turn = took.nonzero(as_tuple=True)
    halves = torch.stack(words).view(len(words), -1, LANES, 2, TAKEN)
    together = halves.transpose(3, 4).flatten(3)
    return Streams(together[turn, warp], torch.stack(counts)[turn, warp], took.sum(1))


def nibbles(streams: Streams) -> tuple[torch.Tensor, torch.Tensor]:
    """Counts as int32 words of 8, two more after each warp's: the words, and how many each warp has."""
    needed = (streams.rounds + 7) // 8 + 2
    warp = torch.repeat_interleave(torch.arange(len(needed), device=needed.device), streams.rounds)
    begin = streams.rounds.cumsum(0) - streams.rounds
    turn = torch.arange(len(warp), device=needed.device) - begin[warp]
    at = 8 * (needed.cumsum(0) - needed)[warp] + turn
    fields = needed.new_zeros(int(needed.sum()) * 8)
    fields[at] = streams.counts
    shifts = 4 * torch.arange(8, device=needed.device)
    return (fields.view(-1, 8) << shifts).sum(1).to(torch.int32), needed


def positions(words: torch.Tensor, rounds: torch.Tensor, code: Code) -> tuple[torch.Tensor, torch.Tensor]:
    """The way back: int16 [rounds, 32, 8] -> positions int64 and values int16 of the words, [rounds, 32, 8] each."""
    gaps = (code.gaps(words) - 1).long().view(-1, LANES, TAKEN, 2)
    within = gaps.sum(2).cumsum(0)
    begin = rounds.cumsum(0) - rounds
    before = within - gaps.sum(2)
    own = torch.repeat_interleave(before[begin.clamp_max(len(before) - 1)], rounds, 0)
    return ((before - own)[:, :, None] + gaps.cumsum(2)).flatten(2), code.values(words)
