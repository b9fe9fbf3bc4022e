"""`python -m tvm_sparse.evaluate OUT --text FILE [--against OUT2|DIR]`: how well a model knows a text.

The protocol, the same for every model: the text's tokens are cut into consecutive windows of `--window` tokens, each
scored from an empty cache; perplexity is exp of the mean negative log-likelihood of every token but the first of
each window. With `--against`, the model to judge by (the dense one, say), also how far the two distributions are
apart at each of these tokens: the Kullback-Leibler divergence KL(against || model) in nats, and how often both hold the
same token for the likeliest.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from tvm_sparse.command_line import CommandParser
from tvm_sparse.errors import Refusal, run_command
from tvm_sparse.judges import Judge, open_judge
from tvm_sparse.progress import bar


@dataclass(frozen=True)
class Evaluation:
    """One model on one text. `loss` is the mean negative log-likelihood in nats a token."""

    model: str
    perplexity: float
    loss: float
    tokens: int


@dataclass(frozen=True)
class Comparison:
    """Two models on one text: mean KL(against || model) in nats with its standard error, and top-1 agreement."""

    divergence: float
    divergence_error: float
    same_top: float


def main(argv: Sequence[str]) -> None:
    parser = CommandParser("evaluate", "Perplexity of an artefact (engine) or a checkpoint folder (transformers).")
    parser.add_argument("model", type=Path, help="an artefact or a checkpoint folder")
    parser.add_argument("--text", type=Path, required=True, help="a UTF-8 text file")
    parser.add_argument("--against", type=Path, help="another artefact or checkpoint folder, to judge by")
    parser.add_argument("--window", type=int, default=512, help="tokens scored together, from an empty cache")
    parser.add_argument("--max-tokens", type=int, help="stop after so many tokens of the text")
    parser.add_argument("--device", default="cpu", help="cpu or cuda:0")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="of transformers (default: the checkpoint's)")
    parser.add_argument("--format", default="text", choices=("text", "json"))
    args = parser.parse_args(argv)
    if args.window < 2:
        raise Refusal(f"--window {args.window} scores nothing: give at least 2 tokens")
    text = _read(args.text)

    folders = [folder for folder in (args.model, args.against) if folder is not None]
    judges = [open_judge(folder, args.window, args.device, args.dtype) for folder in folders]
    windows = [_windows(judge, text, args.window, args.max_tokens) for judge in judges]
    results = [_evaluate(*each) for each in zip(map(str, folders), judges, windows, strict=True)]
    comparison = _compare(judges, windows) if len(judges) == 2 else None

    protocol = {
        "text": str(args.text),
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
        "window": args.window,
        "stride": args.window,
        "max_tokens": args.max_tokens,
    }
    if args.format == "json":
        found = {"protocol": protocol, "results": [asdict(result) for result in results]}
        print(json.dumps({**found, "comparison": asdict(comparison) if comparison else None}, indent=2))
        return
    for result in results:
        print(f"{result.model}: perplexity {result.perplexity:.4f} (loss {result.loss:.5f}, {result.tokens} tokens)")
    if comparison:
        print(f"perplexity ratio {results[0].perplexity / results[1].perplexity:.4f}")
        print(f"KL divergence {comparison.divergence:.5f} +- {comparison.divergence_error:.5f} nats a token")
        print(f"same likeliest token {comparison.same_top:.2%}")
    print(f"protocol: windows of {args.window}, stride {args.window}, text sha256 {protocol['sha256'][:16]}")


def evaluate(
    folder: Path, text: str, window: int, max_tokens: int | None = None, device: str = "cpu", dtype: str | None = None
) -> Evaluation:
    """Perplexity of one model. Raises Refusal for a folder that is neither artefact nor checkpoint."""
    judge = open_judge(folder, window, device, dtype)
    return _evaluate(str(folder), judge, _windows(judge, text, window, max_tokens))


def _evaluate(name: str, judge: Judge, windows: list[list[int]]) -> Evaluation:
    logps = np.concatenate([judge.score(part) for part in bar(windows, len(windows), "window", f"score {name}")])
    loss = -float(logps.astype(np.float64).mean())
    return Evaluation(name, float(np.exp(loss)), loss, len(logps))


def _compare(judges: list[Judge], windows: list[list[list[int]]]) -> Comparison:
    """Judges are the model and the one to judge by; raises Refusal where their tokens are not the same."""
    if windows[0] != windows[1]:
        raise Refusal("the two models cut the text into other tokens: distributions of one vocabulary are compared")
    divergences, same = [], []
    for ids in bar(windows[0], len(windows[0]), "window", "compare"):
        for ours, theirs in zip(*(judge.log_probs(ids) for judge in judges), strict=True):
            wide = theirs.astype(np.float64)
            divergences.append(float((np.exp(wide) * (wide - ours)).sum()))
            same.append(int(ours.argmax()) == int(theirs.argmax()))
    error = float(np.std(divergences) / len(divergences) ** 0.5)
    return Comparison(float(np.mean(divergences)), error, float(np.mean(same)))


def _windows(judge: Judge, text: str, window: int, max_tokens: int | None) -> list[list[int]]:
    ids = judge.encode(text)[:max_tokens]
    windows = [ids[start : start + window] for start in range(0, len(ids), window)]
    windows = [part for part in windows if len(part) > 1]
    if not windows:
        raise Refusal("the text is too short to score: it needs at least two tokens")
    return windows


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as bad:
        raise Refusal(f"cannot read --text {path}: {bad.strerror}") from bad
    except UnicodeDecodeError as bad:
        raise Refusal(f"--text {path} is not UTF-8 (byte {bad.start}): convert it first") from bad


if __name__ == "__main__":
    sys.exit(run_command(main))
