"""Which checkpoint tensors make which runtime parameter: one table, read by the packer and by the graph passes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from tvm_sparse.models.config import LINEAR, ModelConfig, TensorSpec, tensors

Kind = Literal["projection", "embedding", "head", "vector"]
Transform = Literal["", "one_plus", "squeeze"]


@dataclass(frozen=True)
class RuntimeParam:
    """One parameter of the compiled model.

    `sources` are short checkpoint names, stacked along rows. `dtype` is "float32", or "model" for the activation
    dtype (every matrix). `transform` is applied on the way in: "one_plus" is 1 + w computed in float32 (norms are
    stored around 0, and bf16 would lose bits), "squeeze" drops the middle dimension of the convolution's [C, 1, 4].
    `pairs`: rows r and r + N / 2 give one number, so whoever computes both can finish it.
    """

    name: str
    sources: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    kind: Kind
    transform: Transform = ""
    pairs: bool = False


@dataclass(frozen=True)
class Layout:
    """The layer schedule (whose weights each executed layer uses) and every parameter, each once.

    Parameters bear the numbers of the checkpoint's layers, state that of the executed layers.
    """

    schedule: tuple[int, ...]
    params: tuple[RuntimeParam, ...]

    def stored_name(self, name: str) -> str:
        """`layers.E.part` of executed layer E -> `layers.W.part` of the layer whose weights it uses."""
        head, _, rest = name.partition(".")
        if head != "layers":
            return name
        executed, _, part = rest.partition(".")
        return f"layers.{self.schedule[int(executed)]}.{part}"

    @property
    def fusions(self) -> dict[str, tuple[str, ...]]:
        """Parameters made of several matrices: fused name -> sources, in row order."""
        return {param.name: param.sources for param in self.params if len(param.sources) > 1}

    @property
    def by_name(self) -> dict[str, RuntimeParam]:
        return {param.name: param for param in self.params}


_GATED = "mlp.gate_up_proj.weight"

_FUSED: dict[str, tuple[str, ...]] = {
    "linear_attn.in_proj.weight": (
        "linear_attn.in_proj_qkv.weight",
        "linear_attn.in_proj_z.weight",
        "linear_attn.in_proj_b.weight",
        "linear_attn.in_proj_a.weight",
    ),
    "self_attn.qkv_proj.weight": (
        "self_attn.q_proj.weight",
        "self_attn.k_proj.weight",
        "self_attn.v_proj.weight",
    ),
    _GATED: ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
}

_DELTANET = (
    "linear_attn.in_proj.weight",
    "linear_attn.conv1d.weight",
    "linear_attn.A_log",
    "linear_attn.dt_bias",
    "linear_attn.norm.weight",
    "linear_attn.out_proj.weight",
)
_ATTENTION = (
    "self_attn.qkv_proj.weight",
    "self_attn.q_norm.weight",
    "self_attn.k_norm.weight",
    "self_attn.o_proj.weight",
)
_MLP = ("post_attention_layernorm.weight", _GATED, "mlp.down_proj.weight")


def make_layout(config: ModelConfig, schedule: Sequence[int] | None = None) -> Layout:
    """The layout of a model whose executed layers use the weights of the checkpoint's layers in `schedule`.

    Without one every layer runs once, in order. A layer that the schedule does not name has no parameters.
    Parameters are in the order of their first use.
    """
    schedule = tuple(range(config.num_hidden_layers) if schedule is None else schedule)
    known = tensors(config)
    params = [_param("embed_tokens.weight", ("embed_tokens.weight",), known, "embedding")]
    for layer in dict.fromkeys(schedule):
        mixer = _DELTANET if config.layer_types[layer] == LINEAR else _ATTENTION
        for name in ("input_layernorm.weight", *mixer, *_MLP):
            sources = tuple(f"layers.{layer}.{source}" for source in _FUSED.get(name, (name,)))
            params.append(_param(f"layers.{layer}.{name}", sources, known))
    params.append(_param("norm.weight", ("norm.weight",), known))
    if not config.tie_word_embeddings:
        params.append(_param("lm_head.weight", ("lm_head.weight",), known, "head"))
    return Layout(schedule, tuple(params))


def executed_config(config: ModelConfig, layout: Layout) -> ModelConfig:
    """The model as it runs: as many layers as are executed, each of the kind of its weights."""
    kinds = tuple(config.layer_types[layer] for layer in layout.schedule)
    return replace(config, num_hidden_layers=len(kinds), layer_types=kinds)


def _param(
    name: str, sources: tuple[str, ...], known: dict[str, TensorSpec], kind: Kind = "projection"
) -> RuntimeParam:
    shape = known[sources[0]].shape
    if len(shape) == 2:
        rows = sum(known[source].shape[0] for source in sources)
        return RuntimeParam(name, sources, (rows, shape[1]), "model", kind, pairs=name.endswith(_GATED))
    if len(shape) == 3:
        return RuntimeParam(name, sources, (shape[0], shape[2]), "float32", "vector", "squeeze")
    # every norm but the gated one of DeltaNet scales by 1 + w
    one_plus = "norm" in name and not name.endswith("linear_attn.norm.weight")
    return RuntimeParam(name, sources, shape, "float32", "vector", "one_plus" if one_plus else "")
