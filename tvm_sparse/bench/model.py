"""`bench model`: a whole model, dense and sparse, token by token.

    pp N    a prompt of N tokens into empty caches (prefill)
    tg N    N tokens one after the other, at a depth: as if so many tokens were in the caches, which hold random numbers

as llama-bench names them. What is measured is an artefact (its own weights, or random ones where it has none) or, with
`synthetic`, libraries made for the occasion with random weights straight in the device's memory.
"""

from __future__ import annotations

import gc
import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from itertools import chain
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np

from tvm_sparse.artefact.reader import INDEX, read_facts
from tvm_sparse.bench.account import account, by_class, product_names
from tvm_sparse.bench.results import merge
from tvm_sparse.bench.tables import Row
from tvm_sparse.bench.transformers_race import references
from tvm_sparse.command_line import CommandParser
from tvm_sparse.engine import Engine
from tvm_sparse.errors import Refusal
from tvm_sparse.layout import make_layout
from tvm_sparse.models.config import ModelConfig
from tvm_sparse.targets import MACHINES

KEYS = ("machine", "model", "weights", "batch", "test", "depth")
SYNTHETIC = "synthetic"
SPLIT = "Milliseconds of a token by kind of kernel"
_TRACED = 5  # tokens
ELSEWHERE = "Published elsewhere, not measured here"


@dataclass(frozen=True)
class Test:
    """`kind` "pp" or "tg", of `count` tokens."""

    kind: str
    count: int

    def __str__(self) -> str:
        return f"{self.kind}{self.count}"


@dataclass(frozen=True)
class Options:
    folders: tuple[Path, ...]
    tests: tuple[Test, ...]
    depths: tuple[int, ...]
    repeat: int
    device: str
    out: Path
    transformers: bool


def main(argv: Sequence[str]) -> None:
    options = parse(argv)
    command = " ".join(["python -m tvm_sparse.bench model", *argv])
    merged: list[Row] = []
    notes = {"machine": machine(options.device), "date": date.today().isoformat(), "command": command}
    for row in chain(*(measure(folder, options) for folder in options.folders), _beside(options)):
        print("  " + ", ".join(f"{key} {_short(value)}" for key, value in row.items() if key != SPLIT), flush=True)
        merged = merge(options.out, "model", [row], KEYS, notes, {ELSEWHERE: references()})
    print((options.out / "model.md").read_text(encoding="utf-8") if merged else "nothing was measured")


def parse(argv: Sequence[str]) -> Options:
    """Raises Refusal for anything it cannot read. With `synthetic`, builds the libraries that are not there yet."""
    parser = CommandParser("bench model", "Speed of a whole model, token by token.")
    add = parser.add_argument
    add("artefact", metavar="OUT|synthetic", help="what build wrote (random weights where it has none), or synthetic")
    add("--against", nargs="*", default=[], metavar="OUT", help="more of them, measured in the same run")
    add("--tests", default="pp512,pp2048,tg128", help="ppN and tgN, comma list")
    add("--depth", default="0", help="tokens in the caches before tg starts, comma list")
    add("--repeat", type=int, default=3, help="timed runs of each test")
    add("--transformers", action="store_true", help="the dense model in transformers, bfloat16, beside them")
    add("--device", default="auto", help="cpu, cuda:0, or auto: what the artefact was built for")
    add("--out", type=Path, default=Path("bench-model"), help="folder the results are merged into")
    add("--model", default="qwen3.5-27b", help="synthetic: the model")
    add("--sparsity", default="0,0.5,0.75,0.9", help="synthetic: shares of zeros, comma list; 2:4 for the pattern")
    add("--target", default="auto", help="synthetic: what to build for")
    add("--batch", default="1", help="synthetic: sequences decoded together, comma list")
    add("--libraries", type=Path, default=Path("dist/bench"), help="synthetic: where the libraries are kept")
    args = parser.parse_args(argv)
    tests = tuple(_test(part) for part in args.tests.split(","))
    depths = _whole("--depth", args.depth, least=0)
    context = max([test.count for test in tests] + [test.count + max(depths) for test in tests if test.kind == "tg"])
    if args.repeat < 1:
        raise Refusal(f"--repeat {args.repeat}: at least 1")
    folders = [Path(name) for name in args.against]
    if args.artefact == SYNTHETIC:
        batches = _whole("--batch", args.batch, least=1)
        folders += _libraries(args.model, args.sparsity.split(","), batches, args.target, context, args.libraries)
    else:
        folders.insert(0, Path(args.artefact))
    device = args.device
    if device == "auto":
        device = {"cuda": "cuda:0"}.get(read_facts(folders[0])["device"], "cpu")
    return Options(tuple(folders), tests, depths, args.repeat, device, args.out, args.transformers)


