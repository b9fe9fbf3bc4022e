"""One process that measures, apart from the one that searches: a kernel that crashes or hangs fails its trial alone."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any


def ignore_interrupts() -> None:
    """Ctrl-C reaches every process of a terminal's group: the one that started the others ends them, compilers too."""
    os.setpgrp()
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class Crashed(Exception):
    """The measuring process died or took too long; a new one takes its place."""


class Worker:
    """Calls functions in its process, one at a time; what they keep there lasts until a call crashes or hangs."""

    def __init__(self) -> None:
        self._pool: ProcessPoolExecutor | None = None
        self._ended = False

    def call(self, function: Callable[..., Any], *arguments: Any, timeout: float) -> Any:
        """`function` and what goes in and out must be picklable. Raises Crashed, or what the function raises."""
        if self._ended:
            raise Crashed("the run was ended")
        if self._pool is None:
            self._pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), ignore_interrupts)
        running = self._pool.submit(function, *arguments)
        try:
            done = running.exception(timeout)
        except TimeoutError:
            self._kill()
            raise Crashed(f"no answer within {timeout:.0f} s") from None
        if isinstance(done, BrokenProcessPool):
            self._kill()
            raise Crashed("the kernel ended the process that ran it")
        return running.result()

    def end(self) -> None:
        """Ends the process, whatever it is doing, and starts no other."""
        self._ended = True
        self._kill()

    def _kill(self) -> None:
        if self._pool is None:
            return
        pool, self._pool = self._pool, None
        processes = list((pool._processes or {}).values())  # there is no public way before Python 3.14
        pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.kill()
