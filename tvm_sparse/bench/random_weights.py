"""A whole model's packed parameters straight in the device's memory, for measuring speed without a checkpoint.

One matrix of every shape, format and density is drawn, pruned and packed; every layer gets its own copy, so that the
bytes and the traffic are those of a real model. The tokens mean nothing.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
import tvm_ffi

from tvm_sparse.engine.memory import kept_on_host
from tvm_sparse.engine.runtime import Device
from tvm_sparse.formats import FORMATS, pack
from tvm_sparse.layout import RuntimeParam, make_layout
from tvm_sparse.models.config import ModelConfig
from tvm_sparse.pruning import Pruner, parse_pattern

_DEVIATION = 0.0111  # of the 27B's matrices


class RandomWeights:
    """`folder` holds a library and report.json; its weights, if it has any, are not read."""

    def __init__(self, folder: Path, device: str) -> None:
        facts = json.loads((folder / "tvm_sparse.json").read_text())
        report = json.loads((folder / "report.json").read_text())
        self._device = torch.device(device)
        self._generator = torch.Generator(self._device).manual_seed(0)
        self._pruning = facts["pruning"]
        self._rows = {row["param"]: row for row in report["matrices"]}
        self._templates: dict[tuple, dict[str, torch.Tensor]] = {}
        self._tensors: dict[str, torch.Tensor] = {}
        wanted, on_host = set(facts["params"]), kept_on_host(facts)
        for param in make_layout(ModelConfig.from_json(facts["config"]), facts["layout"]["schedule"]).params:
            for buffer, tensor in self._packed(param).items():
                name = f"{param.name}.{buffer}" if buffer else param.name
                if name in wanted:
                    self._tensors[name] = tensor.cpu() if name in on_host else tensor.clone()
        self._templates.clear()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    @property
    def resident(self) -> int:
        return sum(tensor.nbytes for tensor in self._tensors.values() if tensor.device == self._device)

    def nbytes(self, name: str) -> int:
        return self._tensors[name].nbytes

    def tensor(self, name: str, device: Device, on_host: bool) -> Any:
        tensor = self._tensors[name]
        if on_host:
            return device.mapped(tuple(tensor.shape), "bfloat16", tensor.view(torch.int16).numpy())
        return tvm_ffi.from_dlpack(tensor)

    def _packed(self, param: RuntimeParam) -> dict[str, torch.Tensor]:
        row = self._rows.get(param.name)
        if row is None:
            return {"": torch.randn(param.shape, device=self._device, generator=self._generator) * 0.1}
        key = (*param.shape, row["format"], row["density"])
        if key not in self._templates:
            self._templates[key] = self._pack(param.shape, row["format"], row["density"])
        return self._templates[key]

    def _pack(self, shape: tuple[int, ...], spelled: str, density: float) -> dict[str, torch.Tensor]:
        weight = torch.empty(shape, dtype=torch.bfloat16, device=self._device)
        for block in weight.split(1 << 14):
            block.copy_(torch.randn(block.shape, device=self._device, generator=self._generator) * _DEVIATION)
        if density < 1:
            pattern = parse_pattern(self._pruning["pattern"], self._pruning["sparsity"])
            sparsity = 1 - density if pattern.sparsity is None else None
            Pruner(sparsity=sparsity, pattern=pattern).matrix("random", weight)
        name, _, options = spelled.partition("(")
        choice = FORMATS[name].choice(**{key: int(value) for key, value in re.findall(r"(\w+)=(\d+)", options)})
        return pack(weight, choice).buffers
