"""Work in line: one item ahead, one result behind, failures where they belong."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial

import pytest
import torch

from tvm_sparse.pipeline import Behind, ahead


def test_items_come_in_order_each_made_while_the_one_before_is_used():
    made, following = [], threading.Event()

    def source() -> Iterator[int]:
        for i in range(4):
            made.append(i)
            if i == 1:
                following.set()
            yield i

    items = ahead(source())
    assert next(items) == 0
    assert following.wait(10), "the second item is made while the first is used"
    assert list(items) == [1, 2, 3] and made == [0, 1, 2, 3]


def test_what_a_source_raises_comes_after_its_items():
    def source() -> Iterator[int]:
        yield 1
        raise ValueError("broken")

    items = ahead(source())
    assert next(items) == 1
    with pytest.raises(ValueError, match="broken"):
        next(items)


def test_work_is_done_in_order_by_one_thread_with_torchs_threads():
    done = []
    threads = torch.get_num_threads()

    def note(i: int) -> None:
        done.append((i, torch.get_num_threads()))

    with Behind() as worker:
        for i in range(5):
            worker.submit(partial(note, i))
    assert done == [(i, threads) for i in range(5)]


def test_a_failure_reaches_the_next_submit_or_the_end():
    def fail() -> None:
        raise OSError("full")

    with pytest.raises(OSError, match="full"), Behind() as worker:
        worker.submit(fail)
    done = []
    with pytest.raises(OSError, match="full"), Behind() as worker:
        worker.submit(fail)
        worker.submit(lambda: done.append(1))
    assert not done


def test_work_under_way_is_finished_when_the_caller_fails():
    done = []
    with pytest.raises(KeyboardInterrupt), Behind() as worker:
        worker.submit(lambda: done.append(1))
        raise KeyboardInterrupt
    assert done == [1]
