"""The artefact's files: valid safetensors, aligned, resumed after every kind of interruption, checked when opened."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from tvm_sparse.artefact.reader import open_artefact
from tvm_sparse.artefact.safetensors_stream import HEADER, SafetensorsStream
from tvm_sparse.artefact.versions import installed
from tvm_sparse.artefact.writer import ParamsWriter, write_json
from tvm_sparse.errors import Refusal, Stopped

TENSORS = {
    f"p{i}": torch.arange(i + 3, dtype=torch.float32).to(dtype)
    for i, dtype in enumerate([torch.bfloat16, torch.float32, torch.int32, torch.uint16, torch.uint32] * 2)
}


def add(writer: ParamsWriter, name: str) -> None:
    tensor = TENSORS[name]
    spec = ("", str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), [tensor[:2], tensor[2:]])
    writer.write(name, {"format": "dense"}, [spec], tensor.nbytes)


def build(folder: Path, fingerprint: str = "a", limit: int = HEADER + 300) -> list[str]:
    """Writes all tensors; the names that were written rather than taken over."""
    written = []
    with ParamsWriter(folder, fingerprint, file_limit=limit) as writer:
        for name in TENSORS:
            if name not in writer.done:
                add(writer, name)
                written.append(name)
        writer.finish(list(TENSORS))
    write_json(folder / "tvm_sparse.json", {"versions": installed(), "device": "cpu", "params": list(TENSORS)})
    return written


def check(folder: Path) -> None:
    artefact = open_artefact(folder, "cpu", verify=True)
    for name, tensor in TENSORS.items():
        array = artefact.array(name)
        assert array.ctypes.data % 64 == 0 and not array.flags.writeable
        expected = tensor.view(torch.int16).numpy().view(np.uint16) if tensor.itemsize == 2 else tensor.numpy()
        assert np.array_equal(array, expected)
        with safe_open(folder / artefact.buffers[name].file, "pt") as file:
            assert torch.equal(file.get_tensor(name), tensor)
    assert {path.name for path in folder.iterdir()} == {"params.json", "tvm_sparse.json", *artefact.files}


def test_files_are_valid_safetensors(tmp_path):
    assert build(tmp_path) == list(TENSORS)
    check(tmp_path)
    assert len(open_artefact(tmp_path).files) > 1  # several files, for the limit


def test_the_same_command_again_writes_nothing(tmp_path):
    build(tmp_path)
    assert build(tmp_path) == []
    check(tmp_path)


def test_another_configuration_starts_anew(tmp_path):
    build(tmp_path)
    assert build(tmp_path, "b", limit=10**9) == list(TENSORS)
    check(tmp_path)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, Refusal("bad weights")])
def test_interruption_keeps_what_is_finished(tmp_path, stop):
    with pytest.raises(type(stop) if isinstance(stop, Exception) else stop), ParamsWriter(tmp_path, "a") as writer:
        add(writer, "p0")
        add(writer, "p1")

        def pieces():
            yield torch.zeros(100)
            raise stop

        writer.write("p2", {}, [("", "float32", (200,), pieces())], 800)
    assert not list(tmp_path.glob("*.partial")) and not (tmp_path / "params.json").exists()
    assert build(tmp_path) == list(TENSORS)[2:]
    check(tmp_path)


@pytest.mark.parametrize("when", ["in a file", "between files", "in the journal"])
def test_a_kill_keeps_what_is_finished(tmp_path, when):
    writer = ParamsWriter(tmp_path, "a").__enter__()
    for name in list(TENSORS)[:4]:
        add(writer, name)
    if when == "between files":
        writer._note = lambda line: None
        writer._close_file()
    if when == "in the journal":
        with (tmp_path / "params.journal").open("a") as journal:
            journal.write('{"param": "p4", "fac')
    if when == "in a file":
        writer._stream._append(memoryview(bytes(1000)))
    assert build(tmp_path) == list(TENSORS)[4:]
    check(tmp_path)


def test_damage_to_an_unfinished_file_is_noticed(tmp_path):
    writer = ParamsWriter(tmp_path, "a").__enter__()
    for name in list(TENSORS)[:4]:
        add(writer, name)
    with (tmp_path / "params-00001.safetensors.partial").open("r+b") as file:
        file.seek(writer.done["p2"]["buffers"][""]["offset"])
        file.write(b"?")
    assert build(tmp_path) == list(TENSORS)[2:]
    check(tmp_path)


def test_full_disk(tmp_path, monkeypatch):
    real = SafetensorsStream._append

    def full(self, piece):
        if self._file.tell() + piece.nbytes > HEADER + 300:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(self, piece)

    monkeypatch.setattr(SafetensorsStream, "_append", full)
    said = pytest.raises(Stopped, match=r"full: .* GB in \d parameters are finished and kept, about .* GB more")
    with said, ParamsWriter(tmp_path, "a", expected=10**18) as writer:
        for name in TENSORS:
            add(writer, name)
    monkeypatch.setattr(SafetensorsStream, "_append", real)
    assert not list(tmp_path.glob("*.partial"))
    assert 0 < len(build(tmp_path)) < len(TENSORS)
    check(tmp_path)


def edit(folder: Path, **facts) -> None:
    path = folder / "tvm_sparse.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))


def damage(folder: Path, how: str) -> None:
    file = sorted(folder.glob("params-*.safetensors"))[0]
    data = bytearray(file.read_bytes())
    if how == "cut":
        file.write_bytes(data[:-1])
    elif how == "header":
        data[20] ^= 1
        file.write_bytes(data)
    elif how == "content":
        data[HEADER] ^= 1
        file.write_bytes(data)
    elif how == "gone":
        file.unlink()
    elif how == "no weights":
        (folder / "params.json").unlink()
    elif how == "no artefact":
        (folder / "tvm_sparse.json").unlink()
    elif how == "version":
        edit(folder, versions=installed() | {"artefact": 99})
    elif how == "tvm":
        edit(folder, versions=installed() | {"tvm": "0.1"})
    elif how == "missing":
        edit(folder, params=["p0", "q"])
    elif how == "target":
        edit(folder, device="cuda")


@pytest.mark.parametrize(
    "how, message",
    [
        ("cut", "has .* bytes, not"),
        ("header", "another header"),
        ("content", "p0 is damaged"),
        ("gone", "is missing: build or copy"),
        ("no weights", "has no weights"),
        ("no artefact", "is not an artefact"),
        ("version", "artefact version 99"),
        ("tvm", "compiled by TVM 0.1"),
        ("missing", "does not hold q"),
        ("target", "was built for cuda, not for cpu"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(tmp_path, how, message):
    build(tmp_path)
    damage(tmp_path, how)
    with pytest.raises(Refusal, match=message) as refusal:
        open_artefact(tmp_path, "cpu:0", verify=True)
    assert "\n" not in str(refusal.value)


def test_the_reader_needs_no_torch():
    code = "import sys; sys.modules['torch'] = None; sys.modules['tvm'] = None; import tvm_sparse.artefact.reader"
    subprocess.run([sys.executable, "-c", code], check=True)
