"""Text in and out: the checkpoint's own tokenizer, its chat template, and streaming that never splits a character."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tvm_sparse.errors import Refusal

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class TextTokenizer:
    """The tokenizer of an artefact; `encode` adds no special tokens, `decode` leaves them out."""

    def __init__(self, folder: Path) -> None:
        """Raises Refusal where the file is damaged or the tokenizers package is missing."""
        try:
            from tokenizers import Tokenizer
        except ImportError as missing:
            raise Refusal("text needs the tokenizers package: pip install tokenizers, or give token ids") from missing
        self._folder = folder
        try:
            self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as bad:  # tokenizers raises Exception itself
            raise Refusal(f"{folder / 'tokenizer.json'} cannot be read ({bad}): copy the checkpoint's own") from bad

    @staticmethod
    def find(folder: Path) -> TextTokenizer | None:
        return TextTokenizer(folder) if (folder / "tokenizer.json").exists() else None

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Pieces of text as ids arrive; joined they are `decode` of all ids.

        A token may end inside a UTF-8 character, and how a token reads can depend on the one before: a piece is
        given once its text no longer ends in an incomplete character, decoded together with the piece before it.
        """
        seen: list[int] = []
        start = done = 0  # of the piece before, of this piece
        for token in ids:
            seen.append(token)
            before, now = self.decode(seen[start:done]), self.decode(seen[start:])
            if len(now) > len(before) and not now.endswith(_INCOMPLETE):
                yield now[len(before) :]
                start, done = done, len(seen)
        rest = self.decode(seen[start:])[len(self.decode(seen[start:done])) :]
        if rest:
            yield rest

    def chat(self, messages: list[dict[str, str]], **options: Any) -> str:
        """The checkpoint's chat template over [{"role", "content"}], ready for the model's turn.

        Raises Refusal without a template or without jinja2.
        """
        template = self._template()
        try:
            from jinja2.ext import loopcontrols
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ImportError as missing:
            raise Refusal("--chat needs jinja2: pip install jinja2") from missing
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.globals["raise_exception"] = _raise
        environment.filters["tojson"] = lambda value, **kwargs: json.dumps(value, ensure_ascii=False, **kwargs)
        compiled = environment.from_string(template)
        return compiled.render(messages=messages, add_generation_prompt=True, **self._special(), **options)

    def _template(self) -> str:
        alone = self._folder / "chat_template.jinja"
        if alone.exists():
            return alone.read_text(encoding="utf-8")
        found = self._config().get("chat_template")
        if isinstance(found, list):  # several, by name
            found = {each["name"]: each["template"] for each in found}.get("default")
        if not found:
            raise Refusal(f"{self._folder} has no chat template: leave --chat out, or build from a chat checkpoint")
        return found

    def _config(self) -> dict[str, Any]:
        path = self._folder / "tokenizer_config.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def _special(self) -> dict[str, str]:
        """bos_token, eos_token, ... as templates name them."""
        found = {}
        for key, value in self._config().items():
            text = value.get("content") if isinstance(value, dict) else value
            if key.endswith("_token") and isinstance(text, str):
                found[key] = text
        return found


def _raise(message: str) -> None:
    raise Refusal(f"chat template: {message}")
