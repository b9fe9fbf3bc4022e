"""What the user asked of folding, as far as the command line alone can tell."""

from __future__ import annotations

from argparse import SUPPRESS, Namespace
from dataclasses import dataclass
from typing import Any

from tvm_sparse.command_line import CommandParser
from tvm_sparse.errors import Refusal
from tvm_sparse.folding.ranges import Range, parse_fold, parse_layers

THRESHOLD = 0.95
WEIGHTS = ("first", "mean", "best")
SAMPLES, LENGTH = 8, 256  # of calibration text: enough to compare layers, quick where a GPU is missing


@dataclass(frozen=True)
class FoldRequest:
    """`ranges` are those of `--fold`, None with `auto`; `layers` of `--layers`, None where it was not given."""

    auto: bool = False
    ranges: tuple[Range, ...] = ()
    layers: tuple[Range, ...] | None = None
    threshold: float = THRESHOLD
    weights: str = "first"
    text: str | None = None
    samples: int = SAMPLES
    length: int = LENGTH

    @property
    def off(self) -> bool:
        return not self.auto and not self.ranges and self.layers is None

    def to_json(self) -> dict[str, Any]:
        fold = "auto" if self.auto else ",".join(f"{start}:{stop}" for start, stop in self.ranges)
        layers = ",".join(f"{start}-{stop - 1}" for start, stop in self.layers or ())
        facts: dict[str, Any] = {"fold": fold or None, "layers": layers or None, "weights": self.weights}
        if self.auto:
            facts["threshold"] = self.threshold
        if self.text:
            facts["calibration"] = {"text": self.text, "samples": self.samples, "length": self.length}
        return facts


def add_fold_flags(parser: CommandParser) -> None:
    def add(flag: str, **options: Any) -> None:
        parser.add_argument(flag, default=SUPPRESS, **options)

    add("--fold", metavar="auto|A:B", help="layers A to B - 1 become one of each kind (a comma list of ranges); "
        "auto: neighbours that are alike do")  # fmt: skip
    add("--fold-threshold", type=float, metavar="COSINE", help=f"how alike, for auto (default: {THRESHOLD})")
    add("--fold-weights", choices=WEIGHTS, help="whose weights stay: the first layer's (default), the mean of all, or "
        "the best layer's on the calibration text")  # fmt: skip
    add("--calibration", metavar="FILE", help="text to compare layers on: a file, or OWNER/DATASET/FILE on the hub")
    add("--calibration-samples", type=int, metavar="N", help=f"sequences of it (default: {SAMPLES})")
    add("--calibration-length", type=int, metavar="N", help=f"tokens in each (default: {LENGTH})")
    add("--layers", metavar="A-B,C-D", help="run these layers, in this order, repeats allowed; both ends included "
        "(default: all, once)")  # fmt: skip


def read_fold_flags(args: Namespace) -> FoldRequest:
    """Raises Refusal for what contradicts itself, and for flags that would change nothing."""
    given = vars(args)
    fold, text, weights = given.get("fold"), given.get("calibration"), given.get("fold_weights", WEIGHTS[0])
    auto, best, threshold = fold == "auto", weights == "best", given.get("fold_threshold", THRESHOLD)
    if fold is None and "fold_weights" in given:
        raise Refusal("--fold-weights without --fold: say which layers become one, --fold 8:24 or --fold auto")
    if not auto and "fold_threshold" in given:
        raise Refusal("--fold-threshold is for --fold auto: leave it out, or fold auto")
    if not 0 < threshold <= 1:
        raise Refusal(f"--fold-threshold {threshold:g} is outside (0, 1]: 0.95 folds layers that are nearly equal")
    if best and text is None:
        raise Refusal("--fold-weights best tries layers on a text: pass --calibration FILE (not the text you judge on)")
    if text is not None and not (auto or best):
        raise Refusal("--calibration is for --fold auto and --fold-weights best: leave it out, or ask for one of them")
    for flag in ("calibration_samples", "calibration_length"):
        said = f"--{flag.replace('_', '-')}"
        if flag in given and text is None:
            raise Refusal(f"{said} without --calibration: pass a text, or leave it out")
        if given.get(flag, 1) < 1:
            raise Refusal(f"{said} {given[flag]} must be at least 1")
    return FoldRequest(
        auto=auto,
        ranges=parse_fold(fold) if fold is not None and not auto else (),
        layers=parse_layers(given["layers"]) if "layers" in given else None,
        threshold=threshold,
        weights=weights,
        text=text,
        samples=given.get("calibration_samples", SAMPLES),
        length=given.get("calibration_length", LENGTH),
    )
