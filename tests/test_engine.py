"""The engine: refusals, sampling, streaming, and that it runs without torch and without TVM's compiler."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import deque

import numpy as np
import pytest
from tiny import random_model, write_dense_artefact
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tvm_sparse.engine import Engine
from tvm_sparse.engine.capture import CapturedStep
from tvm_sparse.engine.sampling import Sampling
from tvm_sparse.engine.text import TextTokenizer
from tvm_sparse.errors import Refusal

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


@pytest.fixture(scope="module")
def artefact(tmp_path_factory):
    """A dense model of random weights that writes single bytes: its tokenizer has no merges."""
    folder = write_dense_artefact(
        random_model(num_hidden_layers=4, vocab_size=256), tmp_path_factory.mktemp("artefact")
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE, "eos_token": "!"}))
    return folder


@pytest.fixture(scope="module")
def engine(artefact):
    return Engine(artefact)


def test_generate_is_what_decoding_by_hand_gives(engine):
    ids = [5, 6, 7]
    written = list(engine.generate(ids, max_new_tokens=8))
    engine.reset()
    token, expected = int(engine.prefill(ids).argmax()), []
    while len(expected) < 8 and token not in engine.eos_token_ids:
        expected.append(token)
        token = int(engine.decode(token).argmax())
    assert written == expected


def test_generate_ends_at_every_end_id_and_where_the_context_is_full(artefact):
    engine = Engine(artefact, context=10)
    assert len(list(engine.generate([5] * 10))) == 1  # the prefill's own token needs no room
    written = list(engine.generate([5, 6], max_new_tokens=4))
    assert len(written) == 4
    engine.eos_token_ids = (7, written[2])
    assert list(engine.generate([5, 6], max_new_tokens=4)) == written[: written.index(written[2])]


class StepsAhead(CapturedStep):
    """A captured step as a GPU replays it, on a CPU; `most` steps were under way and not read."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self.most = engine, 0
        self._left: deque[np.ndarray] = deque()

    def start(self) -> None:
        self._engine._call_decode()
        self._left.append(self._engine._device.download(self._engine._step_ids))
        self.most = max(self.most, len(self._left))

    def read(self) -> np.ndarray:
        return self._left.popleft()

    def wait(self) -> None:
        self._left.clear()


def ahead(artefact, context=None) -> tuple[Engine, StepsAhead]:
    """An engine that picks tokens on its device and runs a step ahead of the host."""
    engine = Engine(artefact, context=context)
    engine._pick = lambda logits, ids: engine._device.upload(
        ids, engine._device.download(logits).argmax(1).astype(np.int32)
    )
    engine._captured = steps = StepsAhead(engine)
    return engine, steps


def test_a_step_ahead_of_the_host_the_tokens_are_the_same(artefact, engine):
    written = list(engine.generate([5, 6, 7], max_new_tokens=12))
    gpu, steps = ahead(artefact)
    for count in (0, 1, 2, 3, 12):
        assert list(gpu.generate([5, 6, 7], max_new_tokens=count)) == written[:count]
        assert gpu.position == 3 + max(0, count - 1)
    assert steps.most == 2
    gpu.advance(5)
    assert gpu.position == 3 + 11 + 5
    full, _ = ahead(artefact, context=8)
    assert list(full.generate([5, 6, 7], max_new_tokens=12)) == written[:6] and full.position == 8


def test_a_step_too_many_behind_an_end_id_does_no_harm(artefact, engine):
    written = list(engine.generate([5, 6, 7], max_new_tokens=12))
    gpu, _ = ahead(artefact)
    gpu.eos_token_ids = (written[4],)
    at = written.index(written[4])
    assert list(gpu.generate([5, 6, 7], max_new_tokens=12)) == written[:at]
    assert gpu.position == 3 + at + 1  # the end id is in the caches: its step was under way
    gpu.eos_token_ids = ()
    assert list(gpu.generate([5, 6, 7], max_new_tokens=12)) == written


def test_same_seed_same_text_and_text_is_the_ids_decoded(engine):
    options = {"max_new_tokens": 24, "temperature": 1.5, "top_k": 50, "top_p": 0.95}
    ids = engine.tokenizer.encode("In the")
    first = list(engine.generate(ids, seed=3, **options))
    assert first == list(engine.generate(ids, seed=3, **options)) != list(engine.generate(ids, seed=4, **options))
    assert "".join(engine.generate("In the", seed=3, **options)) == engine.tokenizer.decode(first)


