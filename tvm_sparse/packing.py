"""Streams a model's parameters into an artefact: read, prune, measure, decide, pack, write, one matrix after the other.

Three of them are under way: one is read and pruned while the one before is packed and the one before that is written.
The largest projection of the 27B is 356 MB and is held whole, with its packed form; the embedding and lm_head
(2.5 GB each) pass through in row blocks.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from tvm_sparse.artefact.writer import ParamsWriter
from tvm_sparse.errors import Refusal
from tvm_sparse.formats import FORMATS, FormatChoice, Packed, measure, pack
from tvm_sparse.formats.base import Format
from tvm_sparse.layout import Layout, RuntimeParam
from tvm_sparse.pipeline import Behind, ahead
from tvm_sparse.plan import DENSE_REASON, Plan, PlanEntry, always_dense, decide, keep_dense
from tvm_sparse.progress import bar
from tvm_sparse.targets import Machine


def packing_device() -> torch.device:
    """Where matrices are pruned and packed: a GPU does in seconds what takes a CPU minutes, with the same bits."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Weights(Protocol):
    """Where parameters come from, pruned (tvm_sparse.pruning.PrunedWeights): bfloat16 where exact, else float32."""

    @property
    def selected(self) -> Collection[str]: ...

    def exact_bf16(self, param: RuntimeParam) -> bool: ...

    def blocks(self, param: RuntimeParam) -> Iterator[torch.Tensor]: ...

    def matrix(self, param: RuntimeParam) -> torch.Tensor: ...

    def vector(self, param: RuntimeParam) -> torch.Tensor: ...


def pack_model(
    folder: Path,
    fingerprint: str,
    layout: Layout,
    weights: Weights,
    machines: Sequence[Machine],
    batch: int,
    blocks: Sequence[tuple[int, int]] = ((16, 16),),
    formats: Collection[str] = tuple(FORMATS),
    expected: int = 0,
) -> Plan:
    """Writes params-*.safetensors and params.json into `folder`; returns the plan that was carried out.

    `fingerprint` names everything the packed bytes depend on: an earlier run with the same one is resumed.
    `blocks` are the block shapes to look for, `expected` the bytes all parameters should take (the declared plan's).
    Raises Refusal for NaN or infinity, by name; Stopped where the disk is full. What is finished is kept either way.
    """
    with ParamsWriter(folder, fingerprint, expected) as writer:
        missing = [param for param in layout.params if param.name not in writer.done]
        values = ahead(_values(missing, weights))
        with Behind() as writing:
            for param, value in bar(values, len(missing), "parameter", "packing"):
                if value is None:
                    writing.submit(partial(_copy_dense, writer, param, weights))
                elif param.kind == "vector":
                    writing.submit(partial(_write_vector, writer, param, value))
                else:
                    writing.submit(_packed(writer, param, value, machines, batch, blocks, formats))
                del value  # the next one is there already
        plan = Plan()
        for param in layout.params:
            if param.kind != "vector":
                plan[param.name] = PlanEntry.from_json(writer.done[param.name]["plan"])
        writer.finish([param.name for param in layout.params])
    return plan


def buffer_names(layout: Layout, plan: Plan) -> list[str]:
    """Every packed buffer in the order the library takes them: the layout's parameters, each format's buffers."""
    names = []
    for param in layout.params:
        if param.kind == "vector":
            names.append(param.name)
            continue
        entry = plan[param.name]
        fmt: Format = FORMATS[entry.choice.name]
        for buffer in fmt.buffers(entry.shape, entry.choice):
            names.append(f"{param.name}.{buffer.name}" if buffer.name else param.name)
    return names


def _values(params: Iterable[RuntimeParam], weights: Weights) -> Iterator[tuple[RuntimeParam, torch.Tensor | None]]:
    """Vectors and matrices; None for a matrix that passes through in blocks."""
    for param in params:
        if param.kind == "vector":
            yield param, weights.vector(param).float()
        else:
            yield param, None if always_dense(param, weights.selected) else weights.matrix(param)


def _packed(
    writer: ParamsWriter,
    param: RuntimeParam,
    matrix: torch.Tensor,
    machines: Sequence[Machine],
    batch: int,
    blocks: Sequence[tuple[int, int]],
    formats: Collection[str],
) -> Callable[[], None]:
    """Packs a matrix; what is given back writes it."""
    try:
        if matrix.dtype == torch.float32:
            packed = pack(matrix, FORMATS["dense"].choice(width=32))
            reason = "dense: float32 values that are no bfloat16"
            print(f"  {param.name} stays {reason}", file=sys.stderr)
            entry = keep_dense(param.name, packed.shape, packed.nnz, reason, width=32)
        else:
            stats = measure(matrix, blocks)
            entry = decide(param.name, stats, machines, batch, formats, param.pairs)
            packed = pack(matrix, entry.choice)
            bits = 8 * packed.nbytes / packed.nnz if packed.nnz else 0.0
            entry = replace(entry, nbytes=packed.nbytes, bits_per_nonzero=bits)
    except Refusal as refusal:
        raise Refusal(f"{param.name}: {refusal}") from None
    return partial(_write, writer, param, packed, {"nnz": packed.nnz, "plan": entry.to_json()})


def _write_vector(writer: ParamsWriter, param: RuntimeParam, value: torch.Tensor) -> None:
    facts = _facts(FORMATS["dense"].choice(width=32), param.shape) | {"nnz": int(value.count_nonzero())}
    writer.write(param.name, facts, [("", "float32", param.shape, [value])], value.nbytes)


def _copy_dense(writer: ParamsWriter, param: RuntimeParam, weights: Weights) -> None:
    """A matrix in row blocks, dense; what is counted on the way completes its facts."""
    exact = weights.exact_bf16(param)
    width, dtype = (16, "bfloat16") if exact else (32, "float32")
    shape = (param.shape[0], param.shape[1])
    dense = FORMATS["dense"].choice(width=width)
    facts = _facts(dense, shape)
    nnz = 0

    def blocks() -> Iterator[torch.Tensor]:
        nonlocal nnz
        for block in ahead(weights.blocks(param)):
            part = pack(block, dense)
            nnz += part.nnz
            yield part.buffers[""].cpu()
        entry = keep_dense(param.name, shape, nnz, DENSE_REASON[param.kind], width)
        facts.update(nnz=nnz, plan=entry.to_json())

    nbytes = shape[0] * shape[1] * width // 8
    writer.write(param.name, facts, [("", dtype, shape, blocks())], nbytes)


def _write(writer: ParamsWriter, param: RuntimeParam, packed: Packed, facts: dict[str, Any]) -> None:
    buffers = [
        (name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), [tensor.cpu()])
        for name, tensor in packed.buffers.items()
    ]
    writer.write(param.name, {**_facts(packed.choice, param.shape), **facts}, buffers, packed.nbytes)


def _facts(choice: FormatChoice, shape: Sequence[int]) -> dict[str, Any]:
    width = 32 if choice.options and choice.name == "dense" else 16
    return {"format": choice.name, "options": dict(choice.options), "width": width, "shape": list(shape)}
