"""What one matmul kernel is, before anything is chosen about how it runs."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

from tvm_sparse.formats.base import FormatChoice

CPU_ISAS = ("avx512", "avx2", "x86-64")
"""The CPU code paths of one library, best first; "x86-64" runs everywhere and is what a spec names by default."""

KERNEL_DTYPES = {"bfloat16": "bf16", "float32": "f32"}
"""What x and y may be, and how kernels' names spell it."""


@dataclass(frozen=True)
class KernelSpec:
    """y[m, n] = x[m, k] @ W[n, k]^T with W packed: one kernel per spec, shared by every matrix it fits.

    `m` is None where the number of tokens is a symbolic dimension. `arch` is "x86-64" (or another of CPU_ISAS once
    a library's code paths are told apart), "sm_90a" or "sm_100a".

    What else the kernel does, for one token (`table.fuses`). With `norm_eps`, x is not normed yet: it takes the norm's
    weight float32 [k] after x, and norms as schedules/ops.py's rms_norm, without rounding in between. `after` is
    what happens to each result, rounded to out_dtype, before it is stored: "add", a residual [m, n] of out_dtype that
    stands before y is added; "silu_mul", W is a gate over an up projection, y [m, n / 2] = silu(gate) * up.
    """

    choice: FormatChoice
    n: int
    k: int
    m: int | None
    x_dtype: str
    out_dtype: str
    arch: str
    norm_eps: float = 0.0
    after: str = ""

    @property
    def device(self) -> str:
        return "cuda" if self.arch.startswith("sm_") else "cpu"

    @property
    def name(self) -> str:
        """A symbol name that tells kernels of one library apart (the arch is not part of it)."""
        options = "".join(f"_{key}{value}" for key, value in self.choice.options)
        tokens = "n" if self.m is None else str(self.m)
        types = f"{KERNEL_DTYPES[self.x_dtype]}_{KERNEL_DTYPES[self.out_dtype]}"
        fused = ("_norm" if self.norm_eps else "") + (f"_{self.after}" if self.after else "")
        return f"matmul_{self.choice.name.replace(':', 'to')}{options}_{self.n}x{self.k}_m{tokens}_{types}{fused}"

    @property
    def out_features(self) -> int:
        return self.n // 2 if self.after == "silu_mul" else self.n

    @property
    def alone(self) -> KernelSpec:
        """The product without anything else."""
        return replace(self, norm_eps=0.0, after="")

    def to_json(self) -> str:
        facts = {**vars(self), "choice": [self.choice.name, [list(o) for o in self.choice.options]]}
        for fused in ("norm_eps", "after"):  # left out as records have it that are older
            if not facts[fused]:
                del facts[fused]
        return json.dumps(facts, sort_keys=True)

    @staticmethod
    def from_json(text: str) -> KernelSpec:
        facts = json.loads(str(text))
        name, options = facts.pop("choice")
        return KernelSpec(FormatChoice(name, tuple((key, value) for key, value in options)), **facts)
