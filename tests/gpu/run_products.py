"""Products of many tokens on a GPU: python tests/gpu/run_products.py --library FILE [time]

Of build_library.py's: every format on ragged shapes against float64, twice the same bits, alone and from a captured
graph. `time`, of build_products.py's: the five shapes of the 27B; torch is cuBLAS on the dense matrix in the
same run. TVM_SPARSE_CUBLASLT=0 takes the library's own kernel.
"""

from __future__ import annotations

import json
import statistics
import sys
from math import exp, log
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

import torch  # noqa: E402
import tvm_ffi  # noqa: E402
from host import DEVICE, Output, library_of, load, relative_error  # noqa: E402

from tvm_sparse.formats import FORMATS  # noqa: E402

TOLERANCE = {"float32": 2e-6, "bfloat16": 4e-3}
CHECKED = (1, 2, 17, 64, 65, 200)
TIMED = (64, 512, 2048, 8192)
CROSSOVER = (1, 8, 16, 32, 64)
SPARSITIES = (0.5, 0.75, 0.9)


def weight(row: dict, sparsity: float) -> torch.Tensor:
    """bfloat16 [n, k] with zeros as the format wants them."""
    n, k = row["n"], row["k"]
    w = torch.randn(n, k, device=DEVICE, dtype=torch.bfloat16) * 0.02
    if row["format"] == "2:4":
        keep = torch.rand(n, k // 4, 4, device=DEVICE).argsort(2) < 2
        w *= keep.view(n, k)
    elif row["format"] == "block":
        r, c = row["options"]["rows"], row["options"]["cols"]
        keep = torch.rand(-(-n // r), -(-k // c), device=DEVICE) >= sparsity
        w *= keep.repeat_interleave(r, 0).repeat_interleave(c, 1)[:n, :k]
    elif row["format"] != "dense":
        w *= torch.rand(n, k, device=DEVICE) >= sparsity
    return w


def buffers_of(row: dict, w: torch.Tensor) -> list[torch.Tensor]:
    fmt = FORMATS[row["format"]]
    return [t.contiguous() for t in fmt.pack(w, fmt.choice(**row["options"])).buffers.values()]


def captured(repeat: int, function, *args) -> torch.cuda.CUDAGraph:
    """Calls once outside, where cuBLASLt is found and its algorithm chosen, then captures `repeat` calls."""
    function(*args)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with tvm_ffi.use_torch_stream(torch.cuda.graph(graph)):
        for _ in range(repeat):
            function(*args)
    return graph


def check(row: dict, kernel) -> float:
    """The worst relative error over numbers of tokens."""
    w = weight(row, 0.7)
    buffers = buffers_of(row, w)
    dtype, worst = getattr(torch, row["out_dtype"]), 0.0
    for tokens in CHECKED if row["m"] is None else (row["m"],):
        x = torch.randn(tokens, row["k"], device=DEVICE).bfloat16()
        reference = x.double() @ w.double().T
        results = []
        for replayed in (False, False, True):
            y = Output(tokens, row["n"], dtype=dtype)
            scratch = torch.full((row["scratch"],), 255, dtype=torch.uint8, device=DEVICE)
            if replayed:
                graph = captured(1, kernel, x, *buffers, y.tensor, scratch)
                y.tensor.fill_(float("nan"))
                graph.replay()
            else:
                kernel(x, *buffers, y.tensor, scratch)
            torch.cuda.synchronize()
            assert y.unharmed(), f"{row['symbol']}: written outside the output"
            results.append(y.tensor)
        assert torch.equal(results[0], results[1]), f"{row['symbol']}: two runs differ at {tokens} tokens"
        assert torch.equal(results[0], results[2]), f"{row['symbol']}: a replay differs at {tokens} tokens"
        worst = max(worst, relative_error(results[0], reference))
        if worst != worst:
            return worst
    return worst


def microseconds(function, *args, repeat: int = 5) -> float:
    """Of one call, in a graph of several; the median of five replays."""
    graph, times = captured(repeat, function, *args), []
    graph.replay()
    for _ in range(5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / repeat)
    return statistics.median(times)


def dense_product(x: torch.Tensor, w: torch.Tensor, y: torch.Tensor) -> None:
    torch.mm(x, w.T, out=y)


def check_all(rows: list[dict], get) -> bool:
    failed, worst, checked = [], {}, 0
    for row in rows:
        if row["n"] * row["k"] > 1 << 21:
            continue
        checked += 1
        error = check(row, get(row["symbol"]))
        key = (row["format"], row["out_dtype"])
        worst[key] = max(worst.get(key, 0.0), error)
        if not error <= TOLERANCE[row["out_dtype"]]:
            failed.append(f"{row['symbol']}: {error:.2e}")
    for key, error in worst.items():
        print(*key, f"{error:.1e}")
    print(f"products: {checked - len(failed)} of {checked} right", *failed, sep="\n  ", flush=True)
    return not failed


def time_all(rows: list[dict], get) -> None:
    ratios: dict[int, list[float]] = {tokens: [] for tokens in TIMED}
    large = [row for row in rows if row["n"] * row["k"] > 1 << 21]
    print("n x k, format, sparsity, decoder; for each number of tokens: ours, torch dense (microseconds), ratio")
    for row in large:
        n, k = row["n"], row["k"]
        for sparsity in SPARSITIES if row["format"] in ("bitmap", "delta") else (0.5,):
            w = weight(row, sparsity)
            buffers = buffers_of(row, w)
            scratch = torch.empty(row["scratch"], dtype=torch.uint8, device=DEVICE)
            name = f"{n}x{k} {row['format']} {sparsity:.0%}"
            if row["decode"]:
                decoded = scratch[: 2 * n * k].view(torch.bfloat16).view(n, k)
                took = microseconds(get(row["decode"]), *buffers, decoded)
                right = torch.equal(decoded.view(torch.int16), (w + 0.0).view(torch.int16))
                size = 2 * n * k + sum(b.nbytes for b in buffers)
                name += f", decode {took:.0f} us {size / took / 1e6:.2f} TB/s {'right' if right else 'WRONG'}"
            line = []
            for tokens in TIMED if row["m"] is None else (row["m"],):
                x = torch.randn(tokens, k, device=DEVICE).bfloat16()
                y = torch.empty(tokens, n, device=DEVICE, dtype=torch.bfloat16)
                ours = microseconds(get(row["symbol"]), x, *buffers, y, scratch)
                dense = microseconds(dense_product, x, w, y)
                line.append(f"{tokens}: {ours:.0f} {dense:.0f} {dense / ours:.2f}")
                if row["decode"]:
                    ratios[tokens].append(dense / ours)
            print(name, *line, sep=" | ", flush=True)
            if row["few"]:
                line = []
                for tokens in CROSSOVER:
                    x = torch.randn(tokens, k, device=DEVICE).bfloat16()
                    y = torch.empty(tokens, n, device=DEVICE, dtype=torch.bfloat16)
                    few = microseconds(get(row["few"]), x, *buffers, y, repeat=2)
                    line.append(f"{tokens}: {few:.0f} {took + microseconds(dense_product, x, w, y):.0f}")
                print("   its own kernel, decoder and torch", *line, sep=" | ", flush=True)
    for tokens, found in ratios.items():
        if found:
            print(f"{tokens} tokens: {exp(sum(map(log, found)) / len(found)):.3f} of dense speed, geometric mean")


def main(argv: list[str]) -> None:
    library, parts = library_of(argv)
    torch.seed()
    get = load(library)
    rows = json.loads(Path(library).with_suffix(".json").read_text())
    right = "time" in parts or check_all(rows, get)
    if "time" in parts:
        time_all(rows, get)
    sys.exit(not right)


if __name__ == "__main__":
    main(sys.argv[1:])
