"""Train the example checkpoints: a tiny Qwen3.5 and its twin with 75 % zeros.

The model is transformers' own `Qwen3_5ForCausalLM` with 2.3 million parameters, trained on the
King James Bible. The sparse twin starts from the dense one: the smallest weights of every
projection are removed step by step while training goes on, with the dense model as teacher,
and the last half of that run trains on with fixed masks.

The text is Debian's package `bible-kjv-text` (public domain), printed by `bible-kjv`:

    apt-get install bible-kjv
    bible -l 9999 Gen1:1-Rev22:21 > kjv.txt
    python train_tiny.py train kjv.txt --out .

writes `tiny-qwen3.5/`, `tiny-qwen3.5-sparse75/` and `heldout.txt` into the folder `--out`, in
minutes on a GPU and in a night on a CPU. Afterwards

    python train_tiny.py evaluate tiny-qwen3.5 tiny-qwen3.5-sparse75 --text heldout.txt

prints the held-out loss, the perplexity, the zeros and some text of each.
"""

from __future__ import annotations

import argparse
import copy
import math
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
)
from transformers.models.qwen3_5.tokenization_qwen3_5 import PRETOKENIZE_REGEX

HELD_OUT_BOOKS = ("Ruth", "Esther", "Jonah", "Malachi", "Philippians", "James", "1 Peter")
VALIDATION_EVERY = 40  # of the other chapters, one in forty steers the training and no more
END_OF_TEXT, END_OF_TURN = "<|endoftext|>", "<|im_end|>"
VOCABULARY = 2048
SPARSITY = 0.75
PROMPTS = ("And Jonah said unto the king,", "The fear of the LORD is")


# ---------------------------------------------------------------------------------------------
# Text


def read_chapters(path: Path) -> dict[str, str]:
    """The pretty output of `bible` as {"Ruth 1": "verse\\nverse\\n"}, verse numbers dropped.

    Headings start in the first column, verses are indented and begin with their number.
    """
    chapters: dict[str, str] = {}
    heading = ""
    for line in path.read_text(encoding="ascii").splitlines():
        if not line.strip():
            continue
        if not line.startswith(" "):
            heading = line.strip()
            chapters[heading] = ""
            continue
        chapters[heading] += re.sub(r"^ *\d+ ", "", line).strip() + "\n"
    return chapters


def split(chapters: dict[str, str]) -> tuple[str, str, str]:
    """Texts for training, validation and held-out, each chapter behind an `<|endoftext|>`."""
    parts: tuple[list[str], list[str], list[str]] = ([], [], [])
    rest = 0
    for heading, verses in chapters.items():
        document = f"{END_OF_TEXT}{heading}\n{verses}"
        if heading.rsplit(" ", 1)[0] in HELD_OUT_BOOKS:
            parts[2].append(document)
            continue
        rest += 1
        parts[1 if rest % VALIDATION_EVERY == 0 else 0].append(document)
    training, validation, held_out = ("".join(part) for part in parts)
    return training, validation, held_out


