"""`python -m tvm_sparse.generate OUT --prompt "..."`: streams text, then prints how fast it came."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tvm_sparse.command_line import CommandParser
from tvm_sparse.engine import Engine
from tvm_sparse.errors import Refusal, run_command


def main(argv: Sequence[str]) -> None:
    parser = CommandParser("generate", "Write on from a prompt with a built artefact.")
    add = parser.add_argument
    add("artefact", type=Path, metavar="OUT", help="the folder that build wrote")
    add("--prompt", required=True, help="text to go on from; with --chat, what the user says")
    add("--chat", action="store_true", help="put the prompt into the checkpoint's chat template")
    add("--max-new-tokens", type=int, default=128)
    add("--temperature", type=float, default=0.0, help="0 is greedy")
    add("--top-k", type=int, default=0, help="0 keeps every token")
    add("--top-p", type=float, default=1.0, help="1 keeps every token")
    add("--seed", type=int, default=0)
    add("--device", default="cpu", help="cpu or cuda:0")
    add("--context", type=int, help="tokens the caches hold (default: what it was built for)")
    args = parser.parse_args(argv)
    if args.max_new_tokens < 1:
        raise Refusal(f"--max-new-tokens {args.max_new_tokens} writes nothing: give at least 1")

    engine = Engine(args.artefact, device=args.device, context=args.context)
    if engine.tokenizer is None:
        raise Refusal(f"{args.artefact} has no tokenizer.json: build from a checkpoint that has one")
    prompt = engine.tokenizer.chat([{"role": "user", "content": args.prompt}]) if args.chat else args.prompt
    ids = engine.tokenizer.encode(prompt)
    clock = _Clock()
    tokens = engine.generate(ids, args.max_new_tokens, args.temperature, args.top_k, args.top_p, args.seed)
    for piece in engine.tokenizer.stream(clock.count(tokens)):
        print(piece, end="", flush=True)
    print()
    if engine.synthetic:
        print("[synthetic weights: the text means nothing]", file=sys.stderr)
    print(f"[{clock.report(len(ids))}]", file=sys.stderr)


class _Clock:
    """Counts tokens as they pass: the first comes with the prefill, the others with decoding."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._times: list[float] = []

    def count(self, tokens: Iterator[int]) -> Iterator[int]:
        for token in tokens:
            self._times.append(time.perf_counter())
            yield token

    def report(self, prompt: int) -> str:
        if not self._times:
            return f"prompt {prompt} tokens; the model ended at once"
        prefill = self._times[0] - self._start
        text = f"prompt {prompt} tokens, {prompt / prefill:.1f} tokens/s; {len(self._times)} new tokens"
        if len(self._times) > 1:
            text += f", {(len(self._times) - 1) / (self._times[-1] - self._times[0]):.1f} tokens/s"
        return text


if __name__ == "__main__":
    sys.exit(run_command(main))
