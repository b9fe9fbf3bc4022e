"""A model's parameters on their way into an artefact: pruned, stacked, each in the format the plan chose."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch

from tvm_sparse.artefact.reader import Artefact, open_artefact
from tvm_sparse.artefact.versions import installed
from tvm_sparse.artefact.writer import write_json
from tvm_sparse.checkpoint.synthetic import SyntheticCheckpoint
from tvm_sparse.errors import Refusal
from tvm_sparse.formats import FORMATS, Packed, unpack
from tvm_sparse.layout import make_layout
from tvm_sparse.models.config import REGISTERED
from tvm_sparse.packing import buffer_names, pack_model
from tvm_sparse.plan import Plan, declared
from tvm_sparse.pruning import PrunedWeights, Pruner, parse_pattern, select
from tvm_sparse.targets import parse_targets

CONFIG = dataclasses.replace(
    REGISTERED["qwen3.5-0.8b"],
    vocab_size=300,
    hidden_size=128,
    intermediate_size=336,
    num_hidden_layers=4,
    layer_types=("linear_attention",) * 3 + ("full_attention",),
    num_attention_heads=3,
    num_key_value_heads=1,
    head_dim=32,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=16,
    linear_value_head_dim=16,
    tie_word_embeddings=False,
)
LAYOUT = make_layout(CONFIG)


def weights(sparsity=0.75, pattern="unstructured", include=()) -> PrunedWeights:
    pruner = Pruner("magnitude", sparsity, parse_pattern(pattern, sparsity))
    return PrunedWeights(SyntheticCheckpoint(CONFIG), pruner, select(CONFIG, include))


def packed(folder, source, formats=tuple(FORMATS)) -> Plan:
    plan = pack_model(folder, "x", LAYOUT, source, parse_targets("cpu"), 1, formats=formats)
    facts = {"versions": installed(), "device": "cpu", "params": buffer_names(LAYOUT, plan)}
    write_json(folder / "tvm_sparse.json", facts)
    return plan


def stored(artefact: Artefact, name: str, dtype: torch.dtype) -> torch.Tensor:
    array = torch.from_numpy(artefact.array(name).copy())
    return array.view(dtype)


def unpacked(artefact: Artefact, plan: Plan, name: str) -> torch.Tensor:
    entry = plan[name]
    buffers = {}
    for buffer in FORMATS[entry.choice.name].buffers(entry.shape, entry.choice):
        full = f"{name}.{buffer.name}" if buffer.name else name
        buffers[buffer.name] = stored(artefact, full, getattr(torch, buffer.dtype))
    return unpack(Packed(entry.choice, entry.shape, 0, buffers))


@pytest.mark.parametrize("fmt", ["bitmap", "delta", "dense"])
def test_a_model_comes_out_as_it_was_pruned(tmp_path, fmt):
    plan = packed(tmp_path, weights(), [fmt])
    artefact, source = open_artefact(tmp_path, verify=True), weights()
    assert list(artefact.params) == [param.name for param in LAYOUT.params]
    for param in LAYOUT.params:
        if param.kind == "vector":
            assert torch.equal(stored(artefact, param.name, torch.float32), source.vector(param))
            continue
        assert torch.equal(unpacked(artefact, plan, param.name), source.matrix(param))
        assert plan[param.name].nbytes == artefact.params[param.name]["bytes"]
    assert plan["layers.0.mlp.gate_up_proj.weight"].choice.name == fmt
    assert plan["layers.0.mlp.gate_up_proj.weight"].density == pytest.approx(0.25, abs=1e-3)
    assert plan["embed_tokens.weight"].choice.name == plan["lm_head.weight"].choice.name == "dense"


def test_patterns_find_their_format(tmp_path):
    plan = packed(tmp_path, weights(0.5, "2:4"))
    assert plan["layers.3.self_attn.qkv_proj.weight"].choice.name == "2:4"
    assert unpacked(open_artefact(tmp_path), plan, "layers.3.self_attn.o_proj.weight").count_nonzero() == 128 * 48


def test_an_included_head_is_sparse(tmp_path):
    assert packed(tmp_path, weights(include=["lm_head"]))["lm_head.weight"].choice.name == "bitmap"


def test_the_declared_plan_has_the_formats_of_the_real_one(tmp_path):
    machines = parse_targets("cpu")
    foretold = declared(CONFIG, LAYOUT, select(CONFIG), 0.75, parse_pattern("unstructured"), machines, 1)
    plan = packed(tmp_path, weights())
    assert {n: e.choice for n, e in foretold.items()} == {n: e.choice for n, e in plan.items()}
    assert foretold.nbytes == pytest.approx(plan.nbytes, rel=0.02)


class Changed:
    """Pruned weights with one matrix changed on its way."""

    def __init__(self, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._weights, self._name, self._change = weights(), name, change

    def __getattr__(self, attribute: str):
        return getattr(self._weights, attribute)

    def matrix(self, param):
        matrix = self._weights.matrix(param)
        return self._change(matrix) if param.name == self._name else matrix


def test_values_that_are_no_bfloat16_stay_dense_in_float32(tmp_path, capsys):
    name = "layers.1.mlp.down_proj.weight"
    plan = packed(tmp_path, Changed(name, lambda matrix: matrix.float() / 3))
    assert plan[name].choice == FORMATS["dense"].choice(width=32)
    assert open_artefact(tmp_path).buffers[name].dtype == "float32"
    assert f"{name} stays dense" in capsys.readouterr().err


def test_bad_weights_are_refused_by_name_and_the_rest_is_kept(tmp_path):
    name = "layers.1.mlp.down_proj.weight"
    with pytest.raises(Refusal, match=f"{name}: .* NaN or infinite"):
        packed(tmp_path, Changed(name, lambda matrix: matrix.index_fill_(1, torch.tensor([5]), torch.inf)))
    read = []
    again = Changed("", lambda matrix: matrix)
    again.matrix = lambda param: read.append(param.name) or weights().matrix(param)
    packed(tmp_path, again)
    assert read[0] == name
    open_artefact(tmp_path, verify=True)
