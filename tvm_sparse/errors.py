"""The exit statuses of every command, and the exceptions that carry them.

0 done; 2 refused before any work, nothing written; 3 stopped with finished work kept and resumable; 1 a bug.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Sequence


class Refusal(Exception):
    """Bad input, found before any work: one line that names the thing and the way on. Exit status 2."""

    status = 2


class Stopped(Exception):
    """Work ended early and what was finished is kept: the message says how to go on. Exit status 3."""

    status = 3


def run_command(main: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None) -> int:
    """Runs one command line and turns its end into an exit status; a bug keeps its traceback.

    SIGTERM ends it as Ctrl-C does: finished work is kept, temporary files go.
    """
    try:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        main(sys.argv[1:] if argv is None else argv)
    except (Refusal, Stopped) as end:
        print(f"tvm_sparse: {end}", file=sys.stderr)
        return end.status
    except KeyboardInterrupt:
        print("tvm_sparse: interrupted; run the same command again to go on", file=sys.stderr)
        return Stopped.status
    return 0
