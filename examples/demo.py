"""What the project does, on this very machine, in under five minutes: the commands are printed as they run.

1. build a small real model with 75 % zeros, and its dense sibling, for this CPU;
2. let both write from the same prompt, and judge both on text neither has seen;
3. time one projection of the 27B, sparse against the fastest dense there is here.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUT = Path("dist")
PROMPT = "And it came to pass in those days, that"


def run(title: str, *arguments: str) -> None:
    """Runs one `python -m tvm_sparse...` command, shown as a user would type it; ends the demo where it fails."""
    print(f"\n# {title}\n$ python -m {shlex.join(arguments)}", flush=True)
    status = subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT).returncode
    if status:
        sys.exit(status)


def main() -> None:
    start = time.perf_counter()
    sparse, dense = str(OUT / "demo-sparse75"), str(OUT / "demo-dense")
    cpu = ("--target", "cpu", "--context", "1024")
    run("three weights of four are zero in this checkpoint; --prune none keeps its own zeros",
        "tvm_sparse.build", "--model", "examples/tiny-qwen3.5-sparse75", "--prune", "none", *cpu,
        "--out", sparse)  # fmt: skip
    run("its dense sibling",
        "tvm_sparse.build", "--model", "examples/tiny-qwen3.5", "--sparsity", "0", *cpu, "--out", dense)  # fmt: skip
    for name in (sparse, dense):
        run(f"{name} writes", "tvm_sparse.generate", name, "--prompt", PROMPT, "--max-new-tokens", "60",
            "--temperature", "0.7", "--seed", "1")  # fmt: skip
    run("both on text that neither has seen", "tvm_sparse.evaluate", sparse, "--against", dense,
        "--text", "examples/heldout.txt", "--window", "256", "--max-tokens", "8192")  # fmt: skip
    run("one projection of the 27B at 75 %, against the faster of torch's bf16 and float32 on this machine",
        "tvm_sparse.bench", "kernels", "--target", "cpu", "--shapes", "5120x17408", "--sparsity", "0.75",
        "--batch", "1")  # fmt: skip
    print(f"\ndone in {time.perf_counter() - start:.0f} s; the two artefacts are in {OUT}/")


if __name__ == "__main__":
    main()
