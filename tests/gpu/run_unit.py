"""One repeating unit of a model at its full width, against transformers: prompt, greedy steps, scores.

python tests/gpu/run_unit.py FOLDER TARGET [MODEL [SPARSITY [DTYPE,...]]] [--library]    such as h200 qwen3.5-27b 0.75

Four layers with synthetic weights and a small vocabulary, pruned and packed as a build does it, in a library compiled
for the declared sparsity. transformers runs the same pruned weights in float32, along the tokens that the engine chose.
In float32 the engine must choose the same ones and differ by no more than 1e-4 of the largest logit; in bfloat16 it
must be no further from float32 than twice transformers' own bfloat16 is.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import torch
from run_model import STEPS, TOLERANCE, results
from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

from tvm_sparse import packing
from tvm_sparse.artefact.reader import LIBRARY
from tvm_sparse.artefact.writer import write_json
from tvm_sparse.checkpoint.synthetic import SyntheticCheckpoint
from tvm_sparse.engine import Engine
from tvm_sparse.layout import Layout, make_layout
from tvm_sparse.models.config import REGISTERED, ModelConfig
from tvm_sparse.plan import declared
from tvm_sparse.pruning import Pattern, PrunedWeights, Pruner, select
from tvm_sparse.targets import MACHINES

LAYERS, VOCABULARY, CONTEXT = 4, 32768, 512


def unit(model: str) -> ModelConfig:
    known = REGISTERED[model]
    kinds = known.layer_types[:LAYERS]
    return replace(
        known, num_hidden_layers=LAYERS, layer_types=kinds, vocab_size=VOCABULARY, eos_token_ids=(VOCABULARY - 1,)
    )


def compile_library(folder: Path, config: ModelConfig, target: str, sparsity: float, dtype: str) -> None:
    from tvm_sparse.build import build_library
    from tvm_sparse.config import parse_build

    checkpoint = folder.parent / "model"
    checkpoint.mkdir(parents=True, exist_ok=True)
    write_json(checkpoint / "config.json", config.to_json())
    flags = ["--target", target, "--dtype", dtype, "--context", str(CONTEXT), "--out", str(folder)]
    build_library(parse_build(["--model", str(checkpoint), "--sparsity", str(sparsity), *flags]))


def pruned(config: ModelConfig, sparsity: float) -> PrunedWeights:
    pruner = Pruner("magnitude", sparsity)
    return PrunedWeights(SyntheticCheckpoint(config), pruner, select(config), packing.packing_device())


def pack(folder: Path, layout: Layout, weights: PrunedWeights, target: str, sparsity: float) -> None:
    """The parameters as the library takes them: at 50 % what is measured ranks other gaps first, by 0.3 %."""
    machines = (MACHINES[target],)
    plan = declared(weights.checkpoint.config, layout, weights.selected, sparsity, Pattern(), machines, batch=1)
    with patch.object(packing, "decide", lambda param, *_: plan[param]):
        packing.pack_model(folder, f"{target} {sparsity}", layout, weights, machines, batch=1)


def reference(config: ModelConfig, layout: Layout, weights: PrunedWeights, device: str) -> Qwen3_5ForCausalLM:
    """transformers' model in float32, with the pruned weights."""
    state = {}
    for param in layout.params:
        shapes = [weights.checkpoint.spec(source).shape for source in param.sources]
        if param.kind == "vector":
            parts = [weights.checkpoint.tensor(param.sources[0])]
        else:
            parts = list(weights.matrix(param).split([rows for rows, *_ in shapes]))
        for source, part in zip(param.sources, parts, strict=True):
            state[source if source == "lm_head.weight" else f"model.{source}"] = part
    with torch.device(device):
        model = Qwen3_5ForCausalLM(Qwen3_5TextConfig(**config.to_json())).eval()
    model.load_state_dict(state, strict=not config.tie_word_embeddings)
    return model


@torch.no_grad()
def follow(model: Qwen3_5ForCausalLM, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """What `run_model.results` gives, from transformers; `tokens` are those that follow the prompt."""
    device = model.device
    prompt = torch.from_numpy(np.random.default_rng(7).integers(0, VOCABULARY, 150)).to(device)[None]
    output = model(prompt, use_cache=True)
    scores = output.logits[0, :-1].float().log_softmax(-1).gather(1, prompt[0, 1:, None])[:, 0]
    logits = [output.logits[0, 99], output.logits[0, -1]]
    for token in tokens.tolist():
        output = model(torch.tensor([[token]], device=device), past_key_values=output.past_key_values)
        logits.append(output.logits[0, -1])
    return {"logits": torch.stack(logits).float().cpu().numpy(), "scores": scores.cpu().numpy()}


def distance(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> tuple[float, float]:
    """Largest difference of logits, by the largest of them, and of scores (natural logarithms)."""
    logits = np.abs(found["logits"] - wanted["logits"]).max() / np.abs(wanted["logits"]).max()
    return float(logits), float(np.abs(found["scores"] - wanted["scores"]).max())


def compare(folder: Path, config: ModelConfig, layout: Layout, weights: PrunedWeights, dtype: str, device: str) -> bool:
    began = time.perf_counter()
    found = results(Engine(folder, device))
    model = reference(config, layout, weights, device)
    wanted = follow(model, found["tokens"])
    error, scores = distance(found, wanted)
    same = int((chosen(wanted) == found["tokens"]).sum())
    line = f"{dtype}: logits {error:.1e}, scores {scores:.1e}, {same} of {STEPS} tokens equal, two runs identical"
    right = error <= TOLERANCE[dtype] and (dtype != "float32" or same == STEPS)
    if dtype == "bfloat16":
        own = follow(model.bfloat16(), found["tokens"])
        error_own, scores_own = distance(own, wanted)
        same_own = int((chosen(own) == chosen(wanted)).sum())
        line += f"; transformers' bfloat16: {error_own:.1e}, {scores_own:.1e}, {same_own}"
        right = right and error <= 2 * error_own
    print(f"{line}; {time.perf_counter() - began:.0f} s: {'right' if right else 'WRONG'}", flush=True)
    return right


def chosen(found: dict[str, np.ndarray]) -> np.ndarray:
    return found["logits"][1:-1].argmax(-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("target", choices=MACHINES)
    parser.add_argument("model", nargs="?", default="qwen3.5-27b", choices=REGISTERED)
    parser.add_argument("sparsity", nargs="?", default=0.75, type=float)
    parser.add_argument("dtypes", nargs="?", default="float32", help="comma list")
    parser.add_argument("--library", action="store_true", help="only compile: FOLDER then goes where there is no TVM")
    args = parser.parse_args()
    config, folders = unit(args.model), [args.folder / dtype for dtype in args.dtypes.split(",")]
    for folder in folders:
        if not (folder / LIBRARY).exists():
            compile_library(folder, config, args.target, args.sparsity, folder.name)
    if args.library:
        return
    torch.backends.cudnn.allow_tf32 = False  # transformers' convolution is to be float32
    began, device = time.perf_counter(), "cpu" if args.target == "cpu" else "cuda:0"
    layout, weights = make_layout(config), pruned(config, args.sparsity)
    packed = args.folder / "packed"
    pack(packed, layout, weights, args.target, args.sparsity)
    print(f"drawn, pruned and packed in {time.perf_counter() - began:.0f} s", flush=True)
    right = True
    for folder in folders:
        for file in packed.glob("params*"):
            (folder / file.name).unlink(missing_ok=True)
            (folder / file.name).symlink_to(file.resolve())
        right &= compare(folder, config, layout, weights, folder.name, device)
    sys.exit(not right)


if __name__ == "__main__":
    main()
