"""`bench kernels` on a GPU: the packed matmul against every dense product, in one run, by captured graphs.

Nothing here imports TVM's compiler: a library built elsewhere runs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from tvm_sparse.bench import gpu_library, gpu_rivals
from tvm_sparse.bench.gpu_timing import (
    TOLERANCE,
    Kernels,
    random_sparse,
    random_tokens,
    relative_error,
    rotating,
)
from tvm_sparse.bench.options import MANY, Options, blank_spec
from tvm_sparse.bench.tables import Row
from tvm_sparse.bench.timing import Times
from tvm_sparse.formats import FORMATS, Packed, Stats, pack
from tvm_sparse.formats.base import FormatChoice
from tvm_sparse.plan import decide, expected_stats
from tvm_sparse.schedules.spec import KernelSpec

DENSE = FORMATS["dense"].choice()
_RIVALS_TOLERANCE = 3e-2  # torch's product of a CSR matrix with several bfloat16 columns is off by 1 to 2.3 %


def specs(options: Options) -> list[KernelSpec]:
    """Every kernel a run needs, told from the options alone."""
    found: dict[KernelSpec, None] = {}
    for shape in options.shapes:
        for tokens in options.batches:
            choices = [choose(options, expected_stats(shape, 1 - s), tokens) for s in options.sparsities]
            for choice in (*choices, DENSE):
                found[blank_spec(choice, shape, tokens, options.machine)] = None
    return list(found)


def choose(options: Options, stats: Stats, tokens: int) -> FormatChoice:
    """The format of a row. A prompt meets what was chosen for decoding one token: a matrix is stored once."""
    if options.packed == "auto":
        return decide("weight", stats, (options.machine,), 1 if tokens > MANY else tokens).choice
    return (*FORMATS[options.packed].choices(stats, options.machine), DENSE)[0]


def measure_all(options: Options, library: Path) -> Iterator[Row]:
    lane = _Lane(options, library)
    for shape in options.shapes:
        dense: dict[int, dict[str, Times | None]] = {}
        for sparsity in options.sparsities:
            weight = random_sparse(shape, sparsity)
            packed: dict[FormatChoice, Packed] = {}
            for tokens in options.batches:
                choice = choose(options, expected_stats(shape, 1 - sparsity), tokens)
                if choice not in packed:
                    packed[choice] = pack(weight, choice)
                if tokens not in dense:
                    dense[tokens] = lane.rivals(weight, tokens)
                row = lane.row(weight, packed[choice], sparsity, tokens, dense[tokens])
                told = ", ".join(f"{key} {value}" for key, value in row.items())
                print(f"  {told}", file=sys.stderr, flush=True)
                yield row


class _Lane:
    """One GPU, one library: contenders run one after the other, each in a graph over copies of its own."""

    def __init__(self, options: Options, library: Path):
        self._options, self._machine = options, options.machine
        self._kernels, self._built = Kernels(library), gpu_library.read(library)

    def row(
        self, weight: torch.Tensor, packed: Packed, sparsity: float, tokens: int, rivals: dict[str, Times | None]
    ) -> Row:
        (n, k), choice = weight.shape, packed.choice
        spec = blank_spec(choice, (n, k), tokens, self._machine)
        x = random_tokens(tokens, k)
        ours, y = self._ours(spec, x)
        mine = self._time(str(choice), list(packed.buffers.values()), ours)
        error = relative_error(y, x.double() @ weight.double().T)
        if not error < TOLERANCE:
            raise RuntimeError(f"{spec.name}: relative error {error:.1e} at {sparsity:g}")
        others = {"cuSPARSE CSR": self._try("cuSPARSE CSR", lambda: self._csr(x, weight)), **rivals}
        dense = [times for name in ("dense", "cuBLAS", "cuBLASLt") if (times := others[name]) is not None]
        best = min(dense, key=lambda times: times.median)
        row: dict[str, object] = {
            "shape": f"{n}x{k}", "sparsity": sparsity, "batch": tokens, "format": str(choice),
            "schedule": self._built[spec.name].schedule.split(":")[0],
            "us": mine.median * 1e6, "spread us": mine.spread * 1e6, "MB": packed.nbytes / 1e6,
            "TB/s": packed.nbytes / mine.median / 1e12, "floor us": self._floor(packed).median * 1e6,
            **{f"{name} us": times.median * 1e6 if times else "" for name, times in others.items()},
            "ratio": best.median / mine.median, "error": error,
        }  # fmt: skip
        return row

    def rivals(self, weight: torch.Tensor, tokens: int) -> dict[str, Times | None]:
        """Dense products, whose time does not depend on the zeros, and 2:4, which has its own."""
        n, k = weight.shape
        x = random_tokens(tokens, k)
        want = x.double() @ weight.double().T
        kernel = self._kernels[blank_spec(DENSE, (n, k), tokens, self._machine).name]
        y = _poisoned(tokens, n)
        found: dict[str, Times | None] = {"dense": self._time("dense", [weight], lambda w: kernel(x, w, y))}
        _check("dense", y, want, TOLERANCE)
        for name in ("cuBLAS", "cuBLASLt"):
            with gpu_rivals.blas(name.lower()):
                found[name] = self._rival(name, gpu_rivals.dense(x, weight), want)
        kept = "cuSPARSELt 2:4"
        found[kept] = self._try(
            kept, lambda: self._rival(kept, gpu_rivals.two_four(x, weight), gpu_rivals.two_four_wanted(x, weight))
        )
        return found

    def _ours(self, spec: KernelSpec, x: torch.Tensor) -> tuple[Callable[..., object], torch.Tensor]:
        """The call on packed buffers, and the poisoned y it fills."""
        built = self._built[spec.name]
        kernel = self._kernels[built.symbol]
        y = _poisoned(x.shape[0], spec.n)
        if not built.scratch:
            return lambda *parts: kernel(x, *parts, y), y
        scratch = torch.empty(built.scratch, dtype=torch.uint8, device="cuda")
        return lambda *parts: kernel(x, *parts, y, scratch), y

    def _csr(self, x: torch.Tensor, weight: torch.Tensor) -> Times | None:
        if x.shape[0] > MANY:
            return None  # a hundred times slower than dense
        return self._rival("cuSPARSE CSR", gpu_rivals.csr(x, weight), x.double() @ weight.double().T)

    def _rival(self, name: str, rival: gpu_rivals.Rival, want: torch.Tensor) -> Times:
        times = self._time(name, rival.tensors, rival.call)
        _check(name, rival.result(), want, _RIVALS_TOLERANCE)
        return times

    def _floor(self, packed: Packed) -> Times:
        """The kernel that reads as many bytes and does nothing else."""
        cores = self._machine.cores
        steps = -(-packed.nbytes // (cores * 512))
        words = torch.zeros(cores, steps, 32, 8, dtype=torch.uint16, device="cuda")
        out = torch.zeros(1, dtype=torch.uint32, device="cuda")
        return self._time("floor", [words], lambda words: self._kernels[gpu_library.FLOOR](words, out))

    def _time(self, name: str, tensors: Sequence[torch.Tensor], call: Callable[..., object]) -> Times:
        copies = rotating(tensors, self._machine)
        calls = [lambda copy=copy: call(*copy) for copy in copies]  # type: ignore[misc]
        return Times(name, sum(t.nbytes for t in tensors), self._kernels.replays(calls, self._options.rounds))

    def _try(self, name: str, measure: Callable[[], Times | None]) -> Times | None:
        """A library that does not take this product leaves a gap, with a word."""
        try:
            return measure()
        except Exception as fault:
            print(f"  {name}: {type(fault).__name__}: {str(fault).splitlines()[0][:200]}", file=sys.stderr)
            return None


def _poisoned(tokens: int, n: int) -> torch.Tensor:
    return torch.full((tokens, n), torch.nan, dtype=torch.bfloat16, device="cuda")


def _check(name: str, y: torch.Tensor, want: torch.Tensor, tolerance: float) -> None:
    error = relative_error(y, want)
    if not error < tolerance:
        raise RuntimeError(f"{name}: relative error {error:.1e}")


def machine() -> dict[str, object]:
    return {"machine": torch.cuda.get_device_name(0), "torch": torch.__version__}
