"""The model's operations in float64 with torch, written from the definitions in schedules/ops.py."""

from __future__ import annotations

import torch
from cases import Shape
from torch.nn.functional import silu, softplus

Tensor = torch.Tensor


def rms_norm(x: Tensor, w: Tensor, eps: float) -> Tensor:
    x = x.double()
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * w.double()


def causal_conv(s: Shape, mixed: Tensor, w: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One sequence: mixed [n, P], state [3, C] -> y [n, C], new state."""
    rows = torch.cat([state.double(), mixed[:, : s.channels].double()])
    y = sum(rows[j : j + len(mixed)] * w[:, j].double() for j in range(4))
    return silu(y), rows[-3:]


def gated_delta(
    s: Shape, y: Tensor, mixed: Tensor, a_log: Tensor, dt_bias: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One sequence: y [n, C], state [Vh, Dk, Dv] -> o [n, Vh Dv], new state."""
    n, keys = len(y), s.key_heads * s.key_dim
    q, k, v = y.double().split([keys, keys, s.value_heads * s.value_dim], 1)
    repeat = s.value_heads // s.key_heads
    q, k = (t.view(n, s.key_heads, s.key_dim).repeat_interleave(repeat, 1) for t in (q, k))
    q, k = (t * (t.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for t in (q, k))
    q = q / s.key_dim**0.5
    v = v.view(n, s.value_heads, s.value_dim)
    gates = mixed[:, s.channels + s.value_heads * s.value_dim :].double()
    beta = gates[:, : s.value_heads].sigmoid()
    a = gates[:, s.value_heads : 2 * s.value_heads]
    decay = (-a_log.double().exp() * softplus(a + dt_bias.double())).exp()
    state, out = state.double().clone(), []
    for t in range(n):
        state *= decay[t, :, None, None]
        delta = beta[t, :, None] * (v[t] - torch.einsum("hkv,hk->hv", state, k[t]))
        state += k[t, :, :, None] * delta[:, None, :]
        out.append(torch.einsum("hkv,hk->hv", state, q[t]).flatten())
    return torch.stack(out), state


def gated_norm(s: Shape, o: Tensor, mixed: Tensor, w: Tensor) -> Tensor:
    heads = o.view(len(o), s.value_heads, s.value_dim)
    z = mixed[:, s.channels : s.channels + s.value_heads * s.value_dim].double()
    return (rms_norm(heads, w, s.eps).flatten(1)) * silu(z)


def rope(s: Shape, x: Tensor, positions: Tensor) -> Tensor:
    """x [n, heads, D] float64 at int positions [n]."""
    half = s.rotary_dim // 2
    inverse = s.theta ** (-2.0 * torch.arange(half, device=x.device).double() / s.rotary_dim)
    angle = (positions.float()[:, None] * inverse.float()).double()[:, None]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin(), rest], -1)


def split_qkv(s: Shape, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """qkv [n, P] -> q, gate [n, Hq, D], k, v [n, Hkv, D]."""
    n, wide, narrow = len(qkv), 2 * s.heads * s.head_dim, s.kv_heads * s.head_dim
    q, gate = qkv[:, :wide].view(n, s.heads, 2, s.head_dim).unbind(2)
    k, v = qkv[:, wide : wide + 2 * narrow].view(n, 2, s.kv_heads, s.head_dim).unbind(1)
    return q, gate, k, v


def attention(s: Shape, q: Tensor, gate: Tensor, keys: Tensor, values: Tensor, past: int) -> Tensor:
    """One sequence: q [n, Hq, D], caches [Hkv, T, D], token i sees positions 0 .. past + i -> [n, Hq D]."""
    n = len(q)
    repeat = s.heads // s.kv_heads
    keys, values = (
        t[:, : past + n].double().repeat_interleave(repeat, 0) for t in (keys, values)
    )
    scores = torch.einsum("nhd,htd->hnt", q.double(), keys) / s.head_dim**0.5
    seen = torch.arange(past + n, device=q.device) <= past + torch.arange(n, device=q.device)[:, None]
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    out = torch.einsum("hnt,htd->nhd", weights, values)
    return (out * gate.double().sigmoid()).flatten(1)
