"""One pass over a checkpoint: every weight is read once, for its tensor's histogram and for layer similarity alike.

Matrices that every layer of a kind has are read together, the same rows of all layers at a time, so that their
pairwise products can be summed while only these rows are in memory. Threads take chunks of rows; torch's own threads
are off inside, because the operations that count run on one core anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from tvm_sparse.checkpoint import Checkpoint, Stored
from tvm_sparse.errors import Refusal
from tvm_sparse.measure.components import similarity_group
from tvm_sparse.measure.magnitudes import FINITE, Magnitudes, count
from tvm_sparse.measure.zero_units import Maxima, maxima
from tvm_sparse.progress import bar

MEMORY = 600_000_000  # bytes of bfloat16 rows held at a time: 256 rows of the widest matrix in 64 layers
CHUNK = 1 << 20  # weights a thread counts at a time
ROWS = 256  # chunks are multiples of it, tiles where they can be: synthetic weights are drawn by so many rows
STRIP = 1 << 15  # columns of a product summed in float32

Done = Callable[[Stored, Magnitudes, Maxima | None], None]


@dataclass(frozen=True)
class Tile:
    """Rows [start, stop) of tensors of one shape; `name` of what their products are summed under, if anything."""

    name: str | None
    tensors: tuple[Stored, ...]
    start: int
    stop: int


@dataclass
class Tally:
    """What is known of the rows of one tensor so far."""

    counts: torch.Tensor
    maxima: Maxima | None

    def add(self, below: Tally) -> None:
        self.counts += below.counts
        if self.maxima and below.maxima:
            self.maxima.add(below.maxima)


def sweep(checkpoint: Checkpoint, tensors: Sequence[Stored], done: Done) -> dict[str, np.ndarray]:
    """Calls `done` with each tensor when it is complete; returns the pairwise products of layers by projection.

    The products are float64 [layers, layers], layers in ascending order. Float32 and float16 tensors are measured
    rounded to bfloat16. Raises Refusal for NaN and infinity, by name.
    """
    tiles = list(_tiles(tensors))
    products: dict[str, np.ndarray] = {}
    tallies: dict[str, Tally] = {}
    held = torch.empty(0, dtype=torch.bfloat16)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)  # here too: a thousand small calls on every core would spend their time waiting
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for tile in bar(tiles, len(tiles), "tile", "measure"):
                size = len(tile.tensors) * (tile.stop - tile.start) * _columns(tile.tensors[0])
                if tile.name and len(held) < size:
                    held = torch.empty(size, dtype=torch.bfloat16)
                rows = held[:size].view(len(tile.tensors), -1) if tile.name else None
                _count_tile(pool, checkpoint, tile, rows, tallies)
                if rows is not None and tile.name:
                    products[tile.name] = products.get(tile.name, 0) + _products(pool, rows, threads)
                for tensor in tile.tensors if tile.stop == tile.tensors[0].shape[0] else ():
                    tally = tallies.pop(tensor.name)
                    done(tensor, Magnitudes(tally.counts[:FINITE].numpy()), tally.maxima)
    finally:
        torch.set_num_threads(threads)
    return products


def _tiles(tensors: Sequence[Stored]) -> Iterator[Tile]:
    """Groups of equal matrices in order of their layers, then everything else, each in tiles of whole rows."""
    groups: dict[str, list[Stored]] = {}
    for tensor in tensors:
        group = similarity_group(tensor)
        groups.setdefault(group[0] if group else tensor.name, []).append(tensor)
    for name, members in groups.items():
        together = len(members) > 1
        rows = members[0].shape[0]
        step = _whole(MEMORY // (2 * len(members) * _columns(members[0])))
        for start in range(0, rows, step):
            yield Tile(name if together else None, tuple(members), start, min(start + step, rows))


def _count_tile(
    pool: ThreadPoolExecutor, checkpoint: Checkpoint, tile: Tile, rows: torch.Tensor | None, tallies: dict[str, Tally]
) -> None:
    step = max(ROWS, _whole(CHUNK // _columns(tile.tensors[0])))
    jobs = [
        (i, start, min(start + step, tile.stop))
        for i in range(len(tile.tensors))
        for start in range(tile.start, tile.stop, step)
    ]

    def work(job: tuple[int, int, int]) -> Tally:
        i, start, stop = job
        tensor = tile.tensors[i]
        block = checkpoint.stored_rows(tensor, start, stop).bfloat16()
        if rows is not None:
            width = _columns(tensor)
            first = (start - tile.start) * width
            rows[i, first : first + block.numel()] = block.view(-1)
        return _tally(tensor, block)

    for (i, _, _), tally in zip(jobs, pool.map(work, jobs), strict=True):
        name = tile.tensors[i].name
        if name in tallies:
            tallies[name].add(tally)
        else:
            tallies[name] = tally


def _tally(tensor: Stored, block: torch.Tensor) -> Tally:
    magnitude = block.contiguous().view(torch.int16) & 0x7FFF
    counts = count(magnitude)
    if bool(counts[FINITE:].any()):
        raise Refusal(f"tensor {tensor.name} holds NaN or infinity: repair the checkpoint, or give another one")
    return Tally(counts, maxima(magnitude) if len(tensor.shape) == 2 else None)


def _products(pool: ThreadPoolExecutor, rows: torch.Tensor, threads: int) -> np.ndarray:
    """rows [L, n] -> rows @ rows.T in float64 [L, L], strip by strip."""
    starts = range(0, rows.shape[1], STRIP)

    def work(thread: int) -> torch.Tensor:
        total = torch.zeros(len(rows), len(rows), dtype=torch.float64)
        for start in starts[thread::threads]:
            strip = rows[:, start : start + STRIP].float()
            total += strip @ strip.T
        return total

    return sum(part.numpy() for part in pool.map(work, range(threads)))  # type: ignore[return-value]


def _columns(tensor: Stored) -> int:
    columns = 1
    for size in tensor.shape[1:]:
        columns *= size
    return columns


def _whole(rows: int) -> int:
    """Rows to take together: a multiple of ROWS where there are as many, else of 16, at least 16."""
    return rows // ROWS * ROWS if rows >= ROWS else max(16, rows // 16 * 16)
