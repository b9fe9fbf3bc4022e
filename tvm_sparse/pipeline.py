"""Work in line: items read one ahead of where they are used, and results taken away one behind."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch

Item = TypeVar("Item")


def ahead(items: Iterable[Item]) -> Iterator[Item]:
    """The items; each is made by a thread while the one before is worked on."""
    source, end = iter(items), object()
    with _worker() as worker:
        following: Future[Any] = worker.submit(next, source, end)
        while (item := following.result()) is not end:
            following = worker.submit(next, source, end)
            yield item


class Behind:
    """A context manager: pieces of work done by a thread, in order, at most one besides that under way.

    What one raises, the next `submit` or the end raises. Work handed over is finished whatever happens.
    """

    def __init__(self) -> None:
        self._worker = _worker()
        self._last: Future[None] | None = None

    def submit(self, work: Callable[[], None]) -> None:
        self.wait()
        self._last = self._worker.submit(work)

    def wait(self) -> None:
        last, self._last = self._last, None
        if last is not None:
            last.result()

    def __enter__(self) -> Behind:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._worker.shutdown()
        if kind is None:
            self.wait()


def _worker() -> ThreadPoolExecutor:
    """One thread in which torch uses as many as in this one."""
    return ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(torch.get_num_threads(),))
