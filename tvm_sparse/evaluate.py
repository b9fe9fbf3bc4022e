"""`python -m tvm_sparse.evaluate OUT --text FILE [--against OUT2|DIR]`: perplexity of an artefact or a checkpoint.

The protocol, the same for both: the text's tokens are cut into consecutive windows of `--window` tokens, each
scored from an empty cache; perplexity is exp of the mean negative log-likelihood of every token but the first of
each window. An artefact runs in its engine, a checkpoint folder in transformers.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tvm_sparse.command_line import CommandParser
from tvm_sparse.errors import Refusal, run_command
from tvm_sparse.progress import bar

Score = Callable[[list[int]], np.ndarray]


@dataclass(frozen=True)
class Evaluation:
    """One model on one text. `loss` is the mean negative log-likelihood in nats a token."""

    model: str
    perplexity: float
    loss: float
    tokens: int


def main(argv: Sequence[str]) -> None:
    parser = CommandParser("evaluate", "Perplexity of an artefact (engine) or a checkpoint folder (transformers).")
    parser.add_argument("model", type=Path, help="an artefact or a checkpoint folder")
    parser.add_argument("--text", type=Path, required=True, help="a UTF-8 text file")
    parser.add_argument("--against", type=Path, help="another artefact or checkpoint folder")
    parser.add_argument("--window", type=int, default=512, help="tokens scored together, from an empty cache")
    parser.add_argument("--max-tokens", type=int, help="stop after so many tokens of the text")
    parser.add_argument("--device", default="cpu", help="cpu or cuda:0")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="of transformers (default: the checkpoint's)")
    parser.add_argument("--format", default="text", choices=("text", "json"))
    args = parser.parse_args(argv)
    if args.window < 2:
        raise Refusal(f"--window {args.window} scores nothing: give at least 2 tokens")
    text = _read(args.text)

    results = [
        evaluate(folder, text, args.window, args.max_tokens, args.device, args.dtype)
        for folder in (args.model, args.against)
        if folder is not None
    ]
    protocol = {
        "text": str(args.text),
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
        "window": args.window,
        "stride": args.window,
        "max_tokens": args.max_tokens,
    }
    if args.format == "json":
        print(json.dumps({"protocol": protocol, "results": [asdict(result) for result in results]}, indent=2))
        return
    for result in results:
        print(f"{result.model}: perplexity {result.perplexity:.4f} (loss {result.loss:.5f}, {result.tokens} tokens)")
    if len(results) == 2:
        print(f"ratio {results[0].perplexity / results[1].perplexity:.4f}")
    print(f"protocol: windows of {args.window}, stride {args.window}, text sha256 {protocol['sha256'][:16]}")


def evaluate(
    folder: Path, text: str, window: int, max_tokens: int | None = None, device: str = "cpu", dtype: str | None = None
) -> Evaluation:
    """Perplexity of one model. Raises Refusal for a folder that is neither artefact nor checkpoint."""
    encode, score = _open(folder, window, device, dtype)
    ids = encode(text)[:max_tokens]
    windows = [ids[start : start + window] for start in range(0, len(ids), window)]
    windows = [part for part in windows if len(part) > 1]
    if not windows:
        raise Refusal("the text is too short to score: it needs at least two tokens")
    logps = np.concatenate([score(part) for part in bar(windows, len(windows), "window", f"score {folder}")])
    loss = -float(logps.astype(np.float64).mean())
    return Evaluation(str(folder), float(np.exp(loss)), loss, len(logps))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as bad:
        raise Refusal(f"cannot read --text {path}: {bad.strerror}") from bad
    except UnicodeDecodeError as bad:
        raise Refusal(f"--text {path} is not UTF-8 (byte {bad.start}): convert it first") from bad


def _open(folder: Path, window: int, device: str, dtype: str | None) -> tuple[Callable[[str], list[int]], Score]:
    if (folder / "tvm_sparse.json").exists():
        return _open_artefact(folder, window, device)
    if (folder / "config.json").exists():
        return _open_checkpoint(folder, device, dtype)
    raise Refusal(f"{folder} is neither an artefact (no tvm_sparse.json) nor a checkpoint (no config.json)")


def _open_artefact(folder: Path, window: int, device: str) -> tuple[Callable[[str], list[int]], Score]:
    from tvm_sparse.engine import Engine

    engine = Engine(folder, device=device, context=window)
    if engine.tokenizer is None:
        raise Refusal(f"{folder} has no tokenizer.json: build from a checkpoint that has one")

    def score(ids: list[int]) -> np.ndarray:
        engine.reset()
        return np.asarray(engine.score(ids))

    return engine.tokenizer.encode, score


def _open_checkpoint(folder: Path, device: str, dtype: str | None) -> tuple[Callable[[str], list[int]], Score]:
    import torch
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM

    if not (folder / "tokenizer.json").exists():
        raise Refusal(f"{folder} has no tokenizer.json: perplexity of a text needs one")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or "auto", local_files_only=True)
    model.to(device).eval()

    def score(ids: list[int]) -> np.ndarray:
        with torch.inference_mode():
            logits = model(torch.tensor([ids], device=device), use_cache=False).logits[0, :-1].float()
        targets = torch.tensor(ids[1:], device=device)
        return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0].cpu().numpy()

    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids, score


if __name__ == "__main__":
    sys.exit(run_command(main))