def test_two_runs_give_the_same_bits(engine):
    runs = []
    for _ in range(2):
        engine.reset()
        runs.append((engine.prefill(range(70)), engine.decode(3)))
    assert all((a == b).all() for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda e: e.prefill([1] * 300), "a prompt of 300 tokens does not fit the context of 256"),
        (lambda e: e.prefill([]), "no tokens"),
        (lambda e: e.prefill([256]), "token id 256 is outside the vocabulary of 256"),
        (lambda e: e.decode(-1), "token id -1"),
        (lambda e: e.score([1]), "needs two"),
        (lambda e: e.refill(1, [1]), "no slot 1 in a batch of 1"),
        (lambda e: e.generate([1], temperature=-1), "temperature -1"),
        (lambda e: e.generate([1], top_p=0), "top-p 0"),
    ],
)
def test_refusals(engine, call, message):
    engine.reset()
    with pytest.raises(Refusal, match=message):
        call(engine)
    assert engine.position == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device": "cuda:0"}, "built for cpu"),
        ({"device": "tpu"}, "tpu"),
        ({"batch": 2}, "--batch 2"),
        ({"context": 1000}, "context of 256"),
    ],
)
def test_what_an_artefact_is_not_for(artefact, arguments, message):
    with pytest.raises(Refusal, match=message):
        Engine(artefact, **arguments)


def test_sampling():
    logits = np.array([0.0, 3.0, 1.0, 3.0, -2.0], np.float32)
    random = np.random.default_rng(0)

    def drawn(**options):
        return {Sampling(**options).choose(logits, random) for _ in range(400)}

    assert drawn() == {1}
    assert drawn(temperature=1.0, top_k=2) == {1, 3}
    assert drawn(temperature=1.0, top_p=0.5) == {1, 3}
    assert drawn(temperature=1.0, top_p=0.01) == {1}
    assert drawn(temperature=5.0) == {0, 1, 2, 3, 4}
    counts = np.bincount([Sampling(1.0).choose(logits, random) for _ in range(20000)], minlength=5) / 20000
    assert np.abs(counts - np.exp(logits) / np.exp(logits).sum()).max() < 0.02


def test_sampling_from_the_largest_logits_is_sampling_from_all():
    logits = np.random.default_rng(1).standard_normal(500).astype(np.float32) * 3
    order = np.argsort(-logits, kind="stable")
    for options in ({"top_k": 20}, {"top_k": 64, "top_p": 0.9}, {"top_p": 0.5}, {"top_k": 65}, {"top_p": 1.0}):
        sampling = Sampling(1.3, **options)
        log_sum = np.log(np.exp(logits.astype(np.float64) / 1.3).sum())
        few, all_of_them = np.random.default_rng(2), np.random.default_rng(2)
        for _ in range(50):
            found = sampling.choose_among(logits[order[:64]], order[:64], log_sum, few)
            if found is None:  # too few: nothing was drawn
                assert options in ({"top_k": 65}, {"top_p": 1.0})
                break
            assert found == sampling.choose(logits, all_of_them)


def test_streaming_never_splits_a_character(artefact):
    tokenizer = TextTokenizer(artefact)
    text = "Noé saw 🌈 and 水"
    ids = tokenizer.encode(text)
    assert len(ids) == len(text.encode())
    pieces = list(tokenizer.stream(ids))
    assert "".join(pieces) == text and len(pieces) == len(text)
    assert "".join(tokenizer.stream(ids[:-1])) == tokenizer.decode(ids[:-1])  # an end inside a character is not lost


def test_chat_template(artefact, tmp_path):
    assert TextTokenizer(artefact).chat([{"role": "user", "content": "hi"}]) == "<user>hi<a>"
    (tmp_path / "tokenizer.json").write_text((artefact / "tokenizer.json").read_text())
    with pytest.raises(Refusal, match="chat template"):
        TextTokenizer(tmp_path).chat([])
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(Refusal, match="cannot be read"):
        TextTokenizer(tmp_path)


ALONE = """
import sys
sys.modules["torch"] = None  # an import of torch raises
from tvm_sparse.engine import Engine
from tvm_sparse.engine.capture import CapturedStep
engine = Engine(sys.argv[1])
print("".join(engine.generate("In", max_new_tokens=3)))
loaded = open("/proc/self/maps").read()
assert "libtvm_runtime.so" in loaded and "libtvm_compiler" not in loaded and "libtorch" not in loaded
assert not {"tvm", "transformers"} & set(sys.modules)
"""


def test_runs_with_the_runtime_library_alone(artefact):
    done = subprocess.run([sys.executable, "-c", ALONE, str(artefact)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_generate_command(artefact):
    command = [sys.executable, "-m", "tvm_sparse.generate", str(artefact), "--prompt", "In", "--max-new-tokens"]
    done = subprocess.run([*command, "5"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("\n") and "tokens/s" in done.stderr
    for wrong in (["0"], ["5", "--prompt", "x" * 300], ["5", "--top-k", "-1"], ["5", "--device", "cuda:0"]):
        refused = subprocess.run([*command, *wrong], capture_output=True, text=True)
        assert refused.returncode == 2 and refused.stdout == "" and len(refused.stderr.splitlines()) == 1