def make_tokenizer(text: str, vocabulary: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """Byte-level BPE in Qwen's arrangement: same pre-tokenizer, special tokens behind the rest."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    specials = [END_OF_TEXT, END_OF_TURN]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(specials),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.replace(END_OF_TEXT, "").splitlines(keepends=True), trainer)
    tokenizer.add_special_tokens(specials)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TURN,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> Tensor:
    """The text as one stream of token ids [N]."""
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


# ---------------------------------------------------------------------------------------------
# Model


def make_model(tokenizer: PreTrainedTokenizerFast, **sizes: Any) -> Qwen3_5ForCausalLM:
    """Eight layers in the 3:1 pattern; the proportions follow Qwen3.5-27B where they fit. `sizes` are other sizes.

    Six attention heads of 32 are wider than the hidden size, as there; each key head of the
    DeltaNet serves three value heads, as there. The rotary base is small so that all four
    frequencies of the eight rotary dimensions turn within the context.
    """
    end_of_text = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    end_of_turn = tokenizer.convert_tokens_to_ids(END_OF_TURN)
    tiny: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 352,
        "num_hidden_layers": 8,
        "full_attention_interval": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 6,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
        "linear_conv_kernel_dim": 4,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "initializer_range": 0.05,
        "eos_token_id": end_of_text,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.25,
            "mrope_section": [2, 1, 1],
            "mrope_interleaved": True,
        },
    }
    model = Qwen3_5ForCausalLM(Qwen3_5TextConfig(**{**tiny, **sizes}))
    model.generation_config = GenerationConfig(
        bos_token_id=end_of_text,
        pad_token_id=end_of_text,
        eos_token_id=[end_of_turn, end_of_text],
        do_sample=True,
        temperature=0.6,
        top_k=20,
        top_p=0.95,
    )
    return model


def projections(model: Qwen3_5ForCausalLM) -> list[Tensor]:
    """The weights [out, in] that are pruned: every linear map of every layer.

    Neither the embedding nor the head is in a layer, and the DeltaNet's short convolution is
    not a linear map.
    """
    return [m.weight for m in model.model.layers.modules() if isinstance(m, nn.Linear)]


def add_dropout(model: Qwen3_5ForCausalLM, rate: float) -> None:
    """Drop values as they enter the residual stream; the text is small and read many times."""

    def drop(module: nn.Module, _: tuple, output: Tensor) -> Tensor:
        return F.dropout(output, rate, module.training)

    for name, module in model.named_modules():
        if name.endswith(("embed_tokens", "o_proj", "out_proj", "down_proj")):
            module.register_forward_hook(drop)


def save(model: Qwen3_5ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write bf16, except `A_log` and the DeltaNet's norm, which Qwen3.5 keeps in F32.

    A mask leaves -0.0 where the weight was negative; adding zero makes it the plain zero.
    """
    precise = {
        name: parameter.detach().float().clone()
        for name, parameter in model.named_parameters()
        if name.endswith(("linear_attn.A_log", "linear_attn.norm.weight"))
    }
    model = copy.deepcopy(model).cpu().to(torch.bfloat16)
    for name, value in precise.items():
        model.get_parameter(name).data = value.cpu()
    for weight in projections(model):
        weight.data += 0.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# ---------------------------------------------------------------------------------------------
# Training


def windows(size: int, length: int, batch: int, seed: int) -> Iterator[Tensor]:
    """Endless batches [batch] of window starts: each epoch tiles the stream at a new offset."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        offset = int(torch.randint(length, (), generator=generator))
        starts = torch.arange(offset, size - length, length)
        starts = starts[torch.randperm(len(starts), generator=generator)]
        yield from starts[: len(starts) // batch * batch].view(-1, batch)


def logits_of(model: Qwen3_5ForCausalLM, ids: Tensor) -> Tensor:
    """ids [batch, length] to logits [batch * length, vocabulary].

    The three rows of positions are the model's own default. Given explicitly they spare its
    search for packed sequences, which would wait for the GPU.
    """
    positions = torch.arange(ids.shape[1], device=ids.device).expand(3, *ids.shape)
    return model(input_ids=ids, position_ids=positions, use_cache=False).logits.flatten(0, 1)


def objective(student: Tensor, targets: Tensor, teacher: Tensor | None) -> Tensor:
    """Cross-entropy of the text; with teacher logits, half of it is their divergence."""
    loss = F.cross_entropy(student, targets)
    if teacher is None:
        return loss
    known = teacher.log_softmax(-1)
    divergence = F.kl_div(student.log_softmax(-1), known, log_target=True, reduction="batchmean")
    return (loss + divergence) / 2


@torch.no_grad()
def prune(weights: list[Tensor], masks: list[Tensor], sparsity: float) -> None:
    """Keep the largest weights of each matrix. What is gone stays gone: zeros rank last."""
    for weight, mask in zip(weights, masks, strict=True):
        keep = weight.numel() - round(weight.numel() * sparsity)
        kept = weight.abs().flatten().topk(keep).indices
        mask.zero_().view(-1)[kept] = 1
        weight.mul_(mask)


def replayed(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The step as a CUDA graph: it is a few thousand small kernels, so launches would dominate."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()

    def replay() -> Tensor:
        graph.replay()
        return loss

    return replay


def make_optimizer(model: Qwen3_5ForCausalLM, decay: float) -> torch.optim.AdamW:
    """AdamW whose learning rates are tensors, so that a captured step can read them; matrices alone decay."""
    device = next(model.parameters()).device
    decayed = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    return torch.optim.AdamW(
        [{"params": decayed, "weight_decay": decay}, {"params": others}],
        lr=torch.zeros((), device=device),
        betas=(0.9, 0.95),
        weight_decay=0.0,
        fused=True,
        capturable=device.type == "cuda",
    )


def fit(
    model: Qwen3_5ForCausalLM,
    training: Tensor,
    validation: Tensor,
    options: argparse.Namespace,
    teacher: Qwen3_5ForCausalLM | None = None,
    sparsity: float = 0.0,
) -> None:
    """Train in place and leave the weights of the lowest validation loss.

    `training` and `validation` are token streams [N] on the model's device. With a sparsity,
    the first half of the steps removes weights along a cubic ramp; the masks of the second half
    are fixed, and only its weights can be the best.
    """
    device = training.device
    steps, length = options.steps, options.length
    ramp = steps // 2 if sparsity else 0
    pruned = projections(model) if sparsity else []
    masks = [torch.ones_like(weight) for weight in pruned]
    optimizer = make_optimizer(model, options.decay)
    starts = torch.zeros(options.batch, dtype=torch.long, device=device)
    offsets = torch.arange(length + 1, device=device)
    unseen = validation.unfold(0, length + 1, length)  # [windows, length + 1], the tail left out

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        ids = training[starts[:, None] + offsets]
        inputs, targets = ids[:, :-1], ids[:, 1:].flatten()
        with torch.no_grad():
            wanted = logits_of(teacher, inputs) if teacher is not None else None
        loss = objective(logits_of(model, inputs), targets, wanted)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            for weight, mask in zip(pruned, masks, strict=True):
                weight.mul_(mask)
        return loss.detach()

    model.train()
    advance = replayed(step) if device.type == "cuda" and options.graph else step
    batches = windows(len(training), length, options.batch, options.seed)
    best, weights = math.inf, copy.deepcopy(model.state_dict())
    began = time.monotonic()
    for index in range(steps):
        rate = options.rate * min((index + 1) / (0.05 * steps), (steps - index) / (0.95 * steps))
        for group in optimizer.param_groups:
            group["lr"].fill_(rate)
        if sparsity and index <= ramp and (index % 10 == 0 or index == ramp):
            prune(pruned, masks, sparsity * (1 - (1 - index / ramp) ** 3))
        starts.copy_(next(batches))
        loss = advance()
        if (index + 1) % options.check and index + 1 < steps:
            continue
        model.eval()
        with torch.no_grad():
            logits = logits_of(model, unseen[:, :-1])
            checked = float(objective(logits, unseen[:, 1:].flatten(), None))
        model.train()
        took = f"{time.monotonic() - began:.0f} s"
        print(f"step {index + 1} objective {loss:.3f} validation {checked:.4f} {took}", flush=True)
        if index >= ramp and checked < best:
            best, weights = checked, copy.deepcopy(model.state_dict())
    model.load_state_dict(weights)
    model.eval()
    print(f"best validation loss {best:.4f}", flush=True)


def train(options: argparse.Namespace) -> None:
    """Text to tokenizer, dense model, sparse model; everything is written below `--out`."""
    training, validation, held_out = split(read_chapters(options.corpus))
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "heldout.txt").write_text(held_out, encoding="ascii")
    tokenizer = make_tokenizer(training)
    device = torch.device(options.device)
    streams = [encode(tokenizer, text).to(device) for text in (training, validation)]
    print("tokens for training and validation:", *(len(stream) for stream in streams))

    torch.manual_seed(options.seed)
    dense = make_model(tokenizer).to(device)
    print("parameters:", sum(p.numel() for p in dense.parameters()))
    sparse = copy.deepcopy(dense)
    add_dropout(dense, options.dropout)
    fit(dense, *streams, options)
    save(dense, tokenizer, options.out / "tiny-qwen3.5")

    sparse.load_state_dict(dense.state_dict())
    add_dropout(sparse, options.dropout * (1 - SPARSITY))  # a quarter of the weights overfit less
    fit(sparse, *streams, options, teacher=dense, sparsity=SPARSITY)
    save(sparse, tokenizer, options.out / "tiny-qwen3.5-sparse75")


# ---------------------------------------------------------------------------------------------
# Evaluation


@torch.no_grad()
def stream_loss(model: Qwen3_5ForCausalLM, stream: Tensor, length: int, stride: int) -> float:
    """Mean loss of a token stream [N], read in windows of `length` that advance by `stride`.

    A window counts its last `stride` predictions only, so that each token but the first is
    predicted once, after at least `length - stride` tokens (the first window counts all).
    """
    model.eval()
    total, done = 0.0, 0
    for start in range(0, len(stream) - 1, stride):
        window = stream[start : start + length + 1]
        losses = F.cross_entropy(logits_of(model, window[None, :-1]), window[1:], reduction="none")
        fresh = start + len(window) - 1 - done
        total += float(losses[len(losses) - fresh :].sum())
        done += fresh
        if done == len(stream) - 1:
            break
    return total / done


def evaluate(options: argparse.Namespace) -> None:
    """Print loss, perplexity, zeros and text of stored checkpoints, computed in float32."""
    text = options.text.read_text(encoding="ascii")
    for folder in options.checkpoints:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        stream = encode(tokenizer, text)
        loss = stream_loss(model, stream, options.length, options.length // 2)
        zeros = [float((weight == 0).double().mean()) for weight in projections(model)]
        print(f"{folder}: {sum(p.numel() for p in model.parameters())} parameters")
        print(f"  zeros of its {len(zeros)} projections: {min(zeros):.6f} to {max(zeros):.6f}")
        print(f"  {len(stream)} tokens, loss {loss:.4f} nats, perplexity {math.exp(loss):.3f}")
        for prompt in PROMPTS:
            for sampled in (False, True):
                torch.manual_seed(options.seed)
                ids = tokenizer(prompt, return_tensors="pt")
                written = model.generate(**ids, do_sample=sampled, max_new_tokens=80)
                name = "sampled" if sampled else "greedy"
                print(f"  [{name}] {tokenizer.decode(written[0])!r}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("train", help="train both checkpoints")
    command.set_defaults(run=train)
    command.add_argument("corpus", type=Path, help="output of `bible -l 9999 Gen1:1-Rev22:21`")
    command.add_argument("--out", type=Path, required=True)
    command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    command.add_argument("--graph", action=argparse.BooleanOptionalAction, default=True)
    command.add_argument("--steps", type=int, default=2200, help="of each of the two trainings")
    command.add_argument("--batch", type=int, default=32, help="windows in a step")
    command.add_argument("--length", type=int, default=512, help="tokens in a window")
    command.add_argument("--rate", type=float, default=3e-3, help="highest learning rate")
    command.add_argument("--decay", type=float, default=0.5, help="weight decay of the matrices")
    command.add_argument("--dropout", type=float, default=0.2)
    command.add_argument("--check", type=int, default=200, help="steps between validations")
    command.add_argument("--seed", type=int, default=0)
    command = commands.add_parser("evaluate", help="measure checkpoints on the held-out text")
    command.set_defaults(run=evaluate)
    command.add_argument("checkpoints", type=Path, nargs="+")
    command.add_argument("--text", type=Path, required=True)
    command.add_argument("--length", type=int, default=512, help="window; it advances by half")
    command.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
