"""The package list is the tree, and imports point one way."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "tvm_sparse"

# Each line may import from the lines above it (and from itself).
ORDER = (
    ("tvm_sparse.errors", "tvm_sparse.command_line", "tvm_sparse.targets", "tvm_sparse.progress"),
    ("tvm_sparse.threads", "tvm_sparse.pipeline"),
    ("tvm_sparse.artefact.reader", "tvm_sparse.artefact.versions"),
    ("tvm_sparse.engine", "tvm_sparse.generate", "tvm_sparse.judges"),
    ("tvm_sparse.models.config",),
    ("tvm_sparse.layout", "tvm_sparse.checkpoint", "tvm_sparse.folding.ranges", "tvm_sparse.folding.request"),
    ("tvm_sparse.pruning",),
    ("tvm_sparse.config",),
    ("tvm_sparse.formats",),
    ("tvm_sparse.plan",),
    ("tvm_sparse.artefact",),
    ("tvm_sparse.packing", "tvm_sparse.measure"),
    ("tvm_sparse.folding",),
    ("tvm_sparse.schedules",),
    ("tvm_sparse.passes",),
    ("tvm_sparse.models",),
    ("tvm_sparse.codegen",),
    ("tvm_sparse.library", "tvm_sparse.report"),
    ("tvm_sparse.build", "tvm_sparse.evaluate", "tvm_sparse.prune"),
    ("tvm_sparse.bench",),
    ("tvm_sparse.tune",),
)


def modules():
    for path in _walk(PACKAGE):
        parts = path.relative_to(ROOT).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def _walk(folder):
    """Path.rglob follows symlinks only from Python 3.13 on."""
    for entry in sorted(folder.iterdir()):
        if entry.is_dir() and entry.name != "__pycache__":
            yield from _walk(entry)
        elif entry.suffix == ".py":
            yield entry


def rank(module):
    """The line of ORDER whose longest entry names the module; None for the root package."""
    found = [
        (len(name), line)
        for line, names in enumerate(ORDER)
        for name in names
        if module == name or module.startswith(name + ".")
    ]
    return max(found)[1] if found else None


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert not node.level, f"{path}: relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if _is_module(whole) else node.module


def _is_module(name):
    path = ROOT.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").exists()


def test_packages_are_the_tree():
    listed = set(re.findall(r'^        "(tvm_sparse[\w.]*)",$', (ROOT / "setup.py").read_text(), re.M))
    assert listed == {name for name, path in modules() if path.name == "__init__.py"}


def test_symlinks_are_relative():
    for name in ("passes", "schedules"):
        assert (PACKAGE / name).is_symlink() and (PACKAGE / name).readlink() == Path("..") / name


def test_every_module_has_a_place():
    assert [name for name, _ in modules() if rank(name) is None and name != "tvm_sparse"] == []


def test_imports_point_one_way():
    backwards = [
        f"{name} imports {other}"
        for name, path in modules()
        if name != "tvm_sparse"
        for other in imported(path)
        if other.startswith("tvm_sparse.") and (rank(other) if rank(other) is not None else -1) > rank(name)
    ]
    assert backwards == []


def test_files_are_small():
    """A file past 400 lines holds more than its name says."""
    assert [str(path) for _, path in modules() if len(path.read_text().splitlines()) > 400] == []
