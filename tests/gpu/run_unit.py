"""One repeating unit of a model at its full width, against transformers: prompt, greedy steps, scores.

python tests/gpu/run_unit.py FOLDER TARGET [MODEL [SPARSITY [DTYPE]]]        such as h200 qwen3.5-27b 0.75 float32

Makes a checkpoint of four layers with random weights and a small vocabulary in FOLDER, prunes and builds it as a user
would, runs it on the target's device and holds the results against transformers' of the pruned checkpoint, as
run_model.py does. The compiler is needed. At the 27B's width FOLDER takes 10 GB.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import torch
from run_model import STEPS
from run_model import main as run_model
from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

from tvm_sparse.build import main as build
from tvm_sparse.models.config import REGISTERED
from tvm_sparse.prune import main as prune

LAYERS, VOCABULARY = 4, 32768


def write_checkpoint(folder: Path, model: str, device: str) -> None:
    known = REGISTERED[model].to_json()
    sizes = {"num_hidden_layers": LAYERS, "layer_types": known["layer_types"][:LAYERS], "vocab_size": VOCABULARY}
    config = Qwen3_5TextConfig(**{**known, **sizes, "eos_token_id": 1})
    torch.manual_seed(0)
    with torch.device(device):
        made = Qwen3_5ForCausalLM(config).bfloat16()
    made.save_pretrained(folder)


@torch.no_grad()
def expected(checkpoint: Path, device: str) -> dict[str, np.ndarray]:
    """What `run_model.results` gives, from transformers in float32."""
    model = Qwen3_5ForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).to(device).eval()
    prompt = torch.from_numpy(np.random.default_rng(7).integers(0, VOCABULARY, 150)).to(device)[None]
    output = model(prompt, use_cache=True)
    scores = output.logits[0, :-1].log_softmax(-1).gather(1, prompt[0, 1:, None])[:, 0]
    logits, tokens = [output.logits[0, 99], output.logits[0, -1]], []
    for _ in range(STEPS):
        tokens.append(int(logits[-1].argmax()))
        output = model(torch.tensor([[tokens[-1]]], device=device), past_key_values=output.past_key_values)
        logits.append(output.logits[0, -1])
    return {"logits": torch.stack(logits).cpu().numpy(), "tokens": np.array(tokens), "scores": scores.cpu().numpy()}


def main(folder: str, target: str, model: str = "qwen3.5-27b", sparsity: str = "0.75", dtype: str = "float32") -> None:
    device, root = "cpu" if target == "cpu" else "cuda:0", Path(folder)
    dense, sparse, artefact = root / "dense", root / "sparse", root / "artefact"
    if not dense.exists():
        write_checkpoint(dense, model, device)
    if not sparse.exists():
        prune(["--model", str(dense), "--sparsity", sparsity, "--prune", "magnitude", "--out", str(sparse)])
    flags = ["--prune", "none", "--target", target, "--dtype", dtype, "--context", "512", "--out", str(artefact)]
    build(["--model", str(sparse), *flags])
    numbers = root / f"expected_{dtype}.npz"
    np.savez(numbers, **expected(sparse, device))
    run_model(str(artefact), device, str(numbers))


if __name__ == "__main__":
    main(*sys.argv[1:])
