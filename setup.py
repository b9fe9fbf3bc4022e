"""Packaging. `passes/` and `schedules/` stand at the top level and are imported as tvm_sparse.passes and
tvm_sparse.schedules: the mapping below serves an installation, two relative symlinks in tvm_sparse/ serve the tree
itself. Either alone fails in one of: uninstalled, editable, wheel, a second worktree."""

import re
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "tvm_sparse" / "__init__.py").read_text())[1]

# Wrong versions of these two crash (tvm-ffi 0.1.15 segfaults in save_json, which every tuning run calls): exact pins.
TVM = ["apache-tvm==0.27.0.post1", "apache-tvm-ffi==0.1.14.post1"]
RUNTIME = [*TVM, "numpy>=1.26", "safetensors>=0.4.5", "tokenizers>=0.20", "jinja2>=3.1"]
BUILD = ["torch>=2.11,<2.14", "transformers>=5.17", "huggingface_hub>=1.0", "tqdm>=4.66", "onnx>=1.17"]
TUNE = ["xgboost-cpu>=3.0", "cloudpickle>=3", "psutil>=5.9", "tornado>=6.4"]
DEV = ["pytest>=8", "hypothesis>=6.100", "ruff>=0.8", "mypy>=1.13", "pytest-xdist>=3.6"]
CUDA = ["nvidia-cuda-nvcc>=13,<14", "nvidia-cuda-runtime>=13,<14", "nvidia-cuda-cccl>=13,<14", "nvidia-nvvm>=13,<14",
        "nvidia-cuda-crt>=13,<14"]  # fmt: skip

# No package, but where the records of an installation stand: schedules/records.py looks beside schedules/.
TUNING_LOGS = "tvm_sparse.tuning_logs"

setup(
    name="tvm_sparse",
    version=VERSION,
    description="A compiler for weight-sparse Qwen3.5 models, on TVM",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[
        "tvm_sparse",
        "tvm_sparse.artefact",
        "tvm_sparse.bench",
        "tvm_sparse.checkpoint",
        "tvm_sparse.codegen",
        "tvm_sparse.engine",
        "tvm_sparse.folding",
        "tvm_sparse.formats",
        "tvm_sparse.measure",
        "tvm_sparse.models",
        "tvm_sparse.passes",
        "tvm_sparse.pruning",
        "tvm_sparse.schedules",
        "tvm_sparse.schedules.cpu",
        "tvm_sparse.schedules.cuda",
        "tvm_sparse.tune",
        TUNING_LOGS,
    ],
    package_dir={"tvm_sparse.passes": "passes", "tvm_sparse.schedules": "schedules", TUNING_LOGS: "tuning_logs"},
    package_data={"tvm_sparse.codegen": ["*.c"], TUNING_LOGS: ["*/database_*.json"]},
    install_requires=RUNTIME,
    extras_require={"build": BUILD, "tune": TUNE, "cuda": CUDA, "dev": [*BUILD, *TUNE, *DEV]},
)
