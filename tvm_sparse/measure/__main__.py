"""`python -m tvm_sparse.measure --model DIR`: what is in the weights, as a table, JSON and a page with plots."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from tvm_sparse.artefact.writer import write_json
from tvm_sparse.checkpoint import model_config, open_checkpoint
from tvm_sparse.command_line import CommandParser
from tvm_sparse.errors import Refusal, run_command
from tvm_sparse.measure.figures import Asked
from tvm_sparse.measure.outputs import check, output_similarity, read_text
from tvm_sparse.measure.page import write_page
from tvm_sparse.measure.report import measure, readable
from tvm_sparse.measure.tables import terminal

THRESHOLDS = "0.001,0.005,0.01,0.02"
SPARSITIES = "0.5,0.6,0.75,0.9"


def main(argv: Sequence[str]) -> None:
    parser = CommandParser("measure", "Magnitudes, achievable sparsity, zero blocks and layer similarity of weights.")
    add = parser.add_argument
    add("--model", required=True, help="local folder, hub id or registered name")
    add("--weights", default="auto", help="auto, a folder, a hub id, or synthetic")
    add("--thresholds", default=THRESHOLDS, help="comma list of magnitudes: the share of weights under each")
    add("--sparsities", default=SPARSITIES, help="comma list in (0, 1): threshold, error, zero blocks, bytes at each")
    add("--out", type=Path, help="folder of measure.json and measure.html (default dist/MODEL-measure)")
    add("--text", type=Path, help="a UTF-8 text: similarity of the layers' outputs on it, for models that fit here")
    add("--max-tokens", type=int, default=2048, help="of --text")
    add("--seed", type=int, default=0, help="of synthetic weights")
    args = parser.parse_args(argv)
    asked = Asked(
        thresholds=numbers("--thresholds", args.thresholds, below=float("inf")),
        sparsities=numbers("--sparsities", args.sparsities, below=1.0),
    )
    if args.max_tokens < 1:
        raise Refusal(f"--max-tokens {args.max_tokens} must be at least 1")
    text = read_text(args.text) if args.text else None
    out = args.out or Path("dist") / f"{args.model.rstrip('/').rsplit('/', 1)[-1].lower()}-measure"
    if out.exists() and not out.is_dir():
        raise Refusal(f"{out} is a file: give --out a folder")

    checkpoint = open_checkpoint(args.weights, model_config(args.model), model=args.model, seed=args.seed)
    readable(checkpoint)
    folder = check(checkpoint) if text is not None else None
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as bad:
        raise Refusal(f"cannot make --out {out}: {bad.strerror}") from bad

    report = measure(checkpoint, args.model, asked)
    if folder is not None and text is not None:
        report["outputs"] = output_similarity(folder, text, args.max_tokens)
    print(terminal(report))
    write_json(out / "measure.json", report)
    write_page(out / "measure.html", report)
    print(f"\n{out / 'measure.html'}\n{out / 'measure.json'}")


def numbers(flag: str, text: str, below: float) -> tuple[float, ...]:
    """Reads a comma list of numbers in (0, `below`), ascending, each once. Raises Refusal."""
    try:
        found = {float(part) for part in text.split(",")}
    except ValueError:
        raise Refusal(f"{flag} {text!r} is not a comma list of numbers: write 0.5,0.75") from None
    for number in found:
        if not 0 < number < below:
            raise Refusal(f"{flag}: {number:g} is not between 0 and {below:g}")
    return tuple(sorted(found))


if __name__ == "__main__":
    sys.exit(run_command(main))
