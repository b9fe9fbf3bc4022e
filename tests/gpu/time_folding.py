"""What a folded group gains by running again on the same weights: python tests/gpu/time_folding.py LIBRARY [EVICT_LAST]

LIBRARY is of `bench kernels --target h200 --sparsity 0.75,0.9,0.95 --batch 1 --packed delta --build-library LIBRARY`;
EVICT_LAST, if given, the same with the words' loads marked evict_last. A group is some of a layer's packed matrices, in
one allocation. Times come from captured graphs that first read half a gigabyte of other data, so that nothing of the
group is in the L2 cache: `first` is an iteration after that, `later` one of the 15 that follow, `others` one of 16 that
each have weights of their own. `+ state`: every iteration also updates 6.3 MB of its own, as DeltaNet layers do. With a
`window` the allocation is marked persisting in the L2 cache (access policy window of the stream that is captured).
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from tvm_sparse.bench.gpu_race import Kernels
from tvm_sparse.bench.options import blank_spec
from tvm_sparse.engine.runtime import load_cuda
from tvm_sparse.formats import FORMATS, Packed, pack
from tvm_sparse.plan import expected_stats
from tvm_sparse.targets import MACHINES

H200 = MACHINES["h200"]
DELTANET_IN, ATTENTION_IN, OUT = (16480, 5120), (14336, 5120), (5120, 6144)
GATE_UP, DOWN = (34816, 5120), (5120, 17408)
DELTANET, ATTENTION = (DELTANET_IN, OUT, GATE_UP, DOWN), (ATTENTION_IN, OUT, GATE_UP, DOWN)
GROUPS = {
    "down 90 %": ((DOWN,), 0.9),
    "MLP 95 %": ((GATE_UP, DOWN), 0.95),
    "gate, up 90 %": ((GATE_UP,), 0.9),
    "DeltaNet layer 95 %": (DELTANET, 0.95),
    "down 75 %": ((DOWN,), 0.75),
    "MLP 90 %": ((GATE_UP, DOWN), 0.9),
    "DeltaNet layer 90 %": (DELTANET, 0.9),
    "DeltaNet + attention 95 %": ((*DELTANET, *ATTENTION), 0.95),
    "DeltaNet layer 75 %": (DELTANET, 0.75),
}
ITERATIONS, ROUNDS = 16, 9
STATE = 48 * 128 * 128 * 4  # bytes of one DeltaNet layer's recurrent state, read and written
FLUSH = 512 << 20
ALIGN = 256

L2_SIZE, MAX_PERSISTING, MAX_WINDOW = 38, 108, 109  # cudaDeviceAttr
PERSISTING_LIMIT = 6  # cudaLimitPersistingL2CacheSize
WINDOW_ATTRIBUTE = 1  # cudaLaunchAttributeAccessPolicyWindow
NORMAL, STREAMING, PERSISTING = 0, 1, 2  # cudaAccessProperty


class Window(ctypes.Structure):
    """cudaAccessPolicyWindow, padded to the 64 bytes of cudaLaunchAttributeValue."""

    _fields_ = [
        ("base", ctypes.c_void_p),
        ("nbytes", ctypes.c_size_t),
        ("hit_ratio", ctypes.c_float),
        ("hit", ctypes.c_int),
        ("miss", ctypes.c_int),
        ("padding", ctypes.c_byte * 36),
    ]


class Cuda:
    """The few runtime calls that torch has no names for."""

    def __init__(self) -> None:
        torch.zeros(1, device="cuda")
        self._runtime = load_cuda()

    def attribute(self, number: int) -> int:
        value = ctypes.c_int()
        self.check(self._runtime.cudaDeviceGetAttribute(ctypes.byref(value), number, 0))
        return value.value

    def set_aside(self, nbytes: int) -> None:
        """So much of the L2 cache for persisting lines; what persisted before is let go."""
        self.check(self._runtime.cudaCtxResetPersistingL2Cache())
        self.check(self._runtime.cudaDeviceSetLimit(PERSISTING_LIMIT, ctypes.c_size_t(nbytes)))

    def set_window(self, stream: torch.cuda.Stream, memory: torch.Tensor | None, hit_ratio: float = 1.0) -> None:
        """Kernels launched into the stream from now on see the tensor as persisting; None: nothing."""
        window = Window(None, 0, 0.0, NORMAL, NORMAL)
        if memory is not None:
            nbytes = min(memory.nbytes, self.attribute(MAX_WINDOW))
            window = Window(memory.data_ptr(), nbytes, hit_ratio, PERSISTING, STREAMING)
        handle = ctypes.c_void_p(stream.cuda_stream)
        self.check(self._runtime.cudaStreamSetAttribute(handle, WINDOW_ATTRIBUTE, ctypes.byref(window)))

    def windows(self, graph: int) -> tuple[int, int]:
        """Kernels of a graph, and how many of them carry a window."""
        raw, count = ctypes.c_void_p(graph), ctypes.c_size_t()
        self.check(self._runtime.cudaGraphGetNodes(raw, None, ctypes.byref(count)))
        nodes = (ctypes.c_void_p * count.value)()
        self.check(self._runtime.cudaGraphGetNodes(raw, nodes, ctypes.byref(count)))
        kernels = carrying = 0
        for node in nodes:
            window = Window()
            failed = self._runtime.cudaGraphKernelNodeGetAttribute(
                ctypes.c_void_p(node), WINDOW_ATTRIBUTE, ctypes.byref(window)
            )
            self._runtime.cudaGetLastError()  # other nodes than kernels are an error, and no matter
            kernels += not failed
            carrying += not failed and window.nbytes > 0
        return kernels, carrying

    @staticmethod
    def check(status: int) -> None:
        if status:
            raise RuntimeError(f"CUDA error {status}")


class Group:
    """Packed matrices side by side in one allocation, and calls of their kernels."""

    def __init__(self, packed: list[tuple[tuple[int, int], Packed]], kernels: Kernels) -> None:
        tensors = [tensor for _, each in packed for tensor in each.buffers.values()]
        self.memory = torch.zeros(sum(_padded(tensor.nbytes) for tensor in tensors), dtype=torch.uint8, device="cuda")
        self.nbytes = self.memory.nbytes
        self._calls, at = [], 0
        for shape, each in packed:
            parts = []
            for tensor in each.buffers.values():
                here = self.memory[at : at + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
                parts.append(here.copy_(tensor))
                at += _padded(tensor.nbytes)
            x = torch.randn(1, shape[1], device="cuda").bfloat16()
            y = torch.zeros(1, shape[0], device="cuda").bfloat16()
            kernel = kernels[blank_spec(each.choice, shape, 1, H200).name]
            self._calls.append((kernel, x, parts, y))

    def __call__(self) -> None:
        for kernel, x, parts, y in self._calls:
            kernel(x, *parts, y)


def _padded(nbytes: int) -> int:
    return -(-nbytes // ALIGN) * ALIGN


@cache
def random_packed(shape: tuple[int, int], sparsity: float) -> Packed:
    weight = torch.empty(shape, device="cuda").normal_(0, 0.0111)
    cut = weight.abs().flatten()[: 1 << 22].quantile(sparsity)
    choice = FORMATS["delta"].choices(expected_stats(shape, 1 - sparsity), H200)[0]
    return pack(weight.mul_(weight.abs() > cut).bfloat16(), choice)


class Timer:
    """Microseconds of captured work after a flush of the L2 cache."""

    def __init__(self, cuda: Cuda, kernels: Kernels) -> None:
        self.cuda, self.kernels = cuda, kernels
        self.stream = torch.cuda.Stream()
        self._other = torch.ones(FLUSH // 4, device="cuda")
        self._sum = torch.zeros((), device="cuda")
        self.carrying: set[tuple[int, int]] = set()
        self._flush_alone = self._time([])

    def __call__(self, calls: list[Callable[[], object]]) -> float:
        return self._time(calls) - self._flush_alone

    def _time(self, calls: list[Callable[[], object]]) -> float:
        def work() -> None:
            torch.sum(self._other, dim=0, out=self._sum)
            for call in calls:
                call()

        work()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        with self.kernels.stream(torch.cuda.graph(graph, stream=self.stream)):
            work()
        graph.instantiate()
        self.carrying.add(self.cuda.windows(graph.raw_cuda_graph()))
        found = []
        for _ in range(ROUNDS + 2):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            found.append(start.elapsed_time(end) * 1e3)
        return median(found[2:])


@contextmanager
def persisting(cuda: Cuda, timer: Timer, memory: torch.Tensor | None) -> Iterator[None]:
    """A window over `memory` in the timer's stream, as much of it persisting as the device sets aside."""
    if memory is None:
        yield
        return
    most = cuda.attribute(MAX_PERSISTING)
    cuda.set_aside(most)
    cuda.set_window(timer.stream, memory, min(1.0, most / memory.nbytes))
    try:
        yield
    finally:
        cuda.set_window(timer.stream, None)
        cuda.set_aside(0)


