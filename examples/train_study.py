"""Train the dense model of the quality study: a Qwen3.5 of 15.8 million parameters on software documentation.

The text is prose out of Debian 12's documentation packages: paragraphs, headings and list items of their HTML, no
code and no tables, every paragraph once. One document is one page; held-out pages take no part in training.

    apt-get download python3.11-doc debian-handbook postgresql-doc-15 debian-policy developers-reference \\
        debian-reference-en python-django-doc python-sqlalchemy-doc sphinx-doc exim4-doc-html sqlite3-doc \\
        linux-doc-6.1 aptitude-doc-en git-doc docutils-doc
    for deb in *.deb; do dpkg -x $deb root; done
    python train_study.py prepare root --out text
    python train_study.py train text --out study --seconds 230

`prepare` writes tokens, tokenizer and the texts heldout.txt, calibration.txt and tuning.txt into `text/`; `train` takes
minutes on one GPU and writes the checkpoint into `study/`.
"""

from __future__ import annotations

import argparse
import copy
import csv
import math
import re
import time
import zlib
from collections.abc import Iterator
from html.parser import HTMLParser
from multiprocessing import Pool
from pathlib import Path

import numpy as np
import torch
from train_tiny import (
    END_OF_TEXT,
    add_dropout,
    encode,
    logits_of,
    make_model,
    make_optimizer,
    make_tokenizer,
    objective,
    replayed,
    save,
    windows,
)
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen3_5 import modeling_qwen3_5 as modeling

VOCABULARY = 4096
SIZES = {
    "hidden_size": 384,
    "intermediate_size": 896,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 12,
    "initializer_range": 0.03,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.25,
        "mrope_section": [3, 3, 2],
        "mrope_interleaved": True,
    },
}
# pages by the CRC of their path, in hundredths
HELD_OUT, VALIDATION, CALIBRATION, TUNING = range(2), range(2, 3), range(10, 13), range(20, 60)
OTHER_LANGUAGE = re.compile(r"(?!en)[a-z]{2}([-_][A-Za-z]{2,4})?")  # a folder such as de, pt-BR, zh_CN
TEXT_BYTES = {"heldout": 400_000, "calibration": 1_500_000, "tuning": 9_500_000}


# ---------------------------------------------------------------------------------------------
# Text


class Prose(HTMLParser):
    """Collects the paragraphs of a page; what stands in code, tables and navigation is left out."""

    BLOCKS = frozenset({"p", "li", "dd", "dt", "h1", "h2", "h3", "h4", "h5", "h6", "div", "section", "body"})
    SKIPPED = frozenset({"script", "style", "nav", "pre", "table", "footer", "head", "header", "form"})

    def __init__(self) -> None:
        super().__init__()
        self.paragraphs: list[str] = []
        self._words: list[str] = []
        self._skipping = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._skipping += tag in self.SKIPPED
        if tag in self.BLOCKS:
            self.flush()

    def handle_endtag(self, tag: str) -> None:
        self._skipping = max(self._skipping - (tag in self.SKIPPED), 0)
        if tag in self.BLOCKS:
            self.flush()

    def handle_data(self, data: str) -> None:
        if not self._skipping:
            self._words.append(data)

    def flush(self) -> None:
        text = " ".join("".join(self._words).replace("¶", "").split())
        if text:
            self.paragraphs.append(text)
        self._words.clear()


def paragraphs(page: Path) -> list[str]:
    prose = Prose()
    prose.feed(page.read_text(encoding="utf-8", errors="replace"))
    prose.flush()
    return prose.paragraphs


def documents(root: Path) -> Iterator[tuple[int, str]]:
    """Each page with some prose as (CRC of its path, text); a paragraph that an earlier page had is left out."""
    pages = sorted(
        page
        for page in root.rglob("*")
        if page.suffix == ".html"
        and page.is_file()
        and not page.is_symlink()
        and not any(OTHER_LANGUAGE.fullmatch(part) for part in page.parts)
    )
    seen: set[int] = set()
    with Pool() as pool:
        for page, found in zip(pages, pool.imap(paragraphs, pages, chunksize=32), strict=True):
            fresh = []
            for text in found:
                known = hash(text)
                if known not in seen and text.count(" ") >= 3:
                    fresh.append(text)
                seen.add(known)
            if sum(map(len, fresh)) >= 500:
                yield zlib.crc32(str(page.relative_to(root)).encode()), END_OF_TEXT + "\n".join(fresh) + "\n"


def prepare(options: argparse.Namespace) -> None:
    pages = [(crc % 100, text) for crc, text in sorted(documents(options.root))]  # shuffled by the CRC
    options.out.mkdir(parents=True, exist_ok=True)
    texts = {
        "training": "".join(text for part, text in pages if part not in (*HELD_OUT, *VALIDATION)),
        "validation": "".join(text for part, text in pages if part in VALIDATION),
        "heldout": "".join(text for part, text in pages if part in HELD_OUT),
        "calibration": "".join(text for part, text in pages if part in CALIBRATION),
        "tuning": "".join(text for part, text in pages if part in TUNING),
    }
    print(len(pages), "pages;", *(f"{name} {len(text):,}" for name, text in texts.items()), flush=True)
    for name, size in TEXT_BYTES.items():
        (options.out / f"{name}.txt").write_text(texts[name][:size], encoding="utf-8")
    tokenizer = make_tokenizer(texts["training"], VOCABULARY)
    tokenizer.save_pretrained(options.out / "tokenizer")
    for name in ("training", "validation"):
        parts = texts[name].split(END_OF_TEXT)[1:]
        streams = [encode(tokenizer, END_OF_TEXT + part) for part in parts]
        ids = torch.cat(streams).numpy().astype("<u2")
        ids.tofile(options.out / f"{name}.bin")
        print(name, f"{len(ids):,} tokens", flush=True)


