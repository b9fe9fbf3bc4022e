"""The compiled dense model against transformers: same weights, same logits, however the tokens are brought."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import EXAMPLES
from tiny import random_model, write_dense_artefact
from transformers import AutoModelForCausalLM

from tvm_sparse.engine import Engine

CONFIGURATIONS = {
    "27b-like": {},
    "odd-heads": {
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "linear_num_key_heads": 3,
        "linear_num_value_heads": 3,
    },
    "tied": {"tie_word_embeddings": True, "num_hidden_layers": 5, "vocab_size": 301},
    "wide-heads": {"head_dim": 256, "num_hidden_layers": 4, "linear_key_head_dim": 32, "linear_value_head_dim": 64},
    "seven-layers": {
        "num_hidden_layers": 7,
        "num_attention_heads": 5,
        "num_key_value_heads": 5,
        "intermediate_size": 72,
    },
    "half-rotary": {
        "rotary": 0.5,
        "head_dim": 64,
        "hidden_size": 96,
        "linear_num_key_heads": 1,
        "linear_num_value_heads": 5,
        "num_hidden_layers": 6,
    },
}
LOWERED = ("odd-heads", "tied")  # these go through the passes, the others show the dense graph itself
LENGTHS = (1, 2, 3, 63, 64, 65, 128, 200)


def reference(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids]), use_cache=False).logits[0].double().numpy()


def log_softmax(logits):
    logits = logits.astype(np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_float32_parity(name, tmp_path):
    model = random_model(seed=len(name), **CONFIGURATIONS[name])
    engine = Engine(write_dense_artefact(model, tmp_path, lowered=name in LOWERED))
    ids = np.random.default_rng(0).integers(0, engine.vocab_size, 200).tolist()
    full = reference(model, ids)
    tolerance = 1e-4 * np.abs(full).max()

    for length in LENGTHS:  # one piece
        engine.reset()
        logits = engine.prefill(ids[:length])
        assert np.abs(logits - full[length - 1]).max() < tolerance
        assert logits.argmax() == full[length - 1].argmax()

    engine.reset()  # in pieces of every kind, then token by token
    for start, end in ((0, 1), (1, 3), (3, 70), (70, 130)):
        assert np.abs(engine.prefill(ids[start:end]) - full[end - 1]).max() < tolerance
    for at in range(130, 200):
        assert np.abs(engine.decode(ids[at]) - full[at]).max() < tolerance
    assert engine.position == 200

    engine.reset()
    expected = log_softmax(full)[np.arange(199), ids[1:]]
    assert np.abs(engine.score(ids) - expected).max() < 1e-4 * np.abs(expected).max()


def test_bfloat16_is_as_near_to_float64_as_transformers(tmp_path):
    model = random_model(seed=9).to(torch.bfloat16)
    engine = Engine(write_dense_artefact(model, tmp_path, "bfloat16", lowered=True))
    ids = np.random.default_rng(1).integers(0, engine.vocab_size, 100).tolist()
    theirs = reference(model, ids)
    exact = reference(model.double(), ids)
    ours = engine.prefill(ids[:50])[None]
    ours = np.concatenate([ours, *(engine.decode(token)[None] for token in ids[50:])])
    assert np.abs(ours - exact[49:]).max() < 2 * np.abs(theirs - exact).max()
    assert np.abs(ours - exact[49:]).mean() < 1.2 * np.abs(theirs - exact)[49:].mean()


def test_a_batch_decodes_every_sequence_as_if_alone(tmp_path):
    model = random_model(seed=10)
    engine = Engine(write_dense_artefact(model, tmp_path, batch=3))
    rng = np.random.default_rng(2)
    prompts = [rng.integers(0, 512, length).tolist() for length in (5, 66, 1)]
    further = rng.integers(0, 512, (4, 3)).tolist()
    expected = [reference(model, [*prompt, *(step[i] for step in further)]) for i, prompt in enumerate(prompts)]

    logits = [engine.prefill(prompts), *(engine.decode(step) for step in further)]
    for step, rows in enumerate(logits):
        for i, prompt in enumerate(prompts):
            wanted = expected[i][len(prompt) - 1 + step]
            assert np.abs(rows[i] - wanted).max() < 1e-4 * np.abs(wanted).max()
    assert engine.position == [9, 70, 5]

    fresh = rng.integers(0, 512, 40).tolist()  # a new sequence in the middle slot, the others go on
    assert np.abs(engine.refill(1, fresh) - reference(model, fresh)[-1]).max() < 1e-4 * np.abs(expected[1]).max()
    after = rng.integers(0, 512, 3).tolist()
    rows = engine.decode(after)
    histories = [[*prompt, *(step[i] for step in further)] for i, prompt in enumerate(prompts)]
    histories[1] = fresh
    for i, history in enumerate(histories):
        wanted = reference(model, [*history, after[i]])[-1]
        assert np.abs(rows[i] - wanted).max() < 1e-4 * np.abs(wanted).max()
    assert engine.position == [10, 41, 6]


def test_the_shipped_sparse_model_through_the_build_command(shipped_float32):
    """Packed weights, float32 activations: logits, log-probabilities and greedy text of the same weights."""
    folder = EXAMPLES / "tiny-qwen3.5-sparse75"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    engine = Engine(shipped_float32)
    ids = engine.tokenizer.encode((EXAMPLES / "heldout.txt").read_text()[:900])[:200]
    full = reference(model, ids)
    logits = [engine.prefill(ids[:100]), *(engine.decode(token) for token in ids[100:])]
    assert np.abs(np.stack(logits) - full[99:]).max() < 1e-4 * np.abs(full).max()
    engine.reset()
    expected = log_softmax(full)[np.arange(199), ids[1:]]
    assert np.abs(engine.score(ids) - expected).max() < 1e-4 * np.abs(expected).max()

    with torch.no_grad():
        theirs = model.generate(torch.tensor([ids[:20]]), max_new_tokens=40, do_sample=False)[0, 20:].tolist()
    ours = list(engine.generate(ids[:20], max_new_tokens=40))
    assert ours == theirs[: len(ours)] and len(ours) >= min(len(theirs), 39)
