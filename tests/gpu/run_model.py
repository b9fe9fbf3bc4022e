"""A whole model through the engine, on one device and then another; an artefact for a batch with sequences of its own.

python tests/gpu/run_model.py ARTEFACT DEVICE NUMBERS.npz

Where the file is not there, the results are written to it; where it is, they are compared with it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from tvm_sparse.engine import Engine

STEPS = 24
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}


def results(engine: Engine) -> dict[str, np.ndarray]:
    """Logits of a prompt, of greedy steps after it, and scores; a second run must give the same bits.

    What `generate` writes must be the steps after a prompt in one piece, as it reads it (in bfloat16 two pieces round
    otherwise): on a GPU it picks its tokens there.
    """
    random = np.random.default_rng(7)
    prompt = random.integers(0, engine.vocab_size, 150).tolist()
    runs = []
    for _ in range(2):
        engine.reset()
        logits = [engine.prefill(prompt[:100]), engine.prefill(prompt[100:])]
        tokens = _greedy(engine, logits)
        engine.reset()
        runs.append({"logits": np.stack(logits), "tokens": np.array(tokens), "scores": engine.score(prompt)})
    assert all(np.array_equal(runs[0][key], runs[1][key]) for key in runs[0]), "two runs differ"
    written = list(engine.generate(prompt, max_new_tokens=STEPS))
    engine.reset()
    tokens = _greedy(engine, [engine.prefill(prompt)])
    ends = [i for i, token in enumerate(tokens) if token in engine.eos_token_ids]
    assert written == tokens[: ends[0] if ends else STEPS], "generate writes other tokens than decode"
    return runs[0]


def _greedy(engine: Engine, logits: list[np.ndarray]) -> list[int]:
    """The tokens chosen after `logits`, to which those of each step are added."""
    tokens = []
    for _ in range(STEPS):
        tokens.append(int(logits[-1].argmax()))
        logits.append(engine.decode(tokens[-1]))
    return tokens


def results_of_batch(engine: Engine) -> dict[str, np.ndarray]:
    """Logits of sequences of different lengths that decode together, one replaced by another halfway; twice."""
    random = np.random.default_rng(8)
    prompts = [random.integers(0, engine.vocab_size, 1 + 37 * slot % 151).tolist() for slot in range(engine.batch)]
    given = random.integers(0, engine.vocab_size, (STEPS, engine.batch)).tolist()
    fresh = random.integers(0, engine.vocab_size, 70).tolist()
    runs = []
    for _ in range(2):
        engine.reset()
        logits = [engine.prefill(prompts)]
        for step, tokens in enumerate(given):
            if step == STEPS // 2:
                logits[-1][1] = engine.refill(1, fresh)
            logits.append(engine.decode(tokens))
        runs.append(np.stack(logits))
    assert np.array_equal(*runs), "two runs differ"
    return {"logits": runs[0], "tokens": np.zeros(STEPS), "scores": np.zeros(1)}


def main(artefact: str, device: str, numbers: str) -> None:
    engine = Engine(artefact, device=device)
    found = results(engine) if engine.batch == 1 else results_of_batch(engine)
    if not Path(numbers).exists():
        np.savez(numbers, **found)
        print(f"{artefact} on {device}: written to {numbers}")
        return
    wanted = np.load(numbers)
    dtype = next(dtype for dtype in TOLERANCE if dtype in Path(numbers).name)
    same = int((found["tokens"] == wanted["tokens"]).sum())
    until = STEPS if same == STEPS else int(np.argmin(found["tokens"] == wanted["tokens"]))
    rows = slice(0, until + 2)  # after another token the texts part
    error = np.abs(found["logits"][rows] - wanted["logits"][rows]).max() / np.abs(wanted["logits"]).max()
    scores = np.abs(found["scores"] - wanted["scores"]).max()
    print(f"{artefact} on {device}: logits {error:.1e}, scores {scores:.1e}, {same} of {STEPS} tokens equal")
    if not error <= TOLERANCE[dtype] or (dtype == "float32" and same < STEPS):
        sys.exit(1)


if __name__ == "__main__":
    main(*sys.argv[1:])
