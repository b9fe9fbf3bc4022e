"""Tensor names: the two prefixes checkpoints are written with, and the parts of the model that are not text."""

from __future__ import annotations

# Longer prefixes first: transformers writes `model.` after it has stripped the vision tower.
_PARTS = (
    ("model.language_model.", "text"),
    ("model.visual.", "vision"),
    ("visual.", "vision"),
    ("model.mtp.", "MTP"),
    ("mtp.", "MTP"),
    ("model.", "text"),
)


def split_name(name: str) -> tuple[str, str]:
    """Full checkpoint name -> (part, name without its prefix); part is "text", "vision" or "MTP"."""
    for prefix, part in _PARTS:
        if name.startswith(prefix):
            return part, name.removeprefix(prefix)
    return "text", name


def spellings(short: str) -> tuple[str, ...]:
    """Every way a checkpoint spells a short name, for regular expressions on checkpoint names."""
    if short == "lm_head.weight":
        return (short,)
    return short, f"model.{short}", f"model.language_model.{short}"
