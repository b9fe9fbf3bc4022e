"""Artefacts that several tests use, built once a run by the build command's own function."""

from __future__ import annotations

from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


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