def measure(folder: Path, options: Options) -> Iterator[Row]:
    """The rows of one artefact; tests that its context cannot hold are left out with a word."""
    facts = read_facts(folder, options.device)
    needed = max(test.count + (max(options.depths) if test.kind == "tg" else 0) for test in options.tests)
    engine = Engine(folder, options.device, context=min(needed, facts["context"]), weights=_weights(folder, options))
    _fill(engine)
    streamed = _streamed(engine, facts) + _read_again(folder, facts)
    for test in options.tests:
        for depth in options.depths if test.kind == "tg" else (0,):
            if depth + test.count > engine.context:
                print(f"  {folder}: {test} at depth {depth} is over its context of {engine.context}: left out")
                continue
            times = list(_times(engine, test, depth, options.repeat))
            row = _row(folder, facts, engine, test, depth, times, streamed)
            traced = test.kind == "tg" and engine.device == "cuda"
            yield {**row, **(_split(facts, engine, depth) if traced else {})}
    del engine
    gc.collect()


def _split(facts: dict[str, Any], engine: Engine, depth: int) -> Row:
    """Where the time of a token goes at a depth, from the profiler's trace; nothing where that cannot look."""
    engine.seek(min(depth, engine.context - _TRACED - 1))
    layout = make_layout(ModelConfig.from_json(facts["config"]), facts["layout"]["schedule"])
    split = by_class(account(engine.advance, _TRACED), product_names(layout.params))
    if not split:
        print("  torch's profiler saw no kernel: the split of a token's time is left out")
    return {SPLIT: split} if split else {}


def _beside(options: Options) -> Iterator[Row]:
    """transformers' rows, where they are asked for: tg at depth 0 only."""
    if not options.transformers:
        return
    from tvm_sparse.bench.transformers_race import TransformersModel

    facts = read_facts(options.folders[0])
    model = TransformersModel(facts["config"], options.device)
    for test in options.tests:
        times = list(model.times(test, facts["batch"], options.repeat))
        row = _speed(facts, f"dense, transformers {model.version}", facts["batch"], test, 0, times)
        yield row | ({"ms/token": mean(times) / test.count * 1e3} if test.kind == "tg" else {})


def _speed(
    facts: dict[str, Any], weights: str, batch: int, test: Test, depth: int, times: list[float]
) -> dict[str, object]:
    speeds = [batch * test.count / seconds for seconds in times]
    return {
        "model": facts["model"], "weights": weights, "batch": batch, "test": str(test), "depth": depth,
        "tokens/s": mean(speeds), "spread": stdev(speeds) if len(speeds) > 1 else 0.0,
    }  # fmt: skip


