"""config.json is read strictly: what the compiler does not build is refused by the name of the field."""

import pytest

from tvm_sparse.errors import Refusal
from tvm_sparse.models.config import FULL, LINEAR, REGISTERED, ModelConfig, tensors


def published() -> dict:
    """A config.json as published: text fields inside, the tie at the top only."""
    text = REGISTERED["qwen3.5-9b"].to_json()
    text.pop("tie_word_embeddings")
    text |= {"attn_output_gate": True, "full_attention_interval": 4, "mtp_num_hidden_layers": 1, "mlp_only_layers": []}
    text["rope_parameters"] |= {"mrope_section": [11, 11, 10], "mrope_interleaved": True}
    return {"model_type": "qwen3_5", "text_config": text, "tie_word_embeddings": False, "vision_config": {"depth": 27}}


@pytest.mark.parametrize("name", REGISTERED)
def test_json_round_trip(name):
    assert ModelConfig.from_json(REGISTERED[name].to_json()) == REGISTERED[name]


def test_published_form():
    assert ModelConfig.from_json(published()) == REGISTERED["qwen3.5-9b"]


def test_layer_types_from_interval():
    data = published()
    del data["text_config"]["layer_types"]
    assert ModelConfig.from_json(data).layer_types == (LINEAR, LINEAR, LINEAR, FULL) * 8


def test_ends_are_joined():
    data = published() | {"eos_token_id": [7, 248044]}
    data["text_config"]["eos_token_id"] = 248044
    assert ModelConfig.from_json(data).eos_token_ids == (248044, 7)


@pytest.mark.parametrize(
    "name, count, weights",
    [("qwen3.5-27b", 851, 26_895_998_464), ("qwen3.5-9b", 427, 8_953_803_264)],
)
def test_tensor_table_counts_the_published_weights(name, count, weights):
    table = tensors(REGISTERED[name])
    numel = 0
    for spec in table.values():
        product = 1
        for size in spec.shape:
            product *= size
        numel += product
    assert (len(table), numel) == (count, weights)


@pytest.mark.parametrize("tied", [True, False])
def test_tensor_table_is_what_transformers_makes(tied):
    torch = pytest.importorskip("torch")
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    config = ModelConfig.from_json(
        REGISTERED["qwen3.5-0.8b"].to_json() | {"tie_word_embeddings": tied, "linear_num_value_heads": 32}
    )
    theirs = Qwen3_5TextConfig(**config.to_json())
    assert ModelConfig.from_json(theirs.to_dict()) == config
    with torch.device("meta"):
        model = Qwen3_5ForCausalLM(theirs)
    made = {name.removeprefix("model."): tuple(value.shape) for name, value in model.state_dict().items()}
    if tied:
        made.pop("lm_head.weight", None)
    assert made == {name: spec.shape for name, spec in tensors(config).items()}


@pytest.mark.parametrize(
    "change, named",
    [
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attention_bias": True}, "attention_bias"),
        ({"attn_output_gate": False}, "attn_output_gate"),
        ({"linear_conv_kernel_dim": 8}, "linear_conv_kernel_dim"),
        ({"num_experts": 64}, "num_experts"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": "5120"}, "hidden_size"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"layer_types": ["sliding_attention"] * 32}, "sliding_attention"),
        ({"layer_types": [LINEAR]}, "layer_types"),
        ({"model_type": "qwen3_next"}, "qwen3_next"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e7, "factor": 4.0}}, "yarn"),
        ({"rope_parameters": {"rope_type": "default"}}, "rope_theta"),
        ({"rope_parameters": {"rope_theta": 1e7, "partial_rotary_factor": 0.001}}, "partial_rotary_factor"),
        ({"rope_theta": 1e4}, "rope_theta"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps"),
        ({"eos_token_id": "<|im_end|>"}, "eos_token_id"),
    ],
)
def test_refused_by_name(change, named):
    data = published()
    data["text_config"] |= change
    with pytest.raises(Refusal, match=named) as refused:
        ModelConfig.from_json(data)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("kind", ["llama", None, "qwen3_5_moe"])
def test_other_architectures_are_refused(kind):
    with pytest.raises(Refusal, match="model_type"):
        ModelConfig.from_json({"model_type": kind})
