"""What several tests use: the CUDA toolkit, artefacts built once a run by the build command's own function."""

from __future__ import annotations

from pathlib import Path

import pytest

from tvm_sparse.codegen.cuda_toolkit import Toolkit, find_toolkit
from tvm_sparse.errors import Refusal

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture(scope="session")
def toolkit() -> Toolkit:
    """The CUDA toolkit; without one the test is skipped with a word."""
    try:
        return find_toolkit()
    except Refusal as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="session")
def shipped_float32(tmp_path_factory) -> Path:
    """examples/tiny-qwen3.5-sparse75 as it is, with float32 activations."""
    from tvm_sparse.build import build
    from tvm_sparse.config import parse_build

    out = tmp_path_factory.mktemp("shipped") / "float32"
    model = str(EXAMPLES / "tiny-qwen3.5-sparse75")
    build(
        parse_build(["--model", model, "--prune", "none", "--target", "cpu", "--dtype", "float32", "--out", str(out)])
    )
    return out
