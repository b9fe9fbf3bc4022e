"""What must agree between the build that wrote an artefact and the runtime that loads it."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import tvm_sparse

# Moves with every change of a packed buffer, of the library's calling convention or of tvm_sparse.json.
ARTEFACT = 2


def installed() -> dict[str, str | int | None]:
    """Versions here; None for TVM where its package is not installed (a bare runtime cannot be asked)."""
    return {"artefact": ARTEFACT, "tvm_sparse": tvm_sparse.__version__, "tvm": _version("apache-tvm")}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
