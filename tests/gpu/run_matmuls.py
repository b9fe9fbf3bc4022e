"""Every matmul kernel against float64 on fresh random data.

python tests/gpu/run_matmuls.py --library FILE [format] [--largest N]    (only matrices of at most N weights)
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

import cases  # noqa: E402
import torch  # noqa: E402
from host import DEVICE, Output, library_of, load, relative_error  # noqa: E402

from tvm_sparse.formats import FORMATS  # noqa: E402

TOLERANCE = {"float32": 2e-6, "bfloat16": 4e-3}


def weight(case: cases.Matmul) -> torch.Tensor:
    """Random, with zeros as the format wants them, an empty row, a full row and values of every size."""
    n, k = case.n, case.k
    w = torch.randn(n, k, device=DEVICE) * 0.02
    density = (0.5, 0.25, 0.1, 0.02)[torch.randint(4, ()).item()]
    name, options = case.choice.name, dict(case.choice.options)
    if name == "2:4":
        groups = torch.nn.functional.pad(torch.rand(n, k, device=DEVICE), (0, -k % 4)).view(n, -1, 4)
        keep = groups.argsort(2).argsort(2) < torch.randint(3, groups.shape[:2], device=DEVICE)[..., None]
        w *= keep.view(n, -1)[:, :k]
    elif name == "block":
        r, c = options["rows"], options["cols"]
        keep = torch.rand(-(-n // r), -(-k // c), device=DEVICE) < density
        w *= keep.repeat_interleave(r, 0).repeat_interleave(c, 1)[:n, :k]
    else:
        w *= torch.rand(n, k, device=DEVICE) < density
        w[0] = 0
        w[n // 2] = torch.randn(k, device=DEVICE)
        odd = torch.tensor([3.0, -2.5, 1e-39, -7e-40, 1e-20, 1e5, -0.0], device=DEVICE)
        w.view(-1)[torch.randint(n * k, (7,), device=DEVICE)] = odd
    return w if options.get("width") == 32 else w.bfloat16()


def wanted(case: cases.Matmul, x, norm, residual, w) -> torch.Tensor:
    """What the kernel is to compute, in float64; a product that goes on is rounded as one that is stored would be."""
    if case.norm_eps:
        x = x * torch.rsqrt(x.square().mean(1, keepdim=True) + case.norm_eps) * norm
    y = x @ w.T
    if not case.after:
        return y
    y = y.to(getattr(torch, case.out_dtype)).double()
    if case.after == "add":
        return y + residual
    gate, up = y.chunk(2, 1)
    return torch.nn.functional.silu(gate) * up


def check(case: cases.Matmul, kernel) -> float:
    w = weight(case)
    packed = FORMATS[case.choice.name].pack(w, case.choice)
    buffers = [tensor.to(DEVICE).contiguous() for tensor in packed.buffers.values()]
    worst = 0.0
    for tokens in (case.m,) if case.m is not None else (1, 5, 70):
        x = torch.randn(tokens, case.k, device=DEVICE).to(getattr(torch, case.x_dtype))
        norm = torch.randn(case.k, device=DEVICE)
        residual = torch.randn(tokens, case.n, device=DEVICE).to(getattr(torch, case.out_dtype))
        arguments = [x, *([norm] if case.norm_eps else []), *buffers, *([residual] if case.after == "add" else [])]
        reference = wanted(case, x.double(), norm.double(), residual.double(), w.double())
        results = []
        for _ in range(2):
            y = Output(*reference.shape, dtype=getattr(torch, case.out_dtype))
            kernel(*arguments, y.tensor)
            torch.cuda.synchronize()
            assert y.unharmed(), f"{case.name}: written outside the output"
            results.append(y.tensor)
        assert torch.equal(*results), f"{case.name}: two runs differ"
        worst = max(worst, relative_error(results[0], reference))
        if worst != worst:
            return worst
    return worst


def main(argv: list[str]) -> None:
    library, rest = library_of(argv)
    parser = argparse.ArgumentParser()
    parser.add_argument("format", nargs="?", default="")
    parser.add_argument("--largest", type=int, default=1 << 62)
    only = parser.parse_args(rest)
    torch.seed()
    get = load(library)
    worst: dict[tuple[str, str], float] = {}
    failed = []
    selected = [
        case for case in cases.matmuls() if only.format in ("", case.choice.name) and case.n * case.k <= only.largest
    ]
    for case in selected:
        error = check(case, get(case.name))
        key = (str(case.choice), case.out_dtype)
        worst[key] = max(worst.get(key, 0.0), error)
        if not error <= TOLERANCE[case.out_dtype]:
            failed.append(f"{case.name}: {error:.2e}")
    for (choice, dtype), error in worst.items():
        print(f"{choice:32} {dtype:9} {error:.1e}")
    print(f"matmuls: {len(selected) - len(failed)} of {len(selected)} right", *failed, sep="\n  ")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main(sys.argv[1:])
