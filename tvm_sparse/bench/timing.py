"""Times contenders side by side: round after round, each contender once over all its copies in every round."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean, median, stdev

Call = Callable[[], object]


@dataclass(frozen=True)
class Contender:
    """One way to compute the same thing; each call reads its own copy of the weights, `nbytes` of them.

    Copies are many enough that none is in a cache when its turn comes again.
    """

    name: str
    nbytes: int
    calls: Sequence[Call]


@dataclass(frozen=True)
class Times:
    """Seconds of one call, a figure for each round."""

    name: str
    nbytes: int
    rounds: tuple[float, ...]

    @property
    def mean(self) -> float:
        return mean(self.rounds)

    @property
    def median(self) -> float:
        return median(self.rounds)

    @property
    def spread(self) -> float:
        """Standard deviation over the rounds."""
        return stdev(self.rounds) if len(self.rounds) > 1 else 0.0

    @property
    def bandwidth(self) -> float:
        """Bytes of weights a second."""
        return self.nbytes / self.median


def race(contenders: Sequence[Contender], rounds: int) -> list[Times]:
    """Interleaved, so that a noisy neighbour slows all alike; one round before the first warms up."""
    seconds: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for number in range(rounds + 1):
        for contender in contenders:
            start = time.perf_counter()
            for call in contender.calls:
                call()
            took = (time.perf_counter() - start) / len(contender.calls)
            if number:
                seconds[contender.name].append(took)
    return [Times(c.name, c.nbytes, tuple(seconds[c.name])) for c in contenders]


def ratio(against: Times, of: Times) -> float:
    """How many times faster `of` is: the median over the rounds, each of which saw the same machine."""
    return median(a / b for a, b in zip(against.rounds, of.rounds, strict=True))
