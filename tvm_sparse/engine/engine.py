"""Engine: an artefact made to run. It owns every buffer; the library gets them as arguments, updates them in place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from tvm_sparse.artefact.reader import LIBRARY, open_artefact, read_facts
from tvm_sparse.engine.capture import CapturedStep, one_ahead
from tvm_sparse.engine.memory import kept_on_host, plan_memory
from tvm_sparse.engine.runtime import Device
from tvm_sparse.engine.sampling import Sampling
from tvm_sparse.engine.text import TextTokenizer
from tvm_sparse.engine.weights import StoredWeights, Weights
from tvm_sparse.errors import Refusal

_WARM_UP = 2  # decode steps before one is captured: kernels are loaded and the pool is filled


class Engine:
    """Prefill, decode, score and generate with one artefact on one device.

    An artefact built for a batch of B decodes B sequences together. With B = 1 ids are lists and results are
    [vocab]; else ids are B lists (or B ids) and results [B, vocab].

    `position` counts the tokens that are in the caches: calls go on from there, `reset` starts again.
    """

    def __init__(
        self,
        folder: str | Path,
        device: str = "cpu",
        batch: int | None = None,
        context: int | None = None,
        verify: bool = False,
        weights: Weights | None = None,
    ) -> None:
        """Loads an artefact. `context`, at most the one it was built for, sizes the caches; `verify`
        compares the hash of every packed buffer first; `weights` stand in for the artefact's own.

        Raises Refusal where folder, versions, device, batch, context or memory do not fit.
        """
        self._folder = Path(folder)
        weights = weights or StoredWeights(open_artefact(folder, device, verify))
        self._facts = facts = read_facts(folder, device)
        self.config: dict[str, Any] = facts["config"]
        self.vocab_size: int = self.config["vocab_size"]
        self.eos_token_ids: tuple[int, ...] = tuple(facts["eos_token_ids"])
        self.batch: int = facts["batch"]
        self.context: int = context or facts["context"]
        self._check(batch)

        self._device = Device(device)
        self.memory = plan_memory(facts, {name: weights.nbytes(name) for name in facts["params"]}, self.context)
        self.memory.require(self._device.free_memory() + weights.resident, device, folder)
        self._vm = vm = self._device.load_vm(self._folder / LIBRARY)
        self._prefill, self._decode, self._score = vm["prefill"], vm["decode"], vm["score"]
        self._pick = vm["pick"] if self._device.kind == "cuda" else None
        on_host = kept_on_host(facts)
        params = [weights.tensor(name, self._device, name in on_host) for name in facts["params"]]
        self._params = self._device.array(params)
        self._state_tensors = [
            self._device.zeros(tuple(self.context if d == "context" else d for d in each["shape"]), each["dtype"])
            for each in facts["state"]
        ]
        self._transient = [each["name"].endswith("_state") for each in facts["state"]]
        self._state = self._device.array(self._state_tensors)
        self._slot = self._device.zeros((1,), "int32")
        self._position = self._device.zeros((self.batch,), "int32")
        self._step_ids = self._device.zeros((self.batch,), "int32")
        self._scale = self._device.zeros((1,), "float32")
        self._positions = [0] * self.batch
        self._steps = 0
        self._captured: CapturedStep | None = None

    @property
    def position(self) -> int | list[int]:
        """Tokens in the caches; a list where the batch is larger than 1."""
        return self._positions[0] if self.batch == 1 else list(self._positions)

    @cached_property
    def tokenizer(self) -> TextTokenizer | None:
        """The checkpoint's tokenizer; None where it had none: the engine then works on ids."""
        return TextTokenizer.find(self._folder)

    @property
    def synthetic(self) -> bool:
        """Whether the weights are random numbers, made for measuring."""
        return self._facts.get("weights", {}).get("kind") == "synthetic"

    @property
    def device(self) -> str:
        """What the model runs on: `cpu` or `cuda`."""
        return self._device.kind

    @property
    def state(self) -> dict[str, Any]:
        """Caches and states as they stand on the device, by name."""
        return {each["name"]: tensor for each, tensor in zip(self._facts["state"], self._state_tensors, strict=True)}

    def seek(self, position: int) -> None:
        """Goes on as if every sequence held `position` tokens, whatever the caches hold: for measuring at a depth."""
        if not 0 <= position <= self.context:
            raise Refusal(f"position {position} is over the context of {self.context}: build with a larger --context")
        self._positions = [position] * self.batch
        self._device.upload(self._position, np.array(self._positions, np.int32))

    def reset(self) -> None:
        """Forgets every sequence. Attention caches keep their bytes: nothing reads past the position."""
        for tensor, transient in zip(self._state_tensors, self._transient, strict=True):
            if transient:
                self._device.clear(tensor)
        self._device.clear(self._position)
        self._positions = [0] * self.batch

    def refill(self, slot: int, ids: Sequence[int]) -> np.ndarray:
        """A new sequence in one slot, the others as they are; float32 logits [vocab] after its last token."""
        if not 0 <= slot < self.batch:
            raise Refusal(f"no slot {slot} in a batch of {self.batch}: slots are 0 to {self.batch - 1}")
        self._require_room(slot, ids, held=0)
        for tensor, transient in zip(self._state_tensors, self._transient, strict=True):
            if transient:
                self._device.clear(tensor, slot)
        self._positions[slot] = 0
        self._device.upload(self._position, np.array(self._positions, np.int32))
        return self._prefill_slot(slot, ids)

    def prefill(self, ids: Sequence[int] | Sequence[Sequence[int]]) -> np.ndarray:
        """Puts tokens into the caches; float32 logits [vocab] (or [batch, vocab]) after the last of them."""
        rows = [self._prefill_slot(slot, each) for slot, each in enumerate(self._per_slot(ids))]
        return rows[0] if self.batch == 1 else np.stack(rows)

    def decode(self, ids: int | Sequence[int]) -> np.ndarray:
        """One token further in every sequence; float32 logits [vocab] (or [batch, vocab])."""
        tokens = [ids] if isinstance(ids, int | np.integer) else list(ids)
        if len(tokens) != self.batch:
            raise Refusal(f"decode got {len(tokens)} ids for a batch of {self.batch}: give one for each sequence")
        for slot in range(self.batch):
            self._require_room(slot, tokens[slot : slot + 1])
        self._device.upload(self._step_ids, np.array(tokens, np.int32))
        logits = self._device.download(self._decode_step())
        return logits[0] if self.batch == 1 else logits

    def advance(self, count: int) -> None:
        """`count` decode steps as greedy generation takes them, but that on a CPU every token is the same: for
        measuring."""
        for slot in range(self.batch):
            self._require_room(slot, [0] * count)
        for _ in self._likeliest(count) if self._pick else (self._decode_step() for _ in range(count)):
            pass

    def score(self, ids: Sequence[int] | Sequence[Sequence[int]]) -> np.ndarray | list[np.ndarray]:
        """float32 [n - 1]: the log-probability of each token after the first (a list of them for a batch).

        All but the last token enter the caches.
        """
        rows = [self._score_slot(slot, each) for slot, each in enumerate(self._per_slot(ids))]
        return rows[0] if self.batch == 1 else rows

    def generate(
        self,
        prompt: str | Sequence[int],
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> Iterator[Any]:
        """Starts again and writes on from `prompt`: pieces of text for a text, ids for ids.

        Ends after `max_new_tokens`, at an end-of-text id (not given out) or where the context is full. The same
        seed gives the same text. Raises Refusal for a prompt longer than the context and for a batch above 1.
        """
        if self.batch != 1:
            raise Refusal(f"generate writes one sequence, this artefact decodes {self.batch}: use prefill and decode")
        sampling = Sampling(temperature, top_k, top_p)
        if not isinstance(prompt, str):
            return self._new_ids(list(prompt), max_new_tokens, sampling, seed)
        if self.tokenizer is None:
            raise Refusal(f"{self._folder} has no tokenizer.json: give token ids instead of text")
        ids = self.tokenizer.encode(prompt)
        return self.tokenizer.stream(self._new_ids(ids, max_new_tokens, sampling, seed))

    def _new_ids(self, ids: list[int], count: int, sampling: Sampling, seed: int) -> Iterator[int]:
        self.reset()
        random = np.random.default_rng(seed)
        first = sampling.choose(self.prefill(ids), random)
        steps = min(count - 1, self.context - self._positions[0])
        for token in chain([first][:count], self._following(first, steps, sampling, random)):
            if token in self.eos_token_ids:
                return
            yield token

    def _following(self, token: int, steps: int, sampling: Sampling, random: np.random.Generator) -> Iterator[int]:
        """The tokens after `token`. From a GPU come four bytes, or the largest logits where they are enough."""
        if self._pick is not None and sampling.temperature == 0:
            self._device.upload(self._step_ids, np.array([token], np.int32))
            yield from (int(ids[0]) for ids in self._likeliest(steps))
            return
        for _ in range(steps):
            self._device.upload(self._step_ids, np.array([token], np.int32))
            logits = self._decode_step()
            token = self._drawn(logits, sampling, random)
            yield token

    def _drawn(self, logits: Any, sampling: Sampling, random: np.random.Generator) -> int:
        if self._pick is not None:
            self._device.upload(self._scale, np.array([1 / sampling.temperature], np.float32))
            found = self._vm["candidates"](logits, self._scale)
            values, ids, log_sum = (self._device.download(each)[0] for each in found)
            chosen = sampling.choose_among(values, ids, float(log_sum), random)
            if chosen is not None:
                return chosen
        return sampling.choose(self._device.download(logits)[0], random)

    def _likeliest(self, count: int) -> Iterator[np.ndarray]:
        """`count` steps on a GPU from the ids in _step_ids, each with the likeliest tokens of the one before.

        Gives those tokens, int32 [batch], each while the step after it runs already. A caller who leaves earlier has
        that step's tokens in the caches too.
        """
        while self._captured is None and count > 0:
            self._decode_step()
            count -= 1
            yield self._device.download(self._step_ids)
        step = self._captured
        if step is None:
            return

        def start() -> None:
            self._positions = [position + 1 for position in self._positions]
            step.start()

        try:
            yield from one_ahead(start, step.read, count)
        finally:
            step.wait()

    def _prefill_slot(self, slot: int, ids: Sequence[int]) -> np.ndarray:
        self._require_room(slot, ids)
        chunk = self._facts["prefill_chunk"]
        self._device.upload(self._slot, np.array([slot], np.int32))
        for start in range(0, len(ids), chunk):
            tokens = self._ids(ids[start : start + chunk])
            logits = self._prefill(tokens, self._slot, self._position, self._state, self._params)
            self._positions[slot] += len(ids[start : start + chunk])
        return self._device.download(logits)[0]

    def _score_slot(self, slot: int, ids: Sequence[int]) -> np.ndarray:
        if len(ids) < 2:
            raise Refusal(f"score got {len(ids)} tokens: it needs two at least")
        inputs, targets = ids[:-1], ids[1:]
        self._require_room(slot, inputs)
        self._require_known(targets)
        chunk = self._facts["score_chunk"]
        self._device.upload(self._slot, np.array([slot], np.int32))
        found = []
        for start in range(0, len(inputs), chunk):
            part, wanted = (self._ids(each[start : start + chunk]) for each in (inputs, targets))
            logps = self._score(part, self._slot, self._position, wanted, self._state, self._params)
            found.append(self._device.download(logps))
            self._positions[slot] += len(found[-1])
        return np.concatenate(found)

    def _decode_step(self) -> Any:
        self._positions = [position + 1 for position in self._positions]
        if self._captured is not None:
            return self._captured()
        if self._device.kind == "cuda" and self._steps == _WARM_UP:
            self._captured = CapturedStep(self._device, self._call_decode, self._step_ids)
            return self._captured()
        self._steps += 1
        return self._call_decode()

    def _call_decode(self) -> Any:
        """Logits on the device; on a GPU the ids of the next step are the likeliest ones already."""
        logits = self._decode(self._step_ids, self._slot, self._position, self._state, self._params)
        if self._pick is not None:
            self._pick(logits, self._step_ids)
        return logits

    def _per_slot(self, ids: Sequence[int] | Sequence[Sequence[int]]) -> list[Sequence[int]]:
        rows: list = [ids] if self.batch == 1 else list(ids)
        if len(rows) != self.batch:
            raise Refusal(f"{len(rows)} sequences for a batch of {self.batch}: give a list of ids for each")
        return rows

    def _ids(self, ids: Sequence[int]) -> Any:
        tensor = self._device.empty((len(ids),), "int32")
        self._device.upload(tensor, np.array(ids, np.int32))
        return tensor

    def _require_room(self, slot: int, ids: Sequence[int], held: int | None = None) -> None:
        if not len(ids):
            raise Refusal("no tokens given: a prompt needs at least one")
        held = self._positions[slot] if held is None else held
        if held + len(ids) > self.context:
            after = f" after {held} tokens" if held else ""
            raise Refusal(
                f"a prompt of {len(ids)} tokens{after} does not fit the context of {self.context}: "
                "shorten it, or build with a larger --context"
            )
        self._require_known(ids)

    def _require_known(self, ids: Sequence[int]) -> None:
        for token in ids:
            if not 0 <= token < self.vocab_size:
                raise Refusal(f"token id {token} is outside the vocabulary of {self.vocab_size}")

    def _check(self, batch: int | None) -> None:
        folder, longest = self._folder, self._facts["context"]
        if batch not in (None, self.batch):
            raise Refusal(f"{folder} decodes a batch of {self.batch}, not {batch}: build with --batch {batch}")
        if not 0 < self.context <= longest:
            raise Refusal(f"{folder} was built for a context of {longest}, not {self.context}: build with --context")
