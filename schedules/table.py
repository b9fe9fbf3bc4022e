"""The one table of matmul kernels: (format, device) -> the module that writes the kernel.

Each module has two functions:
  build(spec, decisions) -> PrimFunc   x [m, k], the format's buffers in order, y [m, n]
  space(spec) -> tuple[Decision, ...]  what its schedule can choose, defaults included
and, where it can do more than the product:
  fuses(spec) -> bool                  whether it does what the spec asks besides
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

import tvm

from tvm_sparse.errors import Refusal
from tvm_sparse.schedules.ops import ATTRIBUTES, as_kernel
from tvm_sparse.schedules.spec import KernelSpec

SPEC_ATTR = "tvm_sparse.spec"
DECISIONS_ATTR = "tvm_sparse.decisions"

KERNELS = {
    (name, device): f"tvm_sparse.schedules.{device}.matmul_{file}"
    for device in ("cpu", "cuda")
    for name, file in {
        "dense": "dense",
        "bitmap": "bitmap",
        "delta": "delta",
        "2:4": "two_four",
        "block": "block",
    }.items()
} | {(name, "cuda"): f"tvm_sparse.schedules.cuda.matmul_{name}" for name in ("tiles", "gather")}


@dataclass(frozen=True)
class Decoder:
    """A module with build(spec) -> PrimFunc (the format's buffers in order, w [n, k] bfloat16), k a multiple of 8.

    Up to `most` tokens the format's own kernel is as fast as decoding and a dense product.
    """

    module: str
    most: int


DECODERS = {
    "bitmap": Decoder("tvm_sparse.schedules.cuda.decode_bitmap", 1),
    # At 75 % zeros its own kernel takes 2.5 to 9 us a token, decoding and a product 43 to 221 (docs/kernels.md).
    "delta": Decoder("tvm_sparse.schedules.cuda.decode_delta", 20),
    "gather": Decoder("tvm_sparse.schedules.cuda.decode_gather", 32),
    # Its own kernel takes 11 to 56 us for every 16 tokens, decoding and a product 45 to 275.
    "tiles": Decoder("tvm_sparse.schedules.cuda.decode_tiles", 64),
    "2:4": Decoder("tvm_sparse.schedules.cuda.decode_two_four", 1),
    "block": Decoder("tvm_sparse.schedules.cuda.decode_block", 1),
}
"""Formats that a GPU decodes into a dense matrix where there are many tokens (schedules/product.py)."""


@dataclass(frozen=True)
class Decision:
    """One thing a schedule chooses: MetaSchedule samples `choices`, without a record `default` stands."""

    name: str
    choices: tuple[int, ...]
    default: int


def _template(spec: KernelSpec) -> ModuleType:
    try:
        return import_module(KERNELS[spec.choice.name, spec.device])
    except KeyError as missing:
        raise Refusal(f"no {spec.device} kernel for format {spec.choice}: choose another format") from missing


def space(spec: KernelSpec) -> tuple[Decision, ...]:
    """The decisions of a kernel, in a fixed order."""
    return _template(spec).space(spec)


def defaults(spec: KernelSpec) -> dict[str, int]:
    return {decision.name: decision.default for decision in space(spec)}


def instantiate(spec: KernelSpec, decisions: Mapping[str, int] | None = None) -> tvm.tirx.PrimFunc:
    """The finished kernel; decisions left out take their defaults.

    Raises ValueError for a decision outside the kernel's space: a record made for another version of the template.
    """
    chosen = {**defaults(spec), **(decisions or {})}
    for decision in space(spec):
        if chosen[decision.name] not in decision.choices:
            raise ValueError(f"{spec.name}: {decision.name}={chosen[decision.name]} not in {decision.choices}")
    if unknown := chosen.keys() - {decision.name for decision in space(spec)}:
        raise ValueError(f"{spec.name}: unknown decisions {sorted(unknown)}")
    function = _template(spec).build(spec, chosen)
    if function.attrs and "global_symbol" in function.attrs:
        function = function.without_attr("global_symbol")
    return function.with_attr({**ATTRIBUTES, SPEC_ATTR: spec.to_json()})


def fuses(spec: KernelSpec) -> bool:
    """Whether there is a kernel that does all the spec says besides the product; passes ask before they fuse."""
    template = _template(spec)
    return hasattr(template, "fuses") and template.fuses(spec)


def decoder(spec: KernelSpec) -> tvm.tirx.PrimFunc:
    """The kernel that decodes the spec's matrix: (the format's buffers in order, w [n, k] bfloat16)."""
    function = import_module(DECODERS[spec.choice.name].module).build(spec)
    return as_kernel(function)


def write_decisions(function: tvm.tirx.PrimFunc, tuned: Mapping[str, Mapping[str, int]]) -> tvm.tirx.PrimFunc:
    """Notes the decisions of tuning records, by arch: a CPU kernel is written again for each instruction set."""
    return function.with_attr(DECISIONS_ATTR, json.dumps({arch: dict(d) for arch, d in tuned.items()}, sort_keys=True))


def read_decisions(function: tvm.tirx.PrimFunc) -> dict[str, dict[str, int]]:
    """What `write_decisions` noted: {} without a record."""
    noted = (function.attrs or {}).get(DECISIONS_ATTR)
    return json.loads(str(noted)) if noted is not None else {}
