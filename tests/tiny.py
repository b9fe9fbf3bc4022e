"""Random small Qwen3.5 models, and artefacts of them made without the build command."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from math import prod
from pathlib import Path

import torch
import tvm
from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

from tvm_sparse.artefact.reader import header_hash
from tvm_sparse.artefact.safetensors_stream import SafetensorsStream
from tvm_sparse.artefact.versions import installed
from tvm_sparse.codegen.cpu import build_cpu_library
from tvm_sparse.layout import Layout, executed_config, make_layout
from tvm_sparse.library import describe, lower
from tvm_sparse.models.config import ModelConfig
from tvm_sparse.models.qwen3_5 import build_module
from tvm_sparse.passes.bundle_parameters import BundleParameters
from tvm_sparse.passes.fold_recurrent_layers import FoldRecurrentLayers
from tvm_sparse.plan import keep_dense, matrices


def random_model(seed: int = 0, rotary: float = 0.25, **sizes) -> Qwen3_5ForCausalLM:
    """transformers' own model; weights so large that a wrong norm, gate or position shows."""
    torch.manual_seed(seed)
    defaults = {
        "vocab_size": 512, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
        "linear_num_key_heads": 2, "linear_num_value_heads": 6, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
        "max_position_embeddings": 2048, "tie_word_embeddings": False, "full_attention_interval": 4, "eos_token_id": 1,
    }  # fmt: skip
    sizes = {**defaults, **sizes}
    pairs = int(sizes["head_dim"] * rotary) // 2
    rope = {
        "rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": rotary, "mrope_interleaved": True,
        "mrope_section": [pairs - 2 * (pairs // 3), pairs // 3, pairs // 3],
    }  # fmt: skip
    model = Qwen3_5ForCausalLM(Qwen3_5TextConfig(rope_parameters=rope, **sizes)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3 if parameter.ndim == 1 else 1.2 / sizes["hidden_size"] ** 0.5)
    return model


def weights_of(model: Qwen3_5ForCausalLM, layout: Layout, lowered: bool) -> dict[str, torch.Tensor]:
    """The parameters of the dense graph (each matrix by its checkpoint name) or, lowered, of the layout."""
    found = {name.removeprefix("model."): tensor.detach() for name, tensor in model.state_dict().items()}
    weights = {}
    for param in layout.params:
        parts = {source: found[source] for source in param.sources}
        if lowered:
            parts = {param.name: torch.cat(list(parts.values()))}
        for name, weight in parts.items():
            if param.dtype == "float32":
                weight = weight.float() + (param.transform == "one_plus")
            weights[name] = weight.squeeze(1) if param.transform == "squeeze" else weight
    return weights


def compile_graph(config: ModelConfig, layout: Layout, dtype: str, batch: int, library: Path) -> None:
    """The dense graph as it is, with TVM's own matmuls: quick to compile, and exact enough in float32."""
    module = build_module(executed_config(config, layout), dtype, batch)
    module = BundleParameters()(FoldRecurrentLayers(layout.stored_name)(module))
    target = tvm.target.Target("llvm")
    with target:
        tvm.compile(module, target=target).export_library(str(library))


def compile_lowered(config: ModelConfig, layout: Layout, dtype: str, batch: int, library: Path) -> None:
    """Through all passes, every matrix stored dense."""
    width = {"float32": 32, "bfloat16": 16}[dtype]
    plan = {p.name: keep_dense(p.name, p.shape, prod(p.shape), "", width) for p in matrices(layout)}
    module = lower(build_module(executed_config(config, layout), dtype, batch), layout, plan, "x86-64")
    build_cpu_library(BundleParameters()(module), library, isas=["x86-64"])


def write_dense_artefact(
    model: Qwen3_5ForCausalLM,
    folder: Path,
    dtype: str = "float32",
    batch: int = 1,
    context: int = 256,
    lowered: bool = False,
    schedule: Sequence[int] | None = None,
) -> Path:
    """The model, dense, as a folder that the engine opens; `lowered` sends it through the passes.

    `schedule` is the layout's: whose weights each executed layer uses.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = ModelConfig.from_json(model.config.to_dict())
    layout = make_layout(config, schedule)
    (compile_lowered if lowered else compile_graph)(config, layout, dtype, batch, folder / "lib.so")
    weights = weights_of(model, layout, lowered)
    vectors = {param.name for param in layout.params if param.dtype == "float32"}

    stream, params = SafetensorsStream(folder / "params-00001.safetensors"), {}
    for name, weight in weights.items():
        weight = weight if name in vectors else weight.to(getattr(torch, dtype))
        bits = weight.contiguous().view(torch.uint8).numpy() if weight.ndim else weight.numpy()
        spelled = str(weight.dtype).removeprefix("torch.")
        offset, size = stream.write(name, spelled, tuple(weight.shape), [memoryview(bits).cast("B")])
        buffer = {"dtype": spelled, "shape": list(weight.shape), "offset": offset, "bytes": size,
                      "sha256": hashlib.sha256(bits.tobytes()).hexdigest()}  # fmt: skip
        params[name] = {"file": stream.path.name, "buffers": {"": buffer}}
    stream.close()
    files = {stream.path.name: {"bytes": stream.path.stat().st_size, "header_sha256": header_hash(stream.path)}}
    (folder / "params.json").write_text(json.dumps({"params": params, "files": files}))

    facts = {
        "versions": installed(),
        "targets": ["cpu"],
        "weights": {"kind": "random"},
        "params": list(weights),
        "workspace": 0,
        **describe(config, layout, "cpu", dtype, batch, context),
        "prefill_chunk": 96,  # so small that short prompts come in several
        "score_chunk": 48,
    }
    (folder / "tvm_sparse.json").write_text(json.dumps(facts))
    return folder
