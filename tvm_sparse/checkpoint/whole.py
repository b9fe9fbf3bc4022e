"""The whole checkpoint: text, the multi-token prediction (MTP) layer and the vision tower, by their names as stored.

The compiler needs the text model only; a measurement counts everything. The text tensors are `models.config.tensors`;
the shapes of the other two parts, needed where there is no file to ask, stand here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from tvm_sparse.models.config import FULL, ModelConfig, tensors

TEXT = "model.language_model."


@dataclass(frozen=True)
class Stored:
    """One tensor as stored. `part` is "text", "MTP" or "vision"; `short` is the name without its prefix."""

    name: str
    part: str
    short: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class VisionTower:
    """Sizes of the vision tower; its output has the text model's hidden size."""

    depth: int
    hidden: int
    intermediate: int
    patch: tuple[int, ...] = (3, 2, 16, 16)  # channels, frames, height, width of a patch
    positions: int = 2304
    merge: int = 4  # patches that become one token


# By the text model's hidden size; the smaller models have smaller towers, whose sizes are not known here.
TOWERS = {size: VisionTower(27, 1152, 4304) for size in (4096, 5120)}


def stored_tensors(config: ModelConfig, tower: VisionTower | None = None) -> tuple[Stored, ...]:
    """Every tensor of a published checkpoint, names and shapes from the configuration alone.

    `tower` stands for a vision tower that the model's size does not tell; without any the vision part is left out.
    """
    tower = tower or TOWERS.get(config.hidden_size)
    text = {name if name == "lm_head.weight" else TEXT + name: (name, spec) for name, spec in tensors(config).items()}
    found = [Stored(full, "text", short, spec.shape, text_dtype(short)) for full, (short, spec) in text.items()]
    found += [Stored(f"mtp.{name}", "MTP", name, shape, "BF16") for name, shape in _mtp(config).items()]
    vision = _vision(tower, config.hidden_size) if tower else {}
    found += [Stored(f"model.visual.{name}", "vision", name, shape, "BF16") for name, shape in vision.items()]
    return tuple(found)


def text_dtype(short: str) -> str:
    """As published: bfloat16, but for two small vectors of a DeltaNet layer."""
    return "F32" if short.endswith(("linear_attn.A_log", "linear_attn.norm.weight")) else "BF16"


def _mtp(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """One full attention layer, and a projection of [embedding, hidden state] in front of it."""
    hidden = config.hidden_size
    one = tensors(replace(config, num_hidden_layers=1, layer_types=(FULL,)))
    return {
        "fc.weight": (hidden, 2 * hidden),
        "pre_fc_norm_embedding.weight": (hidden,),
        "pre_fc_norm_hidden.weight": (hidden,),
        "norm.weight": (hidden,),
        **{name: spec.shape for name, spec in one.items() if name.startswith("layers.0.")},
    }


def _vision(tower: VisionTower, out: int) -> dict[str, tuple[int, ...]]:
    hidden, inside, merged = tower.hidden, tower.intermediate, tower.hidden * tower.merge
    found: dict[str, tuple[int, ...]] = {
        "patch_embed.proj.weight": (hidden, *tower.patch),
        "patch_embed.proj.bias": (hidden,),
        "pos_embed.weight": (tower.positions, hidden),
    }
    for block in range(tower.depth):
        linears = {
            "attn.qkv": (3 * hidden, hidden),
            "attn.proj": (hidden, hidden),
            "mlp.linear_fc1": (inside, hidden),
            "mlp.linear_fc2": (hidden, inside),
        }
        found |= _with_bias(f"blocks.{block}", linears) | _with_bias(
            f"blocks.{block}", {"norm1": (hidden,), "norm2": (hidden,)}
        )
    return found | _with_bias(
        "merger", {"norm": (hidden,), "linear_fc1": (merged, merged), "linear_fc2": (out, merged)}
    )


def _with_bias(prefix: str, weights: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in weights.items():
        found[f"{prefix}.{name}.weight"] = shape
        found[f"{prefix}.{name}.bias"] = shape[:1]
    return found
