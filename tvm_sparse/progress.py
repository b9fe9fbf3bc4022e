"""Phase times, progress bars and peak memory; bars are quiet where standard error is not a terminal."""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

Item = TypeVar("Item")

DEBUG = int(os.environ.get("TVM_SPARSE_DEBUG") or 0)
"""The debug ladder: 1 phase times, 2 plan and kernel table, 3 the IR after each pass, 4 the generated CUDA."""


class Phases:
    """Wall-clock seconds by phase, for the report."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        if sys.stderr.isatty() or DEBUG:
            print(f"  {name} ...", file=sys.stderr, flush=True)
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
            if sys.stderr.isatty() or DEBUG:
                print(f"  {name}: {self.seconds[name]:.1f} s", file=sys.stderr, flush=True)


def bar(items: Iterable[Item], total: int, unit: str, what: str) -> Iterable[Item]:
    """The items behind a progress bar on a terminal, the items themselves elsewhere."""
    if not sys.stderr.isatty():
        return items
    from tqdm import tqdm

    return tqdm(items, total=total, unit=unit, desc=what, leave=False)


def peak_memory() -> int:
    """Most resident bytes this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
