"""Checkpoints are read lazily and checked whole before the first tensor; damage is refused in one line."""

import errno
import json
import shutil
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tvm_sparse.checkpoint import WeightsUnavailable, model_config, open_checkpoint
from tvm_sparse.checkpoint.safetensors_file import read_header
from tvm_sparse.errors import Refusal, Stopped
from tvm_sparse.models.config import REGISTERED, ModelConfig, tensors

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def model():
    """A tiny model of transformers' own, its bf16 weights by short name."""
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    torch.manual_seed(0)
    config = Qwen3_5TextConfig(
        vocab_size=512, hidden_size=64, intermediate_size=160, num_hidden_layers=5, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, linear_num_key_heads=2, linear_num_value_heads=6, linear_key_head_dim=16,
        linear_value_head_dim=16, max_position_embeddings=2048, tie_word_embeddings=False, eos_token_id=1,
        rope_parameters={"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25},
    )  # fmt: skip
    return Qwen3_5ForCausalLM(config).bfloat16()


@pytest.fixture(scope="module")
def weights(model):
    return {name.removeprefix("model."): value.clone() for name, value in model.state_dict().items()}


@pytest.fixture(scope="module")
def sharded(model, tmp_path_factory):
    """What save_pretrained writes: `model.` names in several shards."""
    folder = tmp_path_factory.mktemp("sharded")
    model.save_pretrained(folder, max_shard_size="100KB")
    assert (folder / INDEX).is_file()
    return folder


@pytest.fixture
def folder(sharded, tmp_path):
    """A copy to damage."""
    return shutil.copytree(sharded, tmp_path / "copy")


def write_published(folder, weights, config, extra=()):
    """As published: `model.language_model.` names, A_log and the gated norm in float32, vision and MTP beside."""
    kept = {
        name if name == "lm_head.weight" else f"model.language_model.{name}": value.float()
        if name.endswith(("A_log", "linear_attn.norm.weight"))
        else value
        for name, value in weights.items()
    }
    kept |= {"model.visual.patch_embed.proj.bias": torch.ones(3), "mtp.fc.weight": torch.ones(2, 4)} | dict(extra)
    folder.mkdir(exist_ok=True)
    save_file(kept, folder / "model.safetensors")
    text = config.to_json()
    outer = {"model_type": "qwen3_5", "text_config": text, "tie_word_embeddings": text.pop("tie_word_embeddings")}
    (folder / "config.json").write_text(json.dumps(outer))
    return folder


def test_reads_what_transformers_wrote(sharded, weights):
    checkpoint = open_checkpoint(str(sharded))
    assert set(checkpoint.names()) == set(weights)
    for name, value in weights.items():
        assert torch.equal(checkpoint.tensor(name), value), name
        assert checkpoint.tensor(name).dtype == torch.bfloat16
    assert torch.equal(checkpoint.rows("embed_tokens.weight", 17, 300), weights["embed_tokens.weight"][17:300])
    assert checkpoint.origin["kind"] == "folder" and checkpoint.dropped_line() == ""


def test_writing_into_rows_does_not_come_back(sharded, weights):
    checkpoint = open_checkpoint(str(sharded))
    checkpoint.rows("embed_tokens.weight", 0, 9).zero_()
    assert torch.equal(checkpoint.rows("embed_tokens.weight", 0, 9), weights["embed_tokens.weight"][:9])


def test_fingerprint_changes_with_the_weights(folder):
    before = open_checkpoint(str(folder)).fingerprint()
    assert before == open_checkpoint(str(folder)).fingerprint()
    rewrite(folder, lambda held: held[first_matrix(held)].zero_())
    assert before != open_checkpoint(str(folder)).fingerprint()


def test_published_names_and_other_parts(sharded, weights, tmp_path):
    config = open_checkpoint(str(sharded)).config
    checkpoint = open_checkpoint(str(write_published(tmp_path / "published", weights, config)))
    assert checkpoint.config == config
    for name, value in weights.items():
        assert torch.equal(checkpoint.tensor(name), value), name
    assert checkpoint.dropped == {"vision": 1, "MTP": 1}
    assert checkpoint.dropped_line() == "left out: 1 MTP tensors, 1 vision tensors"


def test_wide_dtypes(sharded, weights, tmp_path):
    """float32 and float16 are bfloat16 where every value is one, and stay as they are otherwise."""
    config = open_checkpoint(str(sharded)).config
    changed = dict(weights)
    exact, half, odd = (f"layers.0.mlp.{part}_proj.weight" for part in ("up", "down", "gate"))
    changed[exact] = weights[exact].float()
    changed[half] = (torch.arange(64 * 160).reshape(64, 160) % 256 - 128).half()
    changed[odd] = weights[odd].float() + 1e-7 * (torch.arange(160)[:, None] == 159)
    checkpoint = open_checkpoint(str(write_published(tmp_path / "wide", changed, config)))
    assert [checkpoint.exact_bf16(name) for name in (exact, half, odd)] == [True, True, False]
    assert torch.equal(checkpoint.tensor(exact), weights[exact])
    assert torch.equal(checkpoint.tensor(half), changed[half].bfloat16())
    assert checkpoint.rows(odd, 0, 1).dtype == torch.float32 and torch.equal(checkpoint.tensor(odd), changed[odd])


def test_tied_copy_of_the_head_is_left_out(sharded, weights, tmp_path):
    config = ModelConfig.from_json(open_checkpoint(str(sharded)).config.to_json() | {"tie_word_embeddings": True})
    checkpoint = open_checkpoint(str(write_published(tmp_path / "tied", weights, config)))
    assert "lm_head.weight" not in checkpoint.names() and checkpoint.dropped["tied lm_head"] == 1


def test_side_files_and_end_ids(folder):
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 1]}')
    (folder / "tokenizer.json").write_text("{}")
    checkpoint = open_checkpoint(str(folder))
    assert set(checkpoint.side_files()) == {"generation_config.json", "tokenizer.json"}
    assert checkpoint.config.eos_token_ids == (1, 5) == model_config(str(folder)).eos_token_ids


