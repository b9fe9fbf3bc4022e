"""The same tests on the dense model in transformers, bfloat16, random weights: what the user would run instead.

Prompts go through its own cache; tokens are decoded one by one without a graph, as `generate` does by default.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from tvm_sparse.bench.tables import Row

if TYPE_CHECKING:
    from tvm_sparse.bench.model import Test


class TransformersModel:
    """`config` as tvm_sparse.json holds it; weights are drawn on `device`."""

    def __init__(self, config: dict[str, Any], device: str) -> None:
        import transformers
        from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

        known = Qwen3_5TextConfig(**config)
        with torch.device("meta"):  # nothing is drawn on the CPU first
            model = Qwen3_5ForCausalLM(known).eval().bfloat16()
        self._model = model.to_empty(device=device)
        for parameter in self._model.parameters():
            torch.nn.init.normal_(parameter, std=0.0111)
        rotary = self._model.model.rotary_emb  # its buffers are computed, not drawn
        self._model.model.rotary_emb = type(rotary)(known).to(device)
        self._device = torch.device(device)
        self._vocab = known.vocab_size
        self.version = transformers.__version__

    @torch.inference_mode()
    def times(self, test: Test, batch: int, repeat: int) -> Iterator[float]:
        """Seconds of each timed run, after one that warms up; tg starts after one token."""
        ids = torch.randint(self._vocab, (batch, test.count), device=self._device)
        for number in range(repeat + 1):
            held = None
            if test.kind == "tg":
                held = self._model(ids[:, :1], use_cache=True).past_key_values
            self._synchronize()
            began = time.perf_counter()
            if test.kind == "pp":
                self._model(ids, use_cache=True, logits_to_keep=1)
            else:
                for step in range(test.count):
                    held = self._model(ids[:, step : step + 1], past_key_values=held, use_cache=True).past_key_values
            self._synchronize()
            if number:
                yield time.perf_counter() - began

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def references() -> list[Row]:
    """Published figures of the 27B at batch 1, in milliseconds a token; none was measured here."""
    sglang = "SGLang 0.5.16's published figures, with MTP speculation"
    return [
        {"model": "qwen3.5-27b", "weights": "bf16, MTP", "on": "H200", "ms/token": 5.89, "source": sglang},
        {"model": "qwen3.5-27b", "weights": "bf16, MTP", "on": "B200", "ms/token": 3.51, "source": sglang},
        {"model": "qwen3.5-27b", "weights": "fp8, MTP", "on": "H200", "ms/token": 4.61, "source": sglang},
        {"model": "qwen3.5-27b", "weights": "fp8, MTP", "on": "B200", "ms/token": 3.09, "source": sglang},
        {"model": "qwen3.5-27b", "weights": "bf16", "on": "B200", "ms/token": 10.45,
         "source": "SGLang 0.5.15's published figures, without speculation"},
        {"model": "qwen3.5-27b", "weights": "int4", "on": "H200, B200", "ms/token": "",
         "source": "no published figure of this model is known"},
    ]  # fmt: skip
