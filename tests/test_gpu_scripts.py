"""The scripts for a machine with a GPU, as far as a machine without one can tell."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "gpu" / "run.sh"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(["bash", str(SCRIPT), *arguments], capture_output=True, text=True, env=hidden)


def test_without_a_gpu_the_checks_are_skipped_with_a_word():
    done = run()
    assert done.returncode == 0
    assert done.stdout == "tests/gpu/run.sh: no NVIDIA GPU here: skipped\n"


@pytest.mark.parametrize("arguments", [["--library"], ["--library", "/no/such.so"], ["--everything"]])
def test_bad_arguments_are_refused(arguments):
    done = run(*arguments)
    assert done.returncode == 2 and done.stderr.startswith("tests/gpu/run.sh: ")
