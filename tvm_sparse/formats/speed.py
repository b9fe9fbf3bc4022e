"""What a matrix costs in each format on each kind of machine: the only place with measured speeds.

A call that multiplies m tokens takes

    fixed + max(bytes / (share * bandwidth), instructions / rate)
          + (m - 1) * (elements * per_element + words * per_word)

where a GPU's lanes issue `instructions` and a CPU's rates already contain its arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm_sparse.formats import FORMATS, FormatChoice, Stats
from tvm_sparse.formats.gather import cut_of, tokens_at_once
from tvm_sparse.formats.stats import CHUNK
from tvm_sparse.targets import Machine


@dataclass(frozen=True)
class Speed:
    """`fixed` seconds a call; `share` of the machine's bandwidth.

    On a GPU a word takes `first` instructions and `further` more for each token, a dense element takes `each`, x of
    each further token `staging` seconds; the whole call is repeated for every `at_once` tokens. On a CPU every token
    but the first takes `per_element` seconds for each dense element and `per_word` for each packed word.
    """

    fixed: float
    share: float
    first: float = 0.0
    further: float = 0.0
    each: float = 0.0
    staging: float = 0.0
    at_once: int = 1 << 30
    per_element: float = 0.0
    per_word: float = 0.0


SPEEDS = {
    # One thread of a 2-core virtual machine (EPYC, Zen 5), shares of the 50e9 bytes a second in targets.py. Bitmap:
    # tuning_logs/cpu/bench/kernels.md, median over five shapes 32 / 22 / 20e9 bytes a second at 50 / 75 / 90 % zeros;
    # a further token took 5.3 / 5.4 / 6.8e-12 seconds an element at [5120, 17408]. Dense is our own kernel, not
    # torch's: assumed to stream as bitmap does, and so are 2:4 and block. Delta: 2 to 4e9 bytes a second,
    # half of torch's f32 product at 75 %; it gathers again for each token.
    ("dense", "cpu"): Speed(1e-6, 0.44, per_element=5.5e-12),
    ("bitmap", "cpu"): Speed(1e-6, 0.44, per_element=5.5e-12),
    ("2:4", "cpu"): Speed(1e-6, 0.44, per_element=5.5e-12),
    ("block", "cpu"): Speed(1e-6, 0.44, per_element=5.5e-12),
    ("delta", "cpu"): Speed(1e-6, 0.08, per_word=250e-12),
    # H200, 4.8e12 bytes a second. Dense: 82 us at [34816, 5120], 16.5 us at [5120, 6144]. Delta: 21.6 us and 6.1 us at
    # 75 %, 38.9 us and 9.1 us at 50 % (docs/kernels.md); with 2, 4, 8 and 16 tokens 23.4, 36.2, 70.8 and 139 us at
    # [34816, 5120], 13.9, 27.3, 54 and 105 us at [5120, 17408] and 75 %. Our kernels of the other formats for one
    # token, at [34816, 5120] and [5120, 6144]: bitmap at 50 % 564 and 100 us, 2:4 246 and 55 us, 16x16 blocks at 50 %
    # 314 and 65 us, all slower than dense.
    # Tiles: 12.1, 9.5 and 8.5 us at [5120, 6144], 28.0, 21.7 and 16.3 us at [5120, 17408] with 50, 75 and 90 % zeros
    # and 8 tokens, 1 to 8 us more with 16.
    ("dense", "cuda"): Speed(2.5e-6, 0.92),
    # Gather, 8 tokens: 36.5 and 19.0 us at [34816, 5120], 22.6 and 13.3 us at [5120, 17408], 10.2 and 6.7 us at
    # [5120, 6144] with 75 and 90 % zeros; 16 at once 67.5 and 33.6 us at [34816, 5120].
    ("gather", "cuda"): Speed(3.2e-6, 0.86, first=2.5, further=2.1, staging=0.1e-6),
    ("delta", "cuda"): Speed(2.1e-6, 0.905, first=4.0, further=3.5, staging=1.1e-6, at_once=4),
    ("tiles", "cuda"): Speed(3.2e-6, 0.86, first=6.4, further=0.3, each=2.7, at_once=16),
    ("bitmap", "cuda"): Speed(3.5e-6, 0.075),
    ("2:4", "cuda"): Speed(3.5e-6, 0.17),
    ("block", "cuda"): Speed(3.5e-6, 0.12),
}

_ROOM = 14000  # columns of x of 4 tokens that shared memory holds as float32
_LANES, _CLOCK = 128, 1.7e9  # instructions an SM issues per clock, counted by lane; clock under load


def seconds(stats: Stats, choice: FormatChoice, machine: Machine, tokens: int) -> float:
    """Expected seconds of y[tokens, N] = x W^T on one machine."""
    speed = SPEEDS[choice.name, machine.device]
    n, k = stats.shape
    if choice.name == "block":
        elements = stats.blocks[choice.option("rows"), choice.option("cols")]
        elements *= choice.option("rows") * choice.option("cols")
    else:
        elements = n * k
    nbytes = FORMATS[choice.name].nbytes(stats, choice)
    words = stats.nnz
    if choice.name == "delta":
        words = CHUNK * stats.chunks[choice.option("gap_bits")]
    elif choice.name in ("gather", "tiles"):
        words = nbytes // 2
    streamed = nbytes / (speed.share * machine.bandwidth)
    rate = max(machine.cores, 1) * _LANES * _CLOCK
    at_once, multiplied = speed.at_once, min(tokens, speed.at_once)
    if choice.name == "gather":  # 8 or 16, whether they are there or not
        at_once = multiplied = tokens_at_once(cut_of(stats.shape, choice), tokens)
    elif choice.name == "delta" and machine.is_gpu and k > _ROOM:
        at_once, multiplied = 2, min(tokens, 2)
    issued = (words * (speed.first + speed.further * multiplied) + elements * speed.each) / rate
    more = (tokens - 1) * (elements * speed.per_element + words * speed.per_word)
    once = speed.fixed + (multiplied - 1) * speed.staging + max(streamed, issued)
    return -(-tokens // at_once) * once + more