def _row(
    folder: Path, facts: dict[str, Any], engine: Engine, test: Test, depth: int, times: list[float], streamed: int
) -> Row:
    row = _speed(facts, _label(facts, folder), engine.batch, test, depth, times)
    if test.kind == "tg":
        took = mean(times) / test.count
        nbytes = streamed + engine.memory.position * (depth + test.count // 2)
        row |= {"ms/token": took * 1e3, "GB/token": nbytes / 1e9, "TB/s": nbytes / took / 1e12}
        if engine.device == "cuda":
            row["B200 ms/token (projection)"] = _projected(nbytes, took, MACHINES[facts["targets"][0]].bandwidth) * 1e3
    return row | {"memory GB": engine.memory.total / 1e9}


def _projected(nbytes: int, seconds: float, bandwidth: float) -> float:
    """Seconds on a B200, if it reaches the same share of its bandwidth: a projection, not a measurement."""
    efficiency = nbytes / seconds / bandwidth
    return nbytes / (efficiency * MACHINES["b200"].bandwidth)


def _times(engine: Engine, test: Test, depth: int, repeat: int) -> Iterator[float]:
    """Seconds of each timed run, after one that warms up."""
    ids = np.random.default_rng(0).integers(engine.vocab_size, size=test.count).tolist()
    prompt = ids if engine.batch == 1 else [ids] * engine.batch
    for number in range(repeat + 1):
        engine.reset()
        engine.seek(depth)
        began = time.perf_counter()
        if test.kind == "pp":
            engine.prefill(prompt)
        else:
            engine.advance(test.count)
        if number:
            yield time.perf_counter() - began


def _fill(engine: Engine) -> None:
    """Random numbers in every attention cache: zeros would read and multiply as fast, but hide a NaN."""
    import torch

    for name, tensor in engine.state.items():
        if name.endswith("_cache"):
            torch.from_dlpack(tensor).normal_()


def _streamed(engine: Engine, facts: dict[str, Any]) -> int:
    """Bytes a decode step reads whatever the depth: all weights but the embedding (one row a token), and states."""
    embedding = 0 if facts["config"]["tie_word_embeddings"] else 2 * engine.vocab_size * facts["config"]["hidden_size"]
    return engine.memory.weights + engine.memory.on_host - embedding + 2 * engine.memory.states


def _read_again(folder: Path, facts: dict[str, Any]) -> int:
    """Bytes of folded layers' matrices for every execution but the first: hardly any is still in a cache."""
    uses = Counter(f"layers.{layer}." for layer in facts["layout"]["schedule"])
    rows = json.loads((folder / "report.json").read_text())["matrices"]
    again = {layer: count - 1 for layer, count in uses.items() if count > 1}
    return sum(count * row["bytes"] for layer, count in again.items() for row in rows if row["param"].startswith(layer))


def _weights(folder: Path, options: Options) -> Any:
    """None: the artefact's own."""
    if (folder / INDEX).exists():
        return None
    from tvm_sparse.bench.random_weights import RandomWeights

    return RandomWeights(folder, options.device)


def _label(facts: dict[str, Any], folder: Path) -> str:
    pruning, drawn = facts["pruning"], "" if (folder / INDEX).exists() else ", random"
    schedule = facts["layout"]["schedule"]
    if len(schedule) > len(set(schedule)):
        drawn += f", {len(schedule)} layers with the weights of {len(set(schedule))}"
    if pruning["include"]:
        drawn = f", {', '.join(pruning['include'])} too{drawn}"
    if pruning["pattern"] != "unstructured":
        stored = {choice.partition("(")[0] for choice in facts["plan"].values()} - {"dense"}
        return f"{pruning['pattern']} as {' and '.join(sorted(stored)) or 'dense'}{drawn}"
    if pruning["sparsity"] is None:
        return f"as it is{drawn}"
    return (f"{pruning['sparsity']:.0%} zeros" if pruning["sparsity"] else "dense") + drawn


def _libraries(
    model: str, sparsities: Sequence[str], batches: Sequence[int], target: str, context: int, folder: Path
) -> list[Path]:
    """A library without weights for each of them, built where it is not there yet."""
    from tvm_sparse.build import build_library
    from tvm_sparse.config import parse_build

    found = []
    for batch in batches:
        for share in sparsities:
            name = f"{Path(model).name}-{share.replace(':', 'of')}-{target}-b{batch}-c{context}"
            wanted = ["--pattern", share] if ":" in share else []
            amount = str(1 - _fraction(share)) if ":" in share else share
            argv = ["--model", model, "--sparsity", amount, *wanted, "--target", target, "--batch", str(batch)]
            build_library(parse_build([*argv, "--context", str(context), "--out", str(folder / name)]))
            found.append(folder / name)
    return found


def _fraction(pattern: str) -> float:
    kept, _, of = pattern.partition(":")
    try:
        return int(kept) / int(of)
    except (ValueError, ZeroDivisionError):
        raise Refusal(f"--sparsity {pattern}: shares of zeros such as 0.75, or a pattern such as 2:4") from None


def _test(text: str) -> Test:
    kind, count = text[:2], text[2:]
    if kind not in ("pp", "tg") or not count.isdigit() or int(count) < 1:
        raise Refusal(f"--tests {text}: write ppN or tgN, such as pp512 or tg128")
    return Test(kind, int(count))


def _whole(flag: str, text: str, least: int) -> tuple[int, ...]:
    if not all(part.isdigit() and int(part) >= least for part in text.split(",")):
        raise Refusal(f"{flag} {text}: a comma list of whole numbers from {least}")
    return tuple(int(part) for part in text.split(","))


def machine(device: str) -> str:
    """The device's name as its maker spells it."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.get_device_name(device)
    from tvm_sparse.bench.cpu_race import machine as cpu

    return str(cpu()["machine"])


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