def test_bare_folder(folder):
    """No tokenizer, no generation config, and with a known model no config.json either."""
    config = open_checkpoint(str(folder)).config
    for extra in ("config.json", "generation_config.json"):
        (folder / extra).unlink(missing_ok=True)
    assert open_checkpoint(str(folder), config).side_files() == {}
    with pytest.raises(Refusal, match=r"config\.json is missing"):
        open_checkpoint(str(folder))


def rewrite(folder, change):
    """Applies `change` to the tensors of one shard."""
    shard = sorted(folder.glob("*.safetensors"))[0]
    held = load_file(shard)
    change(held)
    save_file(held, shard)


def first_matrix(held):
    return next(name for name, value in held.items() if value.ndim == 2)


def lose_tensor(folder):
    rewrite(folder, lambda held: held.pop(first_matrix(held)))


def lose_tensor_and_its_promise(folder):
    lose_tensor(folder)
    index = json.loads((folder / INDEX).read_text())
    held = set().union(*(load_file(shard) for shard in folder.glob("*.safetensors")))
    index["weight_map"] = {name: shard for name, shard in index["weight_map"].items() if name in held}
    (folder / INDEX).write_text(json.dumps(index))


def add_tensor(folder):
    rewrite(folder, lambda held: held.update({"model.layers.0.mlp.gate_proj.weight_scale": torch.ones(3)}))


def transpose(folder):
    rewrite(folder, lambda held: held.update({(name := first_matrix(held)): held[name].T.contiguous()}))


def quantise(folder):
    rewrite(folder, lambda held: held.update({(name := first_matrix(held)): held[name].to(torch.int8)}))


def lose_shard(folder):
    sorted(folder.glob("*.safetensors"))[-1].unlink()


def truncate(folder):
    shard = sorted(folder.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-100])


def huge_header(folder):
    shard = sorted(folder.glob("*.safetensors"))[0]
    shard.write_bytes(struct.pack("<Q", 1 << 60) + shard.read_bytes()[8:])


def escape(folder):
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "../../etc/passwd"}}))


def only_pickles(folder):
    for path in [*folder.glob("*.safetensors"), folder / INDEX]:
        path.unlink()


def half_an_index(folder):
    (folder / INDEX).write_text('{"weight_map": {')


@pytest.mark.parametrize(
    "damage, named",
    [
        (lose_shard, r"safetensors is missing"),
        (truncate, "truncated"),
        (huge_header, "header claims"),
        (lose_tensor, "which model.safetensors.index.json promises"),
        (lose_tensor_and_its_promise, "is missing"),
        (add_tensor, "weight_scale is not part"),
        (transpose, "has shape"),
        (quantise, "is I8"),
        (escape, "outside its folder"),
        (only_pickles, "only safetensors"),
        (half_an_index, "not readable as JSON"),
    ],
)
def test_damage_is_refused_by_name(folder, damage, named):
    damage(folder)
    with pytest.raises(Refusal, match=named) as refused:
        open_checkpoint(str(folder))
    assert str(folder) in str(refused.value) and "\n" not in str(refused.value)


def test_other_weights_than_the_model(sharded):
    with pytest.raises(Refusal, match="vocab_size is 512, --model says 248320"):
        open_checkpoint(str(sharded), REGISTERED["qwen3.5-0.8b"])


header = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["BF16", "F32", "??"]),
        "shape": st.lists(st.integers(-1, 4), max_size=3),
        "data_offsets": st.lists(st.integers(-1, 40), min_size=1, max_size=3),
    }
)


@given(
    st.one_of(st.binary(max_size=40), st.dictionaries(st.text(max_size=3), header, max_size=3)), st.binary(max_size=20)
)
@settings(max_examples=100, deadline=None)
def test_any_file_is_read_or_refused(tmp_path_factory, start, rest):
    """Whatever a file holds, reading its header ends in tensors that lie inside it, or in a refusal."""
    if isinstance(start, dict):
        text = json.dumps(start).encode()
        start = struct.pack("<Q", len(text)) + text
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    path.write_bytes(start + rest)
    try:
        entries = read_header(path)
    except Refusal:
        return
    assert all(8 <= entry.begin <= entry.end <= len(start + rest) for entry in entries.values())


SMALL = ModelConfig.from_json(REGISTERED["qwen3.5-0.8b"].to_json() | {"vocab_size": 700, "intermediate_size": 1000})


@given(st.sampled_from(sorted(tensors(SMALL))[:24]), st.integers(0, 1000), st.integers(1, 1000))
@settings(max_examples=20, deadline=None)
def test_synthetic_rows_do_not_depend_on_the_block(name, start, count):
    checkpoint = open_checkpoint("synthetic", SMALL)
    whole = checkpoint.tensor(name)
    start = min(start, len(whole) - 1)
    assert torch.equal(checkpoint.rows(name, start, start + count), whole[start : start + count])


def test_synthetic_is_seeded_and_has_the_measured_spread():
    one, same, other = (open_checkpoint("synthetic", SMALL, seed=seed) for seed in (0, 0, 1))
    for part, std in {"mlp.down_proj": 0.0109, "mlp.gate_proj": 0.01115, "linear_attn.in_proj_qkv": 0.0152}.items():
        name = f"layers.0.{part}.weight"
        drawn = one.tensor(name)
        assert torch.equal(drawn, same.tensor(name)) and not torch.equal(drawn, other.tensor(name))
        assert drawn.float().std().item() == pytest.approx(std, rel=0.01)
    assert not torch.equal(one.tensor("layers.0.mlp.up_proj.weight"), one.tensor("layers.0.mlp.gate_proj.weight"))
    assert one.origin == {"kind": "synthetic", "seed": 0}


class Hub:
    """Stands in for the hub: what the cache holds, and how the network answers."""

    def __init__(self, cache=None, answer=None):
        self.cache, self.answer, self.asked = cache, answer, 0

    def __call__(self, hub_id, allow_patterns, local_files_only=False):
        from huggingface_hub.errors import LocalEntryNotFoundError

        if local_files_only:
            if self.cache is None:
                raise LocalEntryNotFoundError("not cached")
            return str(self.cache)
        self.asked += 1
        if isinstance(self.answer, Exception):
            raise self.answer
        return str(self.answer)


def test_hub_cache_comes_first(sharded, monkeypatch):
    hub = Hub(cache=sharded)
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub)
    assert open_checkpoint("auto", model="someone/tiny").origin["id"] == "someone/tiny"
    assert hub.asked == 0


def test_incomplete_cache_goes_on_from_the_hub(folder, sharded, monkeypatch):
    lose_shard(folder)
    hub = Hub(cache=folder, answer=sharded)
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub)
    open_checkpoint("someone/tiny")
    assert hub.asked == 1


def test_no_network_says_both_ways_on(monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", Hub(answer=ConnectionError("no route")))
    with pytest.raises(WeightsUnavailable, match=r"--weights FOLDER.*--weights synthetic") as stopped:
        open_checkpoint("auto", REGISTERED["qwen3.5-27b"], model="qwen3.5-27b")
    assert stopped.value.status == 3 and "Qwen/Qwen3.5-27B" in str(stopped.value)


def test_half_a_cache_without_network(folder, monkeypatch):
    """The hub's client then hands out the incomplete copy."""
    lose_shard(folder)
    monkeypatch.setattr("huggingface_hub.snapshot_download", Hub(cache=folder, answer=folder))
    with pytest.raises(WeightsUnavailable, match="not whole"):
        open_checkpoint("someone/tiny")


def test_full_disk_stops(monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", Hub(answer=OSError(errno.ENOSPC, "No space left")))
    with pytest.raises(Stopped, match="disk is full"):
        open_checkpoint("someone/tiny")


def test_unknown_model_lists_the_names():
    with pytest.raises(Refusal, match=r"unknown model qwen-next: .*qwen3\.5-27b"):
        model_config("qwen-next")
    with pytest.raises(Refusal, match="no folder"):
        open_checkpoint("/nowhere/at/all")
