"""Long prefills at the 27B's sizes: python tests/gpu/run_prefill_operations.py --library FILE

The delta rule and attention of many tokens against float64; beside it, what rounding to bfloat16 as transformers does
costs (of q, k, v and beta; of everything, in torch's own attention). The same prefill in pieces, and twice.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

import reference  # noqa: E402
import torch  # noqa: E402
from cases import SHAPES  # noqa: E402
from host import DEVICE, Output, library_of, load, relative_error  # noqa: E402

S = next(shape for shape in SHAPES if shape.name == "large")
N = 1100
PIECES = (512, 3, 1, 64, 65, 127, 328)
GATES = {"usual": (0.0, -4.0), "no decay": (-4.0, -8.0), "strong decay": (2.5, 2.0)}
"""Means of A_log and dt_bias."""


def delta(get, decay: str, scale: float) -> bool:
    a_mean, dt_mean = GATES[decay]
    width = S.value_heads * S.value_dim
    conv = torch.randn(N, S.channels, device=DEVICE)
    conv[:, -width:] *= scale
    mixed = torch.randn(N, S.channels + width + 2 * S.value_heads, device=DEVICE).bfloat16()
    a_log = torch.randn(S.value_heads, device=DEVICE) * 0.3 + a_mean
    dt = torch.randn(S.value_heads, device=DEVICE) + dt_mean
    start = torch.randn(S.batch, S.value_heads, S.key_dim, S.value_dim, device=DEVICE) * 0.1 * scale
    slot = torch.ones(1, dtype=torch.int32, device=DEVICE)
    kernel = get(f"{S.name}_gated_delta_p")

    def run(pieces: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        state, outs, at = start.clone(), [], 0
        for piece in pieces:
            o = Output(piece, width, dtype=torch.float32)
            kernel(conv[at : at + piece], mixed[at : at + piece], a_log, dt, slot, state, o.tensor)
            torch.cuda.synchronize()
            assert o.unharmed(), "outside the output"
            outs.append(o.tensor)
            at += piece
        assert torch.equal(state[0], start[0]), "another slot's state"
        return torch.cat(outs), state[1]

    wanted = reference.gated_delta(S, conv, mixed, a_log, dt, start[1])
    rounded = reference.gated_delta(S, conv.bfloat16(), mixed, a_log, dt, start[1])
    errors = [relative_error(a, b) for a, b in zip(run((N,)), wanted, strict=True)]
    pieces = [relative_error(a, b) for a, b in zip(run(PIECES), wanted, strict=True)]
    usual = [relative_error(a, b) for a, b in zip(rounded, wanted, strict=True)]
    same = all(torch.equal(a, b) for a, b in zip(run((N,)), run((N,)), strict=True))
    print(f"delta, {decay}, v {scale:g}: o and state {errors[0]:.1e} {errors[1]:.1e}, "
          f"in pieces {pieces[0]:.1e} {pieces[1]:.1e}, bfloat16 inputs {usual[0]:.1e} {usual[1]:.1e}, "
          f"twice the same: {same}", flush=True)  # fmt: skip
    return same and max(errors[0], pieces[0]) <= 2 * usual[0] and max(errors[1], pieces[1]) <= 2 * usual[1]


def attention(get, past: int) -> bool:
    queries = S.heads * S.head_dim
    qkv = torch.randn(N, 2 * (S.heads + S.kv_heads) * S.head_dim, device=DEVICE).bfloat16()
    q = torch.randn(N, queries, device=DEVICE) * 2
    keys, values = (
        torch.randn(S.batch, S.kv_heads, past + N + 5, S.head_dim, device=DEVICE).bfloat16() for _ in range(2)
    )
    keys[:, :, past + N :], values[:, :, past + N :] = float("nan"), float("nan")
    slot = torch.ones(1, dtype=torch.int32, device=DEVICE)
    position = torch.full((S.batch,), past, dtype=torch.int32, device=DEVICE)
    kernel = get(f"{S.name}_attention_p")

    def run() -> torch.Tensor:
        y = Output(N, queries, dtype=torch.bfloat16)
        kernel(q, qkv, slot, position, keys, values, y.tensor)
        torch.cuda.synchronize()
        assert y.unharmed(), "outside the output"
        return y.tensor

    gate = reference.split_qkv(S, qkv)[1]
    wanted = reference.attention(S, q.view(N, S.heads, S.head_dim), gate, keys[1], values[1], past)
    seen = torch.arange(past + N, device=DEVICE) <= past + torch.arange(N, device=DEVICE)[:, None]
    usual = torch.nn.functional.scaled_dot_product_attention(
        q.bfloat16().view(N, S.heads, S.head_dim).transpose(0, 1)[None],
        *(t[1:, :, : past + N].repeat_interleave(S.heads // S.kv_heads, 1) for t in (keys, values)),
        attn_mask=seen,
    )
    usual = usual[0].transpose(0, 1).reshape(N, queries) * gate.sigmoid().flatten(1)
    first, second = run(), run()
    error, bound, same = relative_error(first, wanted), relative_error(usual, wanted), torch.equal(first, second)
    print(f"attention, {past} before: {error:.1e}, torch in bfloat16 {bound:.1e}, twice the same: {same}", flush=True)
    return same and error <= 2 * bound


def main(library: str) -> None:
    torch.manual_seed(0)
    get = load(library)
    right = [delta(get, decay, scale) for decay in GATES for scale in (1.0, 1e-4, 3e4)]
    right += [attention(get, past) for past in (0, 77, 3000)]
    print(f"prefill: {sum(right)} of {len(right)} right")
    sys.exit(not all(right))


if __name__ == "__main__":
    main(library_of(sys.argv[1:])[0])
