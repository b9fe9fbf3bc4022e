"""Threads for torch operations that run on one core only: whole pieces of work side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def on_all_cores(work: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """[work(item), ...] in order, by as many threads as torch would use; torch's own threads are off inside."""
    todo = list(items)
    outside = torch.get_num_threads()
    if min(outside, len(todo)) <= 1:
        return [work(item) for item in todo]
    try:
        with ThreadPoolExecutor(min(outside, len(todo)), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(work, todo))
    finally:
        torch.set_num_threads(outside)  # the initializer also moved the process-wide default
