"""What `evaluate` asks of a model, answered by an artefact in its engine and by a checkpoint in transformers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tvm_sparse.errors import Refusal


class Judge(Protocol):
    """A model that gives the text's tokens probabilities; every call starts from an empty cache."""

    def encode(self, text: str) -> list[int]:
        """A text's token ids, without special tokens."""

    def score(self, ids: list[int]) -> np.ndarray:
        """float32 [n - 1]: the log-probability of each token after the first."""

    def log_probs(self, ids: list[int]) -> Iterator[np.ndarray]:
        """float32 [vocab], n - 1 times: the distribution of each token after the first."""


def open_judge(folder: Path, window: int, device: str = "cpu", dtype: str | None = None) -> Judge:
    """An artefact or a checkpoint folder as a judge. Raises Refusal for a folder that is neither."""
    artefact = (folder / "tvm_sparse.json").exists()
    if not artefact and not (folder / "config.json").exists():
        raise Refusal(f"{folder} is neither an artefact (no tvm_sparse.json) nor a checkpoint (no config.json)")
    if not (folder / "tokenizer.json").exists():
        raise Refusal(f"{folder} has no tokenizer.json: a text needs one")
    return ArtefactJudge(folder, window, device) if artefact else CheckpointJudge(folder, device, dtype)


class ArtefactJudge:
    """The engine. Whole distributions come from decoding token by token, as generation does."""

    def __init__(self, folder: Path, window: int, device: str) -> None:
        from tvm_sparse.engine import Engine

        self.engine = Engine(folder, device=device, context=window)

    def encode(self, text: str) -> list[int]:
        assert self.engine.tokenizer is not None
        return self.engine.tokenizer.encode(text)

    def score(self, ids: list[int]) -> np.ndarray:
        self.engine.reset()
        return np.asarray(self.engine.score(ids))

    def log_probs(self, ids: list[int]) -> Iterator[np.ndarray]:
        self.engine.reset()
        for token in ids[:-1]:
            logits = self.engine.decode(token)
            largest = logits.max()
            yield logits - (largest + np.log(np.exp(logits - largest).sum()))


class CheckpointJudge:
    """transformers, in the checkpoint's own dtype unless another is asked for."""

    def __init__(self, folder: Path, device: str, dtype: str | None) -> None:
        from tokenizers import Tokenizer
        from transformers import AutoModelForCausalLM

        self.device = device
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        loader: Any = AutoModelForCausalLM
        self.model = loader.from_pretrained(folder, dtype=dtype or "auto", local_files_only=True).to(device).eval()

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def score(self, ids: list[int]) -> np.ndarray:
        rows = self._window(ids)
        return rows.gather(1, rows.new_tensor(ids[1:]).long()[:, None])[:, 0].cpu().numpy()

    def log_probs(self, ids: list[int]) -> Iterator[np.ndarray]:
        yield from self._window(ids).cpu().numpy()

    def _window(self, ids: list[int]) -> Any:
        """float32 [n - 1, vocab]."""
        import torch

        with torch.inference_mode():
            logits = self.model(torch.tensor([ids], device=self.device), use_cache=False).logits[0, :-1]
            return logits.float().log_softmax(-1)
