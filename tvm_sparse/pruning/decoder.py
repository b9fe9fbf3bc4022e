"""transformers' own Qwen3.5 decoder layers, one at a time: what carries calibration text through a model.

A layer is made without memory of its own and takes a checkpoint's tensors in float32; hidden states stay on the
host and visit the device a few sequences at a time. So memory is one layer and the hidden states, whatever the
model's depth.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tvm_sparse.checkpoint import Checkpoint
from tvm_sparse.progress import bar

_TOKENS = 8192  # that visit the device together


class Decoder:
    """The layers of the model in `folder` (its config.json), run on `device`."""

    def __init__(self, folder: Path, device: str) -> None:
        from transformers import AutoConfig
        from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5TextRotaryEmbedding
        from transformers.utils import logging

        logging.set_verbosity_error()  # "the fast path is not available": slow here is known
        self.device = torch.device(device)
        self._config: Any = AutoConfig.from_pretrained(folder, local_files_only=True).get_text_config()
        self._config._attn_implementation = "sdpa"  # causal without a mask, and without a square of scores
        self._rotary = Qwen3_5TextRotaryEmbedding(self._config).to(self.device)

    def embed(self, checkpoint: Checkpoint, ids: torch.Tensor) -> torch.Tensor:
        """Hidden states [samples, length, hidden] of ids [samples, length], float32, on the host."""
        name = "embed_tokens.weight"
        hidden = torch.empty((*ids.shape, checkpoint.spec(name).shape[1]))
        first = 0
        for block in checkpoint.blocks(name):
            here = (ids >= first) & (ids < first + len(block))
            hidden[here] = block[ids[here] - first].float()
            first += len(block)
        return hidden

    def layer(self, index: int, checkpoint: Checkpoint) -> nn.Module:
        """Layer `index` with the checkpoint's tensors."""
        from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5DecoderLayer

        with torch.device("meta"):
            layer: nn.Module = Qwen3_5DecoderLayer(self._config, index)
        prefix = f"layers.{index}."
        tensors = {
            name.removeprefix(prefix): checkpoint.tensor(name).to(self.device, torch.float32)
            for name in checkpoint.names()
            if name.startswith(prefix)
        }
        layer.load_state_dict(tensors, assign=True)
        return layer.eval().requires_grad_(False)

    def advance(self, layer: nn.Module, hidden: torch.Tensor, what: str) -> None:
        """Puts a layer's outputs in the place of its inputs [samples, length, hidden]."""
        for part in self.batches(hidden, what):
            hidden[part] = self.forward(layer, hidden[part]).to(hidden.device)

    def batches(self, hidden: torch.Tensor, what: str) -> Iterable[slice]:
        """The sequences of hidden states in the parts that visit the device together."""
        samples, length, _ = hidden.shape
        step = max(1, _TOKENS // length)
        parts = [slice(start, start + step) for start in range(0, samples, step)]
        return bar(parts, len(parts), "batch", what)

    def forward(self, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """A layer's outputs for x [samples, length, hidden], each sequence from position 0, on the device."""
        with torch.inference_mode():
            return self.apply(layer, x)

    def apply(self, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """`forward`, for a gradient."""
        x = x.to(self.device)
        positions = torch.arange(x.shape[1], device=self.device).expand(3, 1, -1)
        y: torch.Tensor = layer(x, position_embeddings=self._rotary(x, positions))
        return y
