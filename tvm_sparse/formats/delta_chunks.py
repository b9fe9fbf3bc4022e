"""16 bytes of the delta stream: 8 words of 16 bits, or 9 of 14.

A lane of a GPU reads a chunk at once, as four registers of two slots each. Words of 16 bits are the slots. Of a word of
14 bits a slot has two bits to spare, 16 in a chunk, and these hold its first word, spread:

    slot        bit 15   14 .. 9 or 8                    8 or 7 ..
    0 1, 4 5    sign     gap - 1, two bits of another    exponent code, mantissa
    2 3, 6 7    sign     two bits of another, gap - 1    exponent code, mantissa

Bits of the spread word's low byte stand in even slots, the lower halves of registers, of its high byte in odd ones; at
which of the byte's bits each register's two belong: `PLACE`. With spare bits in two places most come together without
a shift.
"""

from __future__ import annotations

import torch

SLOTS = 8
PLACE = (0, 4, 2, 6)


def words_of(unit: int) -> int:
    """Words of a chunk in a stream of such units."""
    return max(SLOTS, unit)


def bits_of(unit: int) -> int:
    """Bits of a word."""
    return 128 // words_of(unit)


def spare_bit(register: int, gap_bits: int) -> int:
    """The lower of a slot's two spare bits, counted from its bit 8."""
    return 5 if register % 2 else 5 - gap_bits


def fold(words: torch.Tensor, gap_bits: int) -> torch.Tensor:
    """int16 [.., words of a chunk] -> int16 [.., 8 slots]."""
    if words.shape[-1] == SLOTS:
        return words
    spread = words[..., 0]
    slots = words[..., 1:].clone()
    field = (1 << gap_bits) - 1
    for slot in range(SLOTS):
        register, half = divmod(slot, 2)
        at = 8 + spare_bit(register, gap_bits)
        if register % 2:
            gap = slots[..., slot] & (field << (15 - gap_bits))
            slots[..., slot] += (gap >> 2) - gap
        slots[..., slot] |= (spread >> (8 * half + PLACE[register]) & 3) << at
    return slots


def unfold(slots: torch.Tensor, gap_bits: int, count: int) -> torch.Tensor:
    """The way back: int16 [.., 8] -> int16 [.., count]."""
    if count == SLOTS:
        return slots
    words = torch.empty(*slots.shape[:-1], count, dtype=slots.dtype, device=slots.device)
    spread = torch.zeros_like(slots[..., 0])
    field = (1 << gap_bits) - 1
    for slot in range(SLOTS):
        register, half = divmod(slot, 2)
        at = 8 + spare_bit(register, gap_bits)
        word = slots[..., slot] & ~(3 << at)
        spread |= (slots[..., slot] >> at & 3) << (8 * half + PLACE[register])
        if register % 2:
            gap = word & (field << (13 - gap_bits))
            word += (gap << 2) - gap
        words[..., slot + 1] = word
    words[..., 0] = spread
    return words
