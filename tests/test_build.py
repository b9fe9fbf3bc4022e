"""`python -m tvm_sparse.build` as a user runs it: from a checkpoint to tokens, and what it says to bad input."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tvm_sparse.build import build
from tvm_sparse.codegen.cuda_images import images
from tvm_sparse.config import parse_build
from tvm_sparse.engine import Engine
from tvm_sparse.errors import Refusal, run_command
from tvm_sparse.evaluate import evaluate
from tvm_sparse.evaluate import main as judge
from tvm_sparse.layout import RuntimeParam, make_layout
from tvm_sparse.models.config import REGISTERED
from tvm_sparse.prune import main as prune

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
SPARSE = EXAMPLES / "tiny-qwen3.5-sparse75"
IDS = [5, 17, 42, 1021, 7]


def run(*argv: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "tvm_sparse.build", *argv], capture_output=True, text=True, env=env)


@pytest.fixture(scope="module")
def artefact(tmp_path_factory):
    """The shipped sparse model, built by the command itself for this CPU."""
    out = tmp_path_factory.mktemp("build") / "sparse75"
    done = run("--model", str(SPARSE), "--prune", "none", "--target", "cpu", "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(out)
    return out


@pytest.mark.slow
def test_artefact_holds_what_the_design_names(artefact):
    names = {path.name for path in artefact.iterdir()}
    assert {"lib.so", "params-00001.safetensors", "params.json", "tvm_sparse.json", "report.json", "report.md",
            "tokenizer.json", "generation_config.json"} <= names  # fmt: skip
    assert not [name for name in names if "partial" in name or "journal" in name]
    report = json.loads((artefact / "report.json").read_text())
    projections = [row for row in report["matrices"] if "proj" in row["param"]]
    assert all(row["density"] == pytest.approx(0.25, abs=2e-3) for row in projections)
    assert all(row["format"] != "dense" and row["kernel"] and row["schedule"] for row in projections)


@pytest.mark.slow
def test_perplexity_is_that_of_transformers(artefact):
    text = (EXAMPLES / "heldout.txt").read_text()
    ours = evaluate(artefact, text, window=200, max_tokens=1500)
    theirs = evaluate(SPARSE, text, window=200, max_tokens=1500)
    assert ours.tokens == theirs.tokens
    assert ours.perplexity == pytest.approx(theirs.perplexity, rel=1e-3)


@pytest.mark.slow
def test_the_command_compares_distributions(artefact, capsys):
    words = ["--text", str(EXAMPLES / "heldout.txt"), "--window", "100", "--max-tokens", "300", "--format", "json"]
    judge([str(artefact), "--against", str(SPARSE), *words])
    close = json.loads(capsys.readouterr().out)
    assert 0 <= close["comparison"]["divergence"] < 2e-3 and close["comparison"]["same_top"] > 0.96
    judge([str(artefact), "--against", str(EXAMPLES / "tiny-qwen3.5"), *words])
    apart = json.loads(capsys.readouterr().out)
    assert apart["comparison"]["divergence"] > 0.1 and apart["comparison"]["same_top"] < 0.9
    assert apart["protocol"] == close["protocol"] and close["protocol"]["window"] == 100


@pytest.mark.slow
def test_prefill_decode_and_score_agree_and_repeat(artefact):
    engine = Engine(artefact, verify=True)
    whole = engine.prefill(IDS)
    engine.reset()
    for token in IDS:
        stepped = engine.decode(token)
    np.testing.assert_allclose(stepped, whole, atol=0.03 * np.abs(whole).max())
    engine.reset()
    assert (engine.prefill(IDS) == whole).all()
    engine.reset()
    scores = engine.score(IDS)
    engine.reset()
    logits = engine.prefill(IDS[:-1]).astype(np.float64)
    assert scores[-1] == pytest.approx(logits[IDS[-1]] - np.log(np.exp(logits).sum()), abs=0.05)


@pytest.mark.slow
def test_the_number_of_threads_changes_no_bit(artefact):
    program = (
        "import hashlib, sys; from tvm_sparse.engine import Engine; engine = Engine(sys.argv[1]); "
        "print(hashlib.sha256(engine.prefill(range(5, 75)).tobytes() + engine.decode(3).tobytes()).hexdigest())"
    )
    hashes = {
        subprocess.run([sys.executable, "-c", program, artefact], capture_output=True, text=True, check=True,
                       env={**os.environ, "TVM_NUM_THREADS": threads}).stdout
        for threads in ("1", "2", "3")
    }  # fmt: skip
    assert len(hashes) == 1


@pytest.mark.slow
def test_examples_write_what_the_engine_writes(artefact, tmp_path):
    engine = Engine(artefact)
    expected = [str(token) for token in engine.generate(IDS, max_new_tokens=8)]
    words = [str(artefact), "8", *map(str, IDS)]
    python = subprocess.run([sys.executable, EXAMPLES / "generate.py", *words], capture_output=True, text=True)
    assert python.stdout.split() == expected, python.stderr
    compiled = subprocess.run([_compile_example(tmp_path), *words], capture_output=True, text=True)
    assert compiled.stdout.split() == expected, compiled.stderr


def _compile_example(folder: Path) -> Path:
    ffi, tvm = (Path(find_spec(name).submodule_search_locations[0]) for name in ("tvm_ffi", "tvm"))
    made = folder / "generate"
    subprocess.run(
        ["c++", "-std=c++17", f"-I{ffi}/include", EXAMPLES / "generate.cc", "-o", made, f"-L{ffi}/lib", f"-L{tvm}/lib",
         "-Wl,--no-as-needed", "-ltvm_runtime", "-ltvm_ffi", f"-Wl,-rpath,{ffi}/lib:{tvm}/lib"],
        check=True,
    )  # fmt: skip
    return made


@pytest.mark.slow
def test_the_same_build_again_does_no_work_twice(artefact):
    made = (artefact / "lib.so").stat().st_mtime_ns
    build(parse_build(["--model", str(SPARSE), "--prune", "none", "--target", "cpu", "--out", str(artefact)]))
    assert (artefact / "lib.so").stat().st_mtime_ns == made
    Engine(artefact, verify=True)


@pytest.mark.slow
def test_without_weights_the_gpu_library_is_built_and_kept(toolkit, tmp_path):
    """The owner's command on a machine without GPU and network, for the smallest of the registered models."""
    out = tmp_path / "out"
    offline = {**os.environ, "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    done = run("--model", "qwen3.5-0.8b", "--sparsity", "0.75", "--target", "b200,h200", "--out", str(out), env=offline)
    assert done.returncode == 3
    assert "--weights FOLDER" in done.stderr and "--weights synthetic" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    found = images(out / "lib.so")
    assert sorted(found) == ["sm_100a", "sm_90a"]  # machine code, and no PTX
    kernels = set(json.loads((out / "library.json").read_text())["schedules"])
    assert any("delta" in kernel for kernel in kernels)
    for arch in found:
        assert {kernel for kernel in kernels if not any(name.startswith(kernel) for name in found[arch])} == set()
        assert len(found[arch]) > len(kernels)  # the operations between the projections, too
    with pytest.raises(Refusal, match="no weights"):
        Engine(out, device="cuda:0")


REFUSED = {
    "unknown model": (["--model", "qwen9", "--sparsity", "0.5"], "qwen3.5-27b"),
    "no sparsity": (["--model", "qwen3.5-27b"], "--sparsity is missing"),
    "sparsity of one": (["--model", "qwen3.5-27b", "--sparsity", "1"], "outside [0, 1)"),
    "negative sparsity": (["--model", "qwen3.5-27b", "--sparsity", "-0.1"], "outside [0, 1)"),
    "a word for sparsity": (["--model", "qwen3.5-27b", "--sparsity", "much"], "invalid float value"),
    "sparsity against pattern": (["--model", "qwen3.5-27b", "--sparsity", "0.75", "--pattern", "2:4"], "0.5"),
    "unknown pattern": (["--model", "qwen3.5-27b", "--sparsity", "0.5", "--pattern", "diagonal"], "block:RxC"),
    "pattern beside K": (["--model", str(SPARSE), "--sparsity", "0.8571", "--pattern", "1:7"], "does not divide"),
    "unknown target": (["--model", "qwen3.5-27b", "--sparsity", "0.5", "--target", "tpu"], "b200"),
    "mixed targets": (["--model", "qwen3.5-27b", "--sparsity", "0.5", "--target", "cpu,b200"], "mixes"),
    "context too long": (["--model", str(SPARSE), "--sparsity", "0.5", "--context", "9999"], "2048"),
    "batch of none": (["--model", "qwen3.5-27b", "--sparsity", "0.5", "--batch", "0"], "at least 1"),
    "bad expression": (["--model", "qwen3.5-27b", "--sparsity", "0.5", "--include", "("], "regular expression"),
    "unknown flag": (["--model", "qwen3.5-27b", "--sparsity", "0.5", "--speed", "11"], "--speed"),
    "no such folder": (["--model", str(SPARSE), "--sparsity", "0.5", "--weights", "/nowhere"], "/nowhere"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_arguments_are_refused_in_one_line(case, tmp_path, capsys):
    argv, says = REFUSED[case]
    out = tmp_path / "out"
    status = run_command(lambda words: build(parse_build(words)), ["--target", "cpu", *argv, "--out", str(out)])
    message = capsys.readouterr().err
    assert status == 2 and not out.exists()
    assert says in message and message.count("\n") == 1


def broken_checkpoint(folder: Path, damage: str) -> Path:
    shutil.copytree(SPARSE, folder)
    shard = folder / "model.safetensors"
    tensors = load_file(shard)
    name = "model.layers.0.mlp.up_proj.weight"
    if damage == "truncated":
        shard.write_bytes(shard.read_bytes()[:-1000])
    elif damage == "missing shard":
        shard.unlink()
    elif damage == "wrong shape":
        save_file(tensors | {name: tensors[name][:-1].clone()}, shard)
    elif damage == "missing tensor":
        save_file({key: value for key, value in tensors.items() if key != name}, shard)
    else:
        tensors[name][3, 5] = torch.nan
        save_file(tensors, shard)
    return folder


@pytest.mark.parametrize("damage", ["truncated", "missing shard", "wrong shape", "missing tensor", "nan"])
def test_bad_checkpoints_are_refused_and_leave_nothing(damage, tmp_path):
    folder, out = broken_checkpoint(tmp_path / "checkpoint", damage), tmp_path / "out"
    words = ["--model", str(folder), "--prune", "none", "--target", "cpu", "--out", str(out)]
    with pytest.raises(Refusal) as refused:
        build(parse_build(words))
    assert "\n" not in str(refused.value) and not out.exists()
    if damage in ("wrong shape", "missing tensor", "nan"):
        assert "layers.0.mlp.up_proj.weight" in str(refused.value)


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_build_keeps_what_is_done_and_goes_on(ending, tmp_path):
    """Packing is stopped in the middle; the same command, run again, packs the rest and no more."""
    out = tmp_path / "out"
    words = ["--model", "qwen3.5-0.8b", "--sparsity", "0.5", "--weights", "synthetic", "--target", "cpu"]
    command = [sys.executable, "-m", "tvm_sparse.build", *words, "--out", str(out)]
    heard = partial(signal.signal, ending, signal.SIG_DFL)  # whoever runs the tests may ignore the signal
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heard)
    journal = out / "params.journal"
    while process.poll() is None and not (journal.exists() and len(journal.read_text().splitlines()) > 8):
        time.sleep(0.05)
    process.send_signal(ending)
    _, message = process.communicate()
    assert process.returncode == 3 and "run the same command again" in message
    kept = journal.read_text().splitlines()
    assert not list(out.glob("*.partial")) and not (out / "tvm_sparse.json").exists()

    left: list[RuntimeParam] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tvm_sparse.packing._values", lambda missing, _: left.extend(missing) or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            build(parse_build([*words, "--out", str(out)]))
    taken_over = len(make_layout(REGISTERED["qwen3.5-0.8b"]).params) - len(left)
    assert taken_over >= len(kept) - 2  # a line of the journal is the fingerprint, one the finished file


def test_a_folder_with_other_things_is_not_written_to(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(Refusal, match="other things"):
        build(parse_build(["--model", str(SPARSE), "--sparsity", "0.5", "--target", "cpu", "--out", str(tmp_path)]))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


PATTERNS = {
    "2:4": ["--sparsity", "0.5", "--pattern", "2:4"],
    "block": ["--sparsity", "0.6", "--pattern", "block:8x16"],
    "bitmap": ["--sparsity", "0.6", "--granularity", "row", "--exclude", "o_proj"],
}


@pytest.mark.slow
@pytest.mark.parametrize("fmt", PATTERNS)
def test_a_sparse_build_is_the_dense_model_with_the_same_zeros(fmt, tmp_path):
    """`build` prunes as `prune` does, and what it compiles gives the logits of transformers on the pruned weights."""
    dense = str(EXAMPLES / "tiny-qwen3.5")
    assert prune(["--model", dense, "--prune", "magnitude", *PATTERNS[fmt], "--out", str(tmp_path / "pruned")]) is None
    words = ["--model", dense, *PATTERNS[fmt], "--target", "cpu", "--dtype", "float32", "--out", str(tmp_path / "out")]
    build(parse_build(words))
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert sum(row["format"].startswith(fmt) for row in report["matrices"]) >= 24  # of 32 projections, fused
    ids = torch.randint(0, 2000, (90,), generator=torch.Generator().manual_seed(1)).tolist()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", dtype=torch.float32)
    with torch.inference_mode():
        expected = model(torch.tensor([ids]), use_cache=False).logits[0].numpy()
    engine = Engine(tmp_path / "out")
    tolerance = 1e-4 * np.abs(expected).max()
    assert np.abs(engine.prefill(ids[:-1]) - expected[-2]).max() < tolerance
    assert np.abs(engine.decode(ids[-1]) - expected[-1]).max() < tolerance
