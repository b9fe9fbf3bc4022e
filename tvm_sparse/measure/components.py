"""Which component a tensor belongs to, by its name: the rows of every table here."""

from __future__ import annotations

from math import prod

from tvm_sparse.checkpoint import Stored

# Row names by the module a weight belongs to. The first seven are the projections every transformer has.
_MODULES = {
    "down_proj": "down_proj",
    "gate_proj": "gate_proj",
    "up_proj": "up_proj",
    "q_proj": "q_proj",
    "k_proj": "k_proj",
    "v_proj": "v_proj",
    "o_proj": "o_proj",
    "in_proj_qkv": "DeltaNet qkv",
    "in_proj_z": "DeltaNet z",
    "in_proj_b": "DeltaNet b",
    "in_proj_a": "DeltaNet a",
    "out_proj": "DeltaNet out",
    "conv1d": "DeltaNet conv, decay",
    "A_log": "DeltaNet conv, decay",
    "dt_bias": "DeltaNet conv, decay",
    "fc": "MTP fc",
    "embed_tokens": "embedding",
    "lm_head": "head",
}
CLASSIC = ("down_proj", "gate_proj", "up_proj", "q_proj", "k_proj", "v_proj", "o_proj")
NOT_COUNTED = ("embedding", "head", "norms and positions")
"""Left out of "in all": norms and tables are never pruned, the head only on request."""
COMPONENTS = (*(name for name in dict.fromkeys(_MODULES.values()) if name not in NOT_COUNTED), "vision", *NOT_COUNTED)


def component(tensor: Stored) -> str:
    """One of COMPONENTS. The MTP layer's projections count with the text model's."""
    if "norm" in tensor.short or (tensor.part == "vision" and "embed" in tensor.short):
        return "norms and positions"
    if tensor.part == "vision":
        return "vision"
    return _MODULES[tensor.short.removesuffix(".weight").rpartition(".")[2]]


def counted(tensor: Stored) -> bool:
    return component(tensor) not in NOT_COUNTED


def coarse(tensor: Stored) -> str:
    """The seven classic projections by name, "other" for everything else that is counted."""
    found = component(tensor)
    return found if found in CLASSIC else "other"


def count_by_name(tensors: tuple[Stored, ...]) -> dict[str, tuple[int, int]]:
    """Row of the coarse table -> (tensors, weights), from names and shapes alone; nothing is read."""
    found = dict.fromkeys((*CLASSIC, "other"), (0, 0))
    for tensor in filter(counted, tensors):
        count, weights = found[coarse(tensor)]
        found[coarse(tensor)] = (count + 1, weights + prod(tensor.shape))
    return found


def similarity_group(tensor: Stored) -> tuple[str, int] | None:
    """(projection, layer) of a matrix that every layer of a kind has; None for all other tensors."""
    pieces = tensor.short.split(".")
    if tensor.part != "text" or pieces[0] != "layers" or len(tensor.shape) != 2:
        return None
    return ".".join(pieces[2:]).removesuffix(".weight"), int(pieces[1])
