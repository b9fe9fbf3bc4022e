"""Times of prefill's operations at the 27B's sizes: python tests/gpu/time_operations.py --library FILE [TOKENS ...]

Each operation is captured several times into a CUDA graph and replayed. `floor us` is what reading its inputs and
writing its outputs once would take at 4.5 TB/s; attention, which multiplies more than it moves, also gives TFLOP/s.
`us a prefill` counts how often the 27B runs it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

import torch  # noqa: E402
import tvm_ffi  # noqa: E402
from cases import SHAPES  # noqa: E402
from host import DEVICE, library_of, load  # noqa: E402

S = next(shape for shape in SHAPES if shape.name == "large")
CALLS = 10
BANDWIDTH = 4.5e6  # bytes a microsecond
PAST = (0, 4096, 32768)  # tokens the caches hold before attention's


def random(*size: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*size, device=DEVICE).to(dtype)


def floats(*size: int) -> torch.Tensor:
    return random(*size, dtype=torch.float32)


Case = tuple[str, str, int, tuple[torch.Tensor, ...], int, float]
"""What is shown, the kernel, launches in a forward of the 27B, arguments, bytes moved, floating-point operations."""


def cases(n: int) -> Iterator[Case]:
    ids = torch.randint(S.vocab, (n,), dtype=torch.int32, device=DEVICE)
    x, delta, w, y = random(n, S.hidden), random(n, S.hidden), floats(S.hidden), random(n, S.hidden)
    yield "rms_norm", "rms_norm", 1, (x, w, y), 4 * n * S.hidden, 0
    yield "add_rms_norm", "add_rms_norm", 128, (x, delta, w, random(n, S.hidden), y), 8 * n * S.hidden, 0
    yield "silu_mul", "silu_mul", 64, (random(n, 2 * S.inner), random(n, S.inner)), 6 * n * S.inner, 0

    slot = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    width = S.value_heads * S.value_dim
    mixed, conv = random(n, S.channels + width + 2 * S.value_heads), floats(n, S.channels)
    taps, window = floats(S.channels, 4), floats(S.batch, 3, S.channels)
    yield "causal_conv", "causal_conv", 48, (mixed, taps, slot, window, conv), 6 * n * S.channels, 0
    a_log, dt, o = floats(S.value_heads), floats(S.value_heads), floats(n, width)
    memory = floats(S.batch, S.value_heads, S.key_dim, S.value_dim)
    moved = 4 * n * (S.channels + width) + 4 * memory.numel()
    yield "gated_delta", "gated_delta", 48, (conv, mixed, a_log, dt, slot, memory, o), moved, 0
    yield "gated_norm", "gated_norm", 48, (o, mixed, floats(S.value_dim), random(n, width)), 8 * n * width, 0

    queries, kv = S.heads * S.head_dim, S.kv_heads * S.head_dim
    qkv, q = random(n, 2 * (queries + kv)), floats(n, queries)
    norms = floats(S.head_dim), floats(S.head_dim)
    for past in PAST:
        position = torch.full((S.batch,), past, dtype=torch.int32, device=DEVICE)
        caches = [random(S.batch, S.kv_heads, past + n, S.head_dim) for _ in range(2)]
        moved = n * (6 * queries + 8 * kv)
        if past == 0:
            yield "rope_append", "rope_append", 16, (qkv, *norms, slot, position, *caches, q), moved, 0
        flops, moved = 4.0 * queries * n * (past + (n + 1) / 2), n * 8 * queries + 4 * (past + n) * kv
        arguments = (q, qkv, slot, position, *caches, random(n, queries))
        yield f"attention, {past} before", "attention", 0 if past else 16, arguments, moved, flops
    if n <= 256:
        yield "log_probs", "log_probs", 0, (floats(n, S.vocab), ids, floats(n)), 4 * n * S.vocab, 0


def replayed(call: Callable[[], object]) -> float:
    """Microseconds a call."""
    call()
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with tvm_ffi.use_torch_stream(torch.cuda.graph(graph)):
        for _ in range(CALLS):
            call()
    took = []
    for _ in range(5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        took.append(start.elapsed_time(end) / CALLS * 1e3)
    return sorted(took)[len(took) // 2]


def main(library: str, *tokens: str) -> None:
    get = load(library)
    print(torch.cuda.get_device_name())
    for n in [int(t) for t in tokens] or [256, 2048]:
        print(f"{n} tokens: {'operation':28} {'us':>9} {'floor us':>9} {'TFLOP/s':>9} {'us a prefill':>13}")
        whole = 0.0
        for shown, kernel, times, arguments, moved, flops in cases(n):
            function = get(f"{S.name}_{kernel}_p")
            us = replayed(lambda function=function, arguments=arguments: function(*arguments))
            rate = f"{flops / us / 1e6:9.0f}" if flops else " " * 9
            print(f"{'':12}{shown:28} {us:9.1f} {moved / BANDWIDTH:9.1f} {rate} {us * times:13.0f}", flush=True)
            whole += us * times
        print(f"{'':12}{'all, ms':28} {whole / 1e3:52.1f}")


if __name__ == "__main__":
    found, sizes = library_of(sys.argv[1:])
    main(found, *sizes)
