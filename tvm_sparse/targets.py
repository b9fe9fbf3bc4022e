"""The machines a library can be built for: one table, names as the command line spells them."""

from __future__ import annotations

from dataclasses import dataclass

from tvm_sparse.errors import Refusal


@dataclass(frozen=True)
class Machine:
    """What the compiler, the plan and the report need to know of a machine.

    `arch` keys the kernel table ("x86-64" or an nvcc arch), `bandwidth` is bytes a second of memory, `l2` bytes of
    last-level cache, `cores` streaming multiprocessors (0: ask the machine that runs it). Where it has no tuning record
    of its own, `lender` has one, or nobody.
    """

    name: str
    arch: str
    cores: int
    bandwidth: float
    l2: int
    lender: str = ""

    @property
    def logs(self) -> str:
        """Its folder in tuning_logs/: only what ran on this machine stands there."""
        return f"nvidia-{self.name}" if self.is_gpu else self.name

    @property
    def is_gpu(self) -> bool:
        return self.arch.startswith("sm_")

    @property
    def device(self) -> str:
        """The runtime's device type: "cuda" or "cpu"."""
        return "cuda" if self.is_gpu else "cpu"


MACHINES = {
    machine.name: machine
    for machine in (
        Machine("b200", "sm_100a", cores=148, bandwidth=8.0e12, l2=126 << 20, lender="h200"),
        Machine("h200", "sm_90a", cores=132, bandwidth=4.8e12, l2=60 << 20),
        Machine("h100", "sm_90a", cores=132, bandwidth=3.35e12, l2=50 << 20, lender="h200"),
        Machine("cpu", "x86-64", cores=0, bandwidth=5.0e10, l2=32 << 20),
    )
}


def parse_targets(text: str) -> tuple[Machine, ...]:
    """Reads `--target`: a comma list of names, or `auto`. GPUs share one library; the CPU is built alone.

    Raises Refusal for an unknown name and for a list that mixes CPU and GPU.
    """
    names = [name.strip().lower() for name in text.split(",") if name.strip()]
    if names == ["auto"]:
        names = [_detect()]
    unknown = [name for name in names if name not in MACHINES]
    if unknown or not names:
        known = ", ".join([*MACHINES, "auto"])
        raise Refusal(f"unknown target {', '.join(unknown) or repr(text)}: choose from {known}")
    machines = tuple(MACHINES[name] for name in dict.fromkeys(names))
    if len({machine.device for machine in machines}) > 1:
        raise Refusal(f"target {text} mixes CPU and GPU: build one folder for each")
    return machines


def _detect() -> str:
    import shutil
    import subprocess

    if shutil.which("nvidia-smi"):
        asked = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        listing = subprocess.run(asked, capture_output=True, text=True).stdout.upper()
        for name in ("b200", "h200", "h100"):
            if name.upper() in listing:
                return name
        if listing.strip():
            raise Refusal(
                f"target auto: no kernels for {listing.splitlines()[0].strip()}; name one of {', '.join(MACHINES)}"
            )
    return "cpu"
