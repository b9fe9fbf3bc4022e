"""bfloat16 as integers: sign 1, exponent 8, mantissa 7. Formats work on these, so that packing is bit-exact.

torch's uint16 has few operations; the same bits as int16 have all of them.
"""

from __future__ import annotations

import torch

from tvm_sparse.errors import Refusal

MAGNITUDE = 0x7FFF
INFINITY = 0x7F80
SIGN = -0x8000
LIMIT = 2**31


def as_bits(weight: torch.Tensor) -> torch.Tensor:
    """bfloat16 [N, K] -> the same storage as int16. Raises Refusal for another dtype, rank or size."""
    if weight.ndim != 2 or weight.dtype != torch.bfloat16 or 0 in weight.shape:
        raise Refusal(f"a {weight.dtype} tensor of shape {list(weight.shape)}: formats pack bfloat16 [N, K]")
    if weight.numel() >= LIMIT:
        raise Refusal(f"{list(weight.shape)} has 2^31 weights or more: exclude it or split it")
    return weight.contiguous().view(torch.int16)


def magnitude(bits: torch.Tensor) -> torch.Tensor:
    """Absolute values; 0 for both zeros. Raises Refusal for NaN and infinity."""
    absolute = bits & MAGNITUDE
    if absolute.numel() and int(absolute.max()) >= INFINITY:
        bad = int((absolute >= INFINITY).sum())
        raise Refusal(f"{bad} weights are NaN or infinite: repair the checkpoint, no format holds them")
    return absolute


def positive_zero(bits: torch.Tensor) -> torch.Tensor:
    """-0.0 becomes +0.0, everything else stays."""
    return bits.masked_fill((bits & MAGNITUDE) == 0, 0)