def measure(timer: Timer, group: Group, state: list[torch.Tensor], memory: torch.Tensor | None) -> list[float]:
    """first, later, later with state."""
    updates = [lambda s=s: s.mul_(1.0) for s in state]  # type: ignore[misc]
    with persisting(timer.cuda, timer, memory):
        once, often = timer([group]), timer([group] * ITERATIONS)
        one, all = ([call for update in part for call in (group, update)] for part in (updates[:1], updates))
        with_state = timer(all) - timer(one)
        alone = timer(list(updates)) - timer(updates[:1])
    return [once, (often - once) / (ITERATIONS - 1), (with_state - alone) / (ITERATIONS - 1)]


def main(library: str, evict_last: str | None = None) -> None:
    cuda, kernels = Cuda(), Kernels(Path(library))
    marked = Kernels(Path(evict_last)) if evict_last else None
    timer = Timer(cuda, kernels)
    sizes = [cuda.attribute(number) / 2**20 for number in (L2_SIZE, MAX_PERSISTING, MAX_WINDOW)]
    print(torch.cuda.get_device_name(0), "L2 {:.0f} MiB, at most {:.0f} persisting, window {:.0f}".format(*sizes))
    heads = ["first", "later", "+ state", "others"]
    print(f"{'group':28} {'MB':>6}  {'':12}" + "".join(f"{head:>9}" for head in heads), flush=True)
    state = [torch.ones(STATE // 4, device="cuda") for _ in range(ITERATIONS)]
    for name, (shapes, sparsity) in GROUPS.items():
        packed = [(shape, random_packed(shape, sparsity)) for shape in shapes]
        group = Group(packed, kernels)
        others = [Group(packed, kernels) for _ in range(ITERATIONS)]
        apart = (timer(list(others)) - timer(others[:1])) / (ITERATIONS - 1)
        del others
        rows = {"plain": (group, None), "window": (group, group.memory)}
        if marked is not None:
            rows["evict_last"] = (Group(packed, marked), None)
        for how, (each, memory) in rows.items():
            times = measure(timer, each, state, memory)
            said = "".join(f"{time:9.1f}" for time in (*times, apart))
            print(f"{name:28} {each.nbytes / 1e6:6.1f}  {how:12}{said}", flush=True)
    print("kernels in a graph, of these with a window:", sorted(timer.carrying))


if __name__ == "__main__":
    main(*sys.argv[1:])
