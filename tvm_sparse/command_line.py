"""An argument parser whose errors are one line and exit status 2, as every command here promises."""

from __future__ import annotations

import argparse
from typing import NoReturn

from tvm_sparse import __version__
from tvm_sparse.errors import Refusal


class CommandParser(argparse.ArgumentParser):
    """argparse, with `Refusal` in the place of usage text and sys.exit."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(
            prog=f"python -m tvm_sparse.{prog}",
            description=description,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
            allow_abbrev=False,
        )
        self.add_argument("--version", action="version", version=f"tvm_sparse {__version__}")

    def error(self, message: str) -> NoReturn:
        raise Refusal(f"{message} (see {self.prog} --help)")
