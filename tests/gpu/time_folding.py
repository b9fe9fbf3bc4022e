"""What a folded group gains by running again on the same weights: python tests/gpu/time_folding.py LIBRARY

LIBRARY is of `bench kernels --target h200 --sparsity 0.75,0.9,0.95 --batch 1 --packed delta --build-library LIBRARY`.
A group is some of a layer's packed matrices, in one allocation. Times come from captured graphs that first read half a
gigabyte of other data, so that nothing of the group is in the L2 cache: `first` is an iteration after that, `later` one
of the 15 that follow, `others` one of 15 that each have weights of their own. `+ state`: every iteration also updates
3.1 MB of its own, as a DeltaNet layer does, which takes its time too. With a `window` the allocation is marked
persisting in the L2 cache (access policy window of the stream that is captured). `floor`: kernels that read the same
bytes and do nothing else.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import tvm_ffi

from tvm_sparse.bench.gpu_library import FLOOR
from tvm_sparse.bench.gpu_timing import Kernels
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
STATE = 48 * 128 * 128 * 4  # bytes of one DeltaNet layer's recurrent state, 3.1 MB, read and written
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
    """Packed matrices side by side in one allocation, and calls of their kernels, or of one that only reads them."""

    def __init__(self, packed: list[tuple[tuple[int, int], Packed]], kernels: Kernels, floor: bool = False) -> None:
        tensors = [tensor for _, each in packed for tensor in each.buffers.values()]
        self.memory = torch.zeros(sum(_padded(tensor.nbytes) for tensor in tensors), dtype=torch.uint8, device="cuda")
        self.nbytes = self.memory.nbytes
        self._calls: list[Callable[[], object]] = []
        at = 0
        for shape, each in packed:
            parts, began = [], at
            for tensor in each.buffers.values():
                here = self.memory[at : at + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
                parts.append(here.copy_(tensor))
                at += _padded(tensor.nbytes)
            if floor:
                steps = (at - began) // (H200.cores * 512)
                words = self.memory[began : began + H200.cores * steps * 512].view(torch.uint16)
                out = torch.zeros(1, dtype=torch.uint32, device="cuda")
                self._calls.append(partial(kernels[FLOOR], words.view(H200.cores, steps, 32, 8), out))
                continue
            x = torch.randn(1, shape[1], device="cuda").bfloat16()
            y = torch.zeros(1, shape[0], device="cuda").bfloat16()
            self._calls.append(partial(kernels[blank_spec(each.choice, shape, 1, H200).name], x, *parts, y))

    def __call__(self) -> None:
        for call in self._calls:
            call()


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

    def __init__(self, cuda: Cuda) -> None:
        self.cuda = cuda
        self.stream = torch.cuda.Stream()
        self._other = torch.ones(FLUSH // 4, device="cuda")
        self._sum = torch.zeros((), device="cuda")
        self.carrying: set[tuple[int, int]] = set()

    def __call__(self, calls: Sequence[Callable[[], object]]) -> float:
        """The flush's own time is in it."""

        def work() -> None:
            torch.sum(self._other, dim=0, out=self._sum)
            for call in calls:
                call()

        work()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        with tvm_ffi.use_torch_stream(torch.cuda.graph(graph, stream=self.stream)):
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


def measure(timer: Timer, groups: Sequence[Group], updates: Sequence[Callable[[], object]]) -> list[float]:
    """Microseconds of the first iteration, of a later one, and of a later one with its state; an iteration a group."""
    once, all = timer(groups[:1]), timer(groups)
    first, with_state = (
        timer([call for pair in zip(groups[:count], updates, strict=False) for call in pair])
        for count in (1, ITERATIONS)
    )
    return [once - timer([]), (all - once) / (ITERATIONS - 1), (with_state - first) / (ITERATIONS - 1)]


def main(library: str) -> None:
    torch.manual_seed(0)
    cuda, kernels = Cuda(), Kernels(Path(library))
    timer = Timer(cuda)
    sizes = [cuda.attribute(number) / 2**20 for number in (L2_SIZE, MAX_PERSISTING, MAX_WINDOW)]
    print(torch.cuda.get_device_name(0), "L2 {:.0f} MiB, at most {:.0f} persisting, window {:.0f}".format(*sizes))
    heads = ("first", "later", "others", "later + state", "others + state")
    print(f"{'group':28} {'MB':>6}  {'':12}" + "".join(f"{head:>15}" for head in heads), flush=True)
    state = [torch.ones(STATE // 4, device="cuda") for _ in range(ITERATIONS)]
    updates = [partial(torch.Tensor.mul_, each, 1.0) for each in state]
    for name, (shapes, sparsity) in GROUPS.items():
        packed = [(shape, random_packed(shape, sparsity)) for shape in shapes]
        for how in ("plain", "window", "floor"):
            floor = how == "floor"
            group = Group(packed, kernels, floor)
            with persisting(cuda, timer, group.memory if how == "window" else None):
                first, later, later_state = measure(timer, [group] * ITERATIONS, updates)
            others = [Group(packed, kernels, floor) for _ in range(ITERATIONS)]
            _, apart, apart_state = measure(timer, others, updates)
            times = (first, later, apart, later_state, apart_state)
            print(f"{name:28} {group.nbytes / 1e6:6.1f}  {how:12}" + "".join(f"{t:15.1f}" for t in times), flush=True)
            del others, group
    print("kernels in a graph, of these with a window:", max(timer.carrying), max(timer.carrying, key=lambda c: c[1]))


if __name__ == "__main__":
    main(*sys.argv[1:])
