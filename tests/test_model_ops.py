"""Every model operation on the CPU against its formula in float64, for several shapes, dtypes and both token modes."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import tvm

from tvm_sparse.schedules.ops import ModelOps

OPS = ModelOps("cpu")
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}
TOLERANCE = {"float32": 2e-6, "bfloat16": 8e-3}
both_dtypes = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])


def run(function, *arrays):
    """Compiles and calls; arrays are changed in place as the kernel changes them."""
    built = tvm.compile(
        tvm.IRModule({"main": function.with_attr("global_symbol", "main")}), target=tvm.target.Target("llvm")
    )
    tensors = [tvm.runtime.tensor(array) for array in arrays]
    built["main"](*tensors)
    for array, tensor in zip(arrays, tensors, strict=True):
        array[...] = tensor.numpy()


def drawn(rng, shape, dtype="float32", scale=1.0):
    return (rng.standard_normal(shape) * scale).astype(DTYPES[dtype])


def poisoned(shape, dtype="float32"):
    return np.full(shape, np.nan, DTYPES[dtype])


def assert_close(got, expected, dtype="float32", factor=1.0):
    got = got.astype(np.float64)
    assert np.isfinite(got).all()
    assert np.abs(got - expected).max() <= factor * TOLERANCE[dtype] * np.abs(expected).max()


def wide(array):
    return array.astype(np.float64)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def normed(x, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps)


@both_dtypes
def test_embedding(dtype):
    rng = np.random.default_rng(0)
    table, y = drawn(rng, (17, 24), "bfloat16"), poisoned((5, 24), dtype)
    ids = np.array([3, 0, 16, 3, 7], np.int32)
    run(OPS.embedding(None, 17, 24, "bfloat16", dtype), ids, table, y)
    assert (wide(y) == wide(table[ids])).all()


@both_dtypes
@pytest.mark.parametrize(("tokens", "hidden"), [(None, 40), (1, 64), (3, 24)])
def test_norms(tokens, hidden, dtype):
    rng = np.random.default_rng(1)
    n = tokens or 7
    x, delta = drawn(rng, (n, hidden), dtype), drawn(rng, (n, hidden), dtype)
    w, y, total = drawn(rng, hidden), poisoned((n, hidden), dtype), poisoned((n, hidden), dtype)
    run(OPS.rms_norm(tokens, hidden, 1e-6, dtype), x, w, y)
    assert_close(y, normed(wide(x), 1e-6) * w, dtype)
    run(OPS.add_rms_norm(tokens, hidden, 1e-6, dtype), x, delta, w, total, y)
    assert (total == (x.astype(np.float32) + delta.astype(np.float32)).astype(total.dtype)).all()
    assert_close(y, normed(wide(total), 1e-6) * w, dtype)


@both_dtypes
def test_silu_mul_over_the_whole_range_of_exp(dtype):
    gate = np.concatenate([np.linspace(-120, 120, 4000), [0.0, -0.0, 1e-30], np.zeros(93)])
    both = np.stack([np.concatenate([gate, np.ones_like(gate)])] * 2).astype(DTYPES[dtype])
    y = poisoned((2, len(gate)), dtype)
    run(OPS.silu_mul(None, len(gate), dtype), both, y)
    x = wide(both[0, : len(gate)])
    assert_close(y[1], x * sigmoid(x), dtype)
    if dtype == "float32":
        near = (np.abs(x) < 80) & (x != 0)
        assert np.abs(y[1][near] / (x * sigmoid(x))[near] - 1).max() < 5e-7


@both_dtypes
@pytest.mark.parametrize("n", [1, 2, 5])
def test_causal_conv_prefill_continues_from_its_state(n, dtype):
    rng = np.random.default_rng(2)
    mixed, w = drawn(rng, (n, 50), dtype), drawn(rng, (40, 4))
    state, y = drawn(rng, (2, 3, 40)), poisoned((n, 40))
    rows = np.concatenate([wide(state[1]), wide(mixed[:, :40])])
    other = state[0].copy()
    run(OPS.causal_conv(None, 2, 40, dtype), mixed, w, np.array([1], np.int32), state, y)
    conv = sum(rows[j : j + n] * w[:, j] for j in range(4))
    assert_close(y, conv * sigmoid(conv))
    assert (state[1] == rows[-3:].astype(np.float32)).all() and (state[0] == other).all()


def test_causal_conv_decode_moves_every_slot():
    rng = np.random.default_rng(3)
    mixed, w, state, y = drawn(rng, (3, 20)), drawn(rng, (16, 4)), drawn(rng, (3, 3, 16)), poisoned((3, 16))
    rows = np.concatenate([wide(state), wide(mixed[:, None, :16])], 1)
    run(OPS.causal_conv(3, 3, 16, "float32"), mixed, w, np.array([9], np.int32), state, y)
    conv = np.einsum("bjc,cj->bc", rows, w)
    assert_close(y, conv * sigmoid(conv))
    assert (state == rows[:, 1:].astype(np.float32)).all()


def delta_rule(q, k, v, b, a, A_log, dt_bias, S):
    """One token of one head, as published; S [Dk, Dv] float64 is replaced by the returned one."""
    q, k = (x / np.sqrt((x**2).sum() + 1e-6) for x in (q, k))
    S = np.exp(-np.exp(A_log) * np.logaddexp(0, a + dt_bias)) * S
    S = S + np.outer(k, sigmoid(b) * (v - k @ S))
    return (q / np.sqrt(len(q))) @ S, S


@both_dtypes
@pytest.mark.parametrize(
    ("tokens", "heads", "dims"), [(None, (2, 6), (16, 16)), (3, (3, 3), (32, 64)), (1, (1, 2), (8, 48))]
)
def test_gated_delta(tokens, heads, dims, dtype):
    rng = np.random.default_rng(4)
    (Kh, Vh), (Dk, Dv) = heads, dims
    n, batch, C = tokens or 9, tokens or 2, 2 * Kh * Dk + Vh * Dv
    y, mixed = drawn(rng, (n, C)), drawn(rng, (n, C + Vh * Dv + 2 * Vh), dtype, 2)
    mixed[0, -1] = 30.0  # softplus far out
    A_log, dt_bias = drawn(rng, Vh), drawn(rng, Vh)
    state, o = drawn(rng, (batch, Vh, Dk, Dv)), poisoned((n, Vh * Dv))
    slot = np.array([1 % batch], np.int32)
    S, expected = wide(state), np.zeros((n, Vh, Dv))
    for t in range(n):
        s = slot[0] if tokens is None else t
        q, k, v = np.split(wide(y[t]), [Kh * Dk, 2 * Kh * Dk])
        for h in range(Vh):
            key = slice(h * Kh // Vh * Dk, (h * Kh // Vh + 1) * Dk)
            b, a = wide(mixed[t, C + Vh * Dv + h]), wide(mixed[t, C + Vh * Dv + Vh + h])
            expected[t, h], S[s, h] = delta_rule(
                q[key], k[key], v[h * Dv : (h + 1) * Dv], b, a, A_log[h], dt_bias[h], S[s, h]
            )
    run(OPS.gated_delta(tokens, batch, Kh, Vh, Dk, Dv, dtype), y, mixed, A_log, dt_bias, slot, state, o)
    assert_close(o, expected.reshape(n, -1))
    assert_close(state, S)


@both_dtypes
def test_gated_norm(dtype):
    rng = np.random.default_rng(5)
    n, Kh, Vh, Dk, Dv = 4, 2, 4, 8, 24
    C = 2 * Kh * Dk + Vh * Dv
    o, mixed, w = drawn(rng, (n, Vh * Dv)), drawn(rng, (n, C + Vh * Dv + 2 * Vh), dtype), drawn(rng, Dv)
    y = poisoned((n, Vh * Dv), dtype)
    run(OPS.gated_norm(None, Kh, Vh, Dk, Dv, 1e-6, dtype), o, mixed, w, y)
    z = wide(mixed[:, C : C + Vh * Dv]).reshape(n, Vh, Dv)
    expected = normed(wide(o).reshape(n, Vh, Dv), 1e-6) * w * z * sigmoid(z)
    assert_close(y, expected.reshape(n, -1), dtype)


@both_dtypes
@pytest.mark.parametrize(("tokens", "heads", "kv_heads", "D"), [(None, 6, 2, 32), (None, 3, 3, 40), (2, 5, 1, 256)])
def test_rope_and_attention(tokens, heads, kv_heads, D, dtype):
    rng = np.random.default_rng(6)
    n, batch, context, rotary = tokens or 37, 2, 80, D // 4
    qkv = drawn(rng, (n, (2 * heads + 2 * kv_heads) * D + 3), dtype)
    q_norm, k_norm, q, y = drawn(rng, D), drawn(rng, D), poisoned((n, heads * D)), poisoned((n, heads * D), dtype)
    slot, position = np.array([1], np.int32), np.array([15, 21], np.int32)
    k_cache, v_cache = (drawn(rng, (batch, kv_heads, context, D), dtype) for _ in range(2))
    run(OPS.rope_append(tokens, batch, heads, kv_heads, D, rotary, 1e7, 1e-6, dtype),
        qkv, q_norm, k_norm, slot, position, k_cache, v_cache, q)  # fmt: skip

    def turned(x, w, at):
        x = normed(x, 1e-6) * w
        angle = at * 1e7 ** (-np.arange(rotary // 2) * 2 / rotary)
        a, b = x[:, : rotary // 2].copy(), x[:, rotary // 2 : rotary].copy()
        x[:, : rotary // 2], x[:, rotary // 2 : rotary] = (
            a * np.cos(angle) - b * np.sin(angle),
            b * np.cos(angle) + a * np.sin(angle),
        )
        return x

    query_gate = wide(qkv[:, : 2 * heads * D]).reshape(n, heads, 2, D)
    k, v = wide(qkv[:, 2 * heads * D : -3]).reshape(n, 2, kv_heads, D).swapaxes(0, 1)
    places = [(1, 21 + t) if tokens is None else (t, int(position[t])) for t in range(n)]
    for t, (s, at) in enumerate(places):
        assert_close(q[t], turned(query_gate[t, :, 0], q_norm, at).reshape(-1), factor=3)
        assert_close(k_cache[s, :, at], turned(k[t], k_norm, at), dtype, factor=3)
        assert (wide(v_cache[s, :, at]) == v[t]).all()

    run(OPS.attention(tokens, batch, heads, kv_heads, D, dtype), q, qkv, slot, position, k_cache, v_cache, y)
    for t, (s, at) in enumerate(places):
        for h in range(heads):
            keys, values = (wide(cache[s, h * kv_heads // heads, : at + 1]) for cache in (k_cache, v_cache))
            scores = keys @ wide(q[t, h * D : (h + 1) * D]) / np.sqrt(D)
            weights = np.exp(scores - scores.max())
            expected = weights / weights.sum() @ values * sigmoid(query_gate[t, h, 1])
            assert_close(y[t, h * D : (h + 1) * D], expected, dtype)


def test_last_row_log_probs_and_advance():
    rng = np.random.default_rng(7)
    x, y = drawn(rng, (5, 24)), poisoned((1, 24))
    run(OPS.last_row(24, "float32"), x, y)
    assert (y[0] == x[-1]).all()

    for vocab in (511, 8192):
        logits, targets, logps = drawn(rng, (5, vocab), scale=20), np.arange(5, dtype=np.int32) * 7, poisoned(5)
        run(OPS.log_probs(vocab), logits, targets, logps)
        shifted = wide(logits) - wide(logits).max(-1, keepdims=True)
        assert_close(logps, shifted[np.arange(5), targets] - np.log(np.exp(shifted).sum(-1)))

    position, slot, result = np.array([3, 4], np.int32), np.array([1], np.int32), drawn(rng, (1, 8))
    run(OPS.advance(None, 2, (1, 8)), np.zeros(6, np.int32), slot, position, result)
    assert list(position) == [3, 10]
    run(OPS.advance(2, 2, (2, 8)), np.zeros(2, np.int32), slot, position, drawn(rng, (2, 8)))
    assert list(position) == [4, 11]
