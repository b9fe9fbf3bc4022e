"""`python -m tvm_sparse.bench kernels | model ...`"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from tvm_sparse.errors import Refusal, run_command

COMMANDS = {"kernels": "tvm_sparse.bench.kernels", "model": "tvm_sparse.bench.model"}


def main(argv: Sequence[str]) -> None:
    if not argv or argv[0] not in COMMANDS:
        raise Refusal(f"say what to measure: python -m tvm_sparse.bench {' | '.join(COMMANDS)} --help")
    import_module(COMMANDS[argv[0]]).main(argv[1:])


if __name__ == "__main__":
    sys.exit(run_command(main))
