"""`python -m tvm_sparse.bench kernels ...`"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from tvm_sparse.bench import kernels
from tvm_sparse.errors import Refusal, run_command

COMMANDS = {"kernels": kernels.main}


def main(argv: Sequence[str]) -> None:
    if not argv or argv[0] not in COMMANDS:
        raise Refusal(f"say what to measure: python -m tvm_sparse.bench {' | '.join(COMMANDS)} --help")
    COMMANDS[argv[0]](argv[1:])


if __name__ == "__main__":
    sys.exit(run_command(main))
