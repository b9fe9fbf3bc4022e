"""The text model's configuration: read strictly from a config.json, or registered by name.

Field names are those of transformers' `Qwen3_5TextConfig`. What the compiled model does not do (another rope type,
biases, a quantised checkpoint, ...) is refused here, by the name of the field, before any work.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from tvm_sparse.errors import Refusal

LINEAR = "linear_attention"
FULL = "full_attention"

# Fields that must have this value where they are present: the model's forward pass is written for it.
_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "attention_dropout": (0, None),
    "attn_output_gate": (True,),
    "output_gate_type": ("swish", "silu"),
    "mamba_ssm_dtype": ("float32",),
    "mlp_only_layers": ((), [], None),
    "linear_conv_kernel_dim": (4,),
    "quantization_config": (None,),
    "is_encoder_decoder": (False,),
    "sliding_window": (None,),
}

# Fields that say nothing about the forward pass of text: housekeeping, training, vision, the MTP head.
_SILENT = frozenset(
    [
        "architectures",
        "model_type",
        "dtype",
        "torch_dtype",
        "transformers_version",
        "initializer_range",
        "use_cache",
        "bos_token_id",
        "pad_token_id",
        "full_attention_interval",
        "id2label",
        "label2id",
        "chunk_size_feed_forward",
        "return_dict",
        "problem_type",
        "output_hidden_states",
        "output_attentions",
        "_name_or_path",
        "name_or_path",
        "mtp_num_hidden_layers",
        "mtp_use_dedicated_embeddings",
        "max_window_layers",
        "language_model_only",
        "text_config",
        "vision_config",
        "image_token_id",
        "video_token_id",
        "vision_start_token_id",
        "vision_end_token_id",
    ]
)

_ROPE = frozenset(["rope_theta", "partial_rotary_factor", "rope_type", "type", "mrope_section", "mrope_interleaved"])


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of a Qwen3.5 text model; `layer_types[i]` is "linear_attention" (gated DeltaNet) or "full_attention"."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    linear_num_key_heads: int
    linear_num_value_heads: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    linear_conv_kernel_dim: int
    rms_norm_eps: float
    rope_theta: float
    partial_rotary_factor: float
    tie_word_embeddings: bool
    layer_types: tuple[str, ...]
    max_position_embeddings: int
    eos_token_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and (not isinstance(value, int) or value < 1):
                raise Refusal(f"config: {field.name} is {value!r}, not a positive whole number")
        _require_divides(self, "num_key_value_heads", "num_attention_heads")
        _require_divides(self, "linear_num_key_heads", "linear_num_value_heads")
        if len(self.layer_types) != self.num_hidden_layers:
            raise Refusal(
                f"config: layer_types names {len(self.layer_types)} layers, "
                f"num_hidden_layers is {self.num_hidden_layers}"
            )
        for kind in self.layer_types:
            if kind not in (LINEAR, FULL):
                raise Refusal(f"config: layer type {kind!r} is not supported: use {LINEAR} or {FULL}")
        if self.rotary_dim < 2 or self.rotary_dim % 2 or self.rotary_dim > self.head_dim:
            raise Refusal(
                f"config: partial_rotary_factor {self.partial_rotary_factor} of head_dim {self.head_dim} "
                "is not an even number of dimensions"
            )

    @property
    def rotary_dim(self) -> int:
        """Dimensions of a head that rotary embedding turns; the rest pass through."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def key_dim(self) -> int:
        """DeltaNet: columns of q, and of k."""
        return self.linear_num_key_heads * self.linear_key_head_dim

    @property
    def value_dim(self) -> int:
        """DeltaNet: columns of v, and of z."""
        return self.linear_num_value_heads * self.linear_value_head_dim

    @property
    def conv_dim(self) -> int:
        """DeltaNet: columns q | k | v that go through the convolution."""
        return 2 * self.key_dim + self.value_dim

    @property
    def query_dim(self) -> int:
        """Full attention: columns of q without its gates, and of the attention's output."""
        return self.num_attention_heads * self.head_dim

    @property
    def kv_dim(self) -> int:
        """Full attention: columns of k, and of v."""
        return self.num_key_value_heads * self.head_dim

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ModelConfig:
        """Reads a config.json: `qwen3_5` with its text_config, or a plain `qwen3_5_text`.

        Raises Refusal for another architecture, a missing key, and a field that asks for what is not built.
        """
        kind = data.get("model_type")
        if kind not in ("qwen3_5", "qwen3_5_text"):
            raise Refusal(
                f"config: model_type {kind!r} is not supported: give a Qwen3.5 model (qwen3_5 or qwen3_5_text)"
            )
        text = data.get("text_config") if kind == "qwen3_5" else data
        if not isinstance(text, Mapping):
            raise Refusal("config: text_config is missing: give the model's own config.json")
        if text.get("model_type", "qwen3_5_text") != "qwen3_5_text":
            raise Refusal(f"config: text_config is a {text['model_type']!r}, not a qwen3_5_text")
        _check_fields(text)
        _check_fields({key: data[key] for key in ("quantization_config",) if key in data})

        rope = _rope(text)
        count = _number(text, "num_hidden_layers")
        whole = {
            field.name: _number(text, field.name)
            for field in fields(cls)
            if field.type == "int" and field.name != "num_hidden_layers"
        }
        return cls(
            num_hidden_layers=count,
            rms_norm_eps=_positive(text, "rms_norm_eps"),
            rope_theta=_positive(rope, "rope_theta"),
            partial_rotary_factor=_positive({"partial_rotary_factor": 0.25} | rope, "partial_rotary_factor"),
            # the published 27B has it at the top only
            tie_word_embeddings=bool(data.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
            layer_types=_layer_types(text, count),
            eos_token_ids=token_ids(text.get("eos_token_id"), data.get("eos_token_id")),
            **whole,
        )

    def to_json(self) -> dict[str, Any]:
        """The way back: a `qwen3_5_text` config.json that `from_json` and transformers read."""
        data = asdict(self)
        rope = {"rope_type": "default"} | {key: data.pop(key) for key in ("rope_theta", "partial_rotary_factor")}
        eos = list(data.pop("eos_token_ids"))
        return {
            "architectures": ["Qwen3_5ForCausalLM"],
            "model_type": "qwen3_5_text",
            "hidden_act": "silu",
            "eos_token_id": eos or None,
            "rope_parameters": rope,
            **data,
            "layer_types": list(self.layer_types),
        }


def token_ids(*found: int | list[int] | None) -> tuple[int, ...]:
    """Joins end-of-text ids as config files write them (a number, a list or nothing), each once, in order."""
    lists = [each if isinstance(each, list) else [] if each is None else [each] for each in found]
    tokens = [token for each in lists for token in each]
    for token in tokens:
        if type(token) is not int or token < 0:
            raise Refusal(f"config: eos_token_id {token!r} is not a token's number")
    return tuple(dict.fromkeys(tokens))


@dataclass(frozen=True)
class TensorSpec:
    """What a checkpoint must hold under a name; dtypes as safetensors writes them."""

    shape: tuple[int, ...]
    dtypes: tuple[str, ...] = ("BF16", "F16", "F32")


def tensors(config: ModelConfig) -> dict[str, TensorSpec]:
    """Every text tensor of a checkpoint: short name (no `model.` or `model.language_model.`) -> shape and dtypes."""
    hidden = config.hidden_size
    found = {"embed_tokens.weight": TensorSpec((config.vocab_size, hidden))}
    for layer, kind in enumerate(config.layer_types):
        inside = _deltanet_shapes(config) if kind == LINEAR else _attention_shapes(config)
        inside |= {
            "input_layernorm.weight": (hidden,),
            "post_attention_layernorm.weight": (hidden,),
            "mlp.gate_proj.weight": (config.intermediate_size, hidden),
            "mlp.up_proj.weight": (config.intermediate_size, hidden),
            "mlp.down_proj.weight": (hidden, config.intermediate_size),
        }
        found |= {f"layers.{layer}.{name}": TensorSpec(shape) for name, shape in inside.items()}
    found["norm.weight"] = TensorSpec((hidden,))
    if not config.tie_word_embeddings:
        found["lm_head.weight"] = TensorSpec((config.vocab_size, hidden))
    return found


def _deltanet_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    hidden, heads = config.hidden_size, config.linear_num_value_heads
    return {
        "linear_attn.in_proj_qkv.weight": (config.conv_dim, hidden),
        "linear_attn.in_proj_z.weight": (config.value_dim, hidden),
        "linear_attn.in_proj_b.weight": (heads, hidden),
        "linear_attn.in_proj_a.weight": (heads, hidden),
        "linear_attn.conv1d.weight": (config.conv_dim, 1, config.linear_conv_kernel_dim),
        "linear_attn.A_log": (heads,),
        "linear_attn.dt_bias": (heads,),
        "linear_attn.norm.weight": (config.linear_value_head_dim,),
        "linear_attn.out_proj.weight": (hidden, config.value_dim),
    }


def _attention_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    hidden = config.hidden_size
    return {
        "self_attn.q_proj.weight": (2 * config.query_dim, hidden),  # per head: q, then its gate
        "self_attn.k_proj.weight": (config.kv_dim, hidden),
        "self_attn.v_proj.weight": (config.kv_dim, hidden),
        "self_attn.o_proj.weight": (hidden, config.query_dim),
        "self_attn.q_norm.weight": (config.head_dim,),
        "self_attn.k_norm.weight": (config.head_dim,),
    }


def _required(data: Mapping[str, Any], key: str) -> Any:
    if data.get(key) is None:
        raise Refusal(f"config: {key} is missing: give the model's own config.json")
    return data[key]


def _number(data: Mapping[str, Any], key: str) -> int:
    value = _required(data, key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise Refusal(f"config: {key} is {value!r}, not a positive whole number")
    return value


def _positive(data: Mapping[str, Any], key: str) -> float:
    value = _required(data, key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise Refusal(f"config: {key} is {value!r}, not a positive number")
    return float(value)


def _require_divides(config: ModelConfig, part: str, whole: str) -> None:
    if getattr(config, whole) % getattr(config, part):
        raise Refusal(f"config: {whole} {getattr(config, whole)} is not a multiple of {part} {getattr(config, part)}")


def _check_fields(text: Mapping[str, Any]) -> None:
    known = {field.name for field in fields(ModelConfig)} | _SILENT | _ROPE
    known |= {"rope_parameters", "rope_scaling", "eos_token_id"}
    for key, value in text.items():
        if key in _FIXED:
            if value not in _FIXED[key]:
                raise Refusal(f"config: {key} {value!r} is not supported: only {_FIXED[key][0]!r} is built")
        # an unknown field that is empty or off changes nothing; one that is set might
        elif key not in known and value not in (None, False, 0, "", [], {}):
            raise Refusal(
                f"config: field {key} = {value!r} is not known here: "
                "remove it if it does not change the model's arithmetic"
            )


def _rope(text: Mapping[str, Any]) -> dict[str, Any]:
    """Rope settings from rope_parameters (or the older rope_scaling), and from the text level."""
    outer = {key: text[key] for key in ("rope_theta", "partial_rotary_factor") if key in text}
    inner = text.get("rope_parameters") or text.get("rope_scaling") or {}
    if not isinstance(inner, Mapping):
        raise Refusal(f"config: rope_parameters is {inner!r}, not a table of settings")
    kind = inner.get("rope_type", inner.get("type", "default"))
    if kind not in ("default", "mrope"):
        raise Refusal(f"config: rope type {kind!r} is not supported: only 'default' is built")
    for key, value in inner.items():
        if key not in _ROPE and value is not None:
            raise Refusal(f"config: rope setting {key} = {value!r} is not supported")
    for key, value in outer.items():
        if inner.get(key, value) != value:
            raise Refusal(f"config: {key} is {value} and, in rope_parameters, {inner[key]}: make them agree")
    return {**outer, **inner}


def _layer_types(text: Mapping[str, Any], count: int) -> tuple[str, ...]:
    listed = text.get("layer_types")
    if isinstance(listed, list | tuple):
        return tuple(listed)
    if listed is not None:
        raise Refusal(f"config: layer_types is {listed!r}, not a list")
    interval = _number(text, "full_attention_interval")
    return tuple(FULL if (layer + 1) % interval == 0 else LINEAR for layer in range(count))


def _registered(
    hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int, value_heads: int, tied: bool
) -> ModelConfig:
    return ModelConfig(
        vocab_size=248320,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=256,
        linear_num_key_heads=16,
        linear_num_value_heads=value_heads,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        linear_conv_kernel_dim=4,
        rms_norm_eps=1e-6,
        rope_theta=1e7,
        partial_rotary_factor=0.25,
        tie_word_embeddings=tied,
        layer_types=(LINEAR, LINEAR, LINEAR, FULL) * (layers // 4),
        max_position_embeddings=262144,
        eos_token_ids=(248046, 248044),  # <|im_end|>, <|endoftext|>
    )


_27B = _registered(5120, 64, 24, 4, 17408, 48, tied=False)
REGISTERED: dict[str, ModelConfig] = {
    "qwen3.5-0.8b": _registered(1024, 24, 8, 2, 3584, 16, tied=True),
    "qwen3.5-2b": _registered(2048, 24, 8, 2, 6144, 16, tied=True),
    "qwen3.5-4b": _registered(2560, 32, 16, 4, 9216, 32, tied=True),
    "qwen3.5-9b": _registered(4096, 32, 16, 4, 12288, 32, tied=False),
    "qwen3.5-27b": _27B,
    "qwen3.6-27b": _27B,  # later checkpoints of equal geometry
    "qwen3.8-27b": _27B,
}