# ---------------------------------------------------------------------------------------------
# Training


def train(options: argparse.Namespace) -> None:
    """Trains for `--seconds` of wall clock; the checkpoint is written at every check that finds it better."""
    began = time.monotonic()
    device = torch.device(options.device)
    torch.backends.cuda.matmul.allow_tf32 = True
    # the recurrence stays float32, as its state is when the model runs
    modeling.torch_chunk_gated_delta_rule = torch.autocast(device.type, enabled=False)(
        modeling.torch_chunk_gated_delta_rule
    )
    tokenizer = PreTrainedTokenizerFast.from_pretrained(options.text / "tokenizer")
    training, validation = (
        torch.from_numpy(np.fromfile(options.text / f"{name}.bin", "<u2").astype(np.int64)).to(device)
        for name in ("training", "validation")
    )
    torch.manual_seed(options.seed)
    model = make_model(tokenizer, **SIZES).to(device)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(training):,} tokens", flush=True)
    add_dropout(model, options.dropout)
    optimizer = make_optimizer(model, options.decay)
    starts = torch.zeros(options.batch, dtype=torch.long, device=device)
    offsets = torch.arange(options.length + 1, device=device)
    unseen = validation.unfold(0, options.length + 1, options.length)[: options.windows]

    def loss_of(ids: torch.Tensor) -> torch.Tensor:
        # without its cache of cast weights: a captured graph must cast anew at every step
        with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
            return objective(logits_of(model, ids[:, :-1]).float(), ids[:, 1:].flatten(), None)

    def step() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(training[starts[:, None] + offsets])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.detach()

    model.train()
    batches = windows(len(training), options.length, options.batch, options.seed)
    starts.copy_(next(batches))
    advance = replayed(step) if device.type == "cuda" and options.graph else step
    options.out.mkdir(parents=True, exist_ok=True)
    print(f"set up in {time.monotonic() - began:.0f} s", flush=True)
    best, steps, last = math.inf, 0, time.monotonic()
    curve = csv.writer((options.out / "loss.csv").open("w", newline=""))
    curve.writerow(["seconds", "step", "training", "validation"])
    while True:
        share = min((time.monotonic() - began) / options.seconds, 1.0)
        rate = options.rate * min((steps + 1) / options.warmup, (1 - share) / 0.9, 1.0)
        for group in optimizer.param_groups:
            group["lr"].fill_(rate)
        starts.copy_(next(batches))
        loss = float(advance())
        steps += 1
        done = share == 1.0 or steps == options.steps
        if not done and time.monotonic() - last < options.check:
            continue
        model.eval()
        with torch.no_grad():
            checked = sum(float(loss_of(ids)) * len(ids) for ids in unseen.split(options.batch)) / len(unseen)
        model.train()
        last = time.monotonic()
        curve.writerow([round(last - began, 1), steps, round(loss, 4), round(checked, 4)])
        tokens = steps * options.batch * options.length
        print(
            f"{last - began:.0f} s step {steps} {tokens / 1e6:.1f}M tokens loss {loss:.4f} validation {checked:.4f}",
            flush=True,
        )
        if checked < best:
            best = checked
            plain = copy.deepcopy(model)
            for module in plain.modules():
                module._forward_hooks.clear()
            save(plain, tokenizer, options.out)
        if done:
            break
    print(f"best validation loss {best:.4f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("prepare", help="pages to tokens and texts")
    command.set_defaults(run=prepare)
    command.add_argument("root", type=Path, help="where the packages were unpacked")
    command.add_argument("--out", type=Path, required=True)
    command = commands.add_parser("train", help="tokens to a checkpoint")
    command.set_defaults(run=train)
    command.add_argument("text", type=Path, help="what `prepare` wrote")
    command.add_argument("--out", type=Path, required=True)
    command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    command.add_argument("--graph", action=argparse.BooleanOptionalAction, default=True)
    command.add_argument("--seconds", type=float, default=230.0, help="of wall clock, from the start to the last step")
    command.add_argument("--steps", type=int, default=0, help="stop earlier")
    command.add_argument("--batch", type=int, default=64, help="windows in a step")
    command.add_argument("--length", type=int, default=512, help="tokens in a window")
    command.add_argument("--rate", type=float, default=2e-3, help="highest learning rate")
    command.add_argument("--warmup", type=int, default=200, help="steps")
    command.add_argument("--decay", type=float, default=0.1, help="weight decay of the matrices")
    command.add_argument("--dropout", type=float, default=0.05)
    command.add_argument("--check", type=float, default=25.0, help="seconds between validations")
    command.add_argument("--windows", type=int, default=128, help="of the validation pages, for a check")
    command.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
