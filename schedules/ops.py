"""The model's own operations (everything that is not a matrix product): what each computes, and who builds it where.

Every builder stands under the same name, with the same arguments, in `schedules/cpu/` and `schedules/cuda/` and
returns a PrimFunc. A PrimFunc's arguments stand in the order of the docstrings below: inputs, then buffers updated
in place, then outputs. Common to all:

- `tokens`: None, a symbolic number n of tokens of one sequence (prefill, score): all belong to `slot[0]`, token i
  stands at position `position[slot[0]] + i`. An int, one token for each of n = tokens sequences (decode; equals
  `batch`): token i belongs to slot i and stands at `position[i]`; `slot` is passed and not read.
- `dtype`: activations and caches, "bfloat16" or "float32". Arithmetic is float32, `f32` below is always float32.
- `slot` is int32 [1], `position` int32 [batch]: the number of tokens a sequence already holds.
- A sequence starts with conv and recurrent state zero and position 0; its owner clears them.
- Dimensions that no builder argument names are symbolic: P (row length of a fused projection), T (context).
- Results do not depend on the number of threads: no atomics, one fixed order of summation.
"""

from __future__ import annotations

import json
from importlib import import_module

import tvm
from tvm.s_tir.stmt import SBlock, SBlockRealize

PrimFunc = tvm.tirx.PrimFunc

OPERATION_ATTR = "tvm_sparse.operation"
"""What a PrimFunc of ModelOps computes: its name and its builder's arguments, as JSON."""

ATTRIBUTES = {"op_pattern": 8, "tirx.is_scheduled": True, "tirx.noalias": True}
"""Carried by every PrimFunc of a builder: opaque to operator fusion, already scheduled, no two arguments overlap."""


def as_kernel(function: PrimFunc) -> PrimFunc:
    """A PrimFunc as Relax calls it: private, with ATTRIBUTES, its body in a root block (Relax looks for one)."""
    if not isinstance(function.body, SBlockRealize):
        function = function.with_body(SBlockRealize([], True, SBlock([], [], [], "root", function.body)))
    return function.without_attr("global_symbol").with_attr(ATTRIBUTES)


MODULES = {
    "embedding": "embedding",
    "rms_norm": "rms_norm",
    "add_rms_norm": "rms_norm",
    "silu_mul": "silu_mul",
    "causal_conv": "causal_conv",
    "gated_delta": "gated_delta",
    "gated_norm": "gated_norm",
    "delta_step": "delta_step",
    "rope_append": "rope_append",
    "attention": "attention",
    "attention_part": "attention_step",
    "attention_join": "attention_step",
    "last_row": "last_row",
    "log_probs": "log_probs",
    "advance": "advance",
    "pick_part": "pick",
    "pick_join": "pick",
    "candidates_part": "candidates",
    "candidates_join": "candidates",
}
"""Operation -> module under schedules/cpu and schedules/cuda that builds it."""


class ModelOps:
    """The operations for one device, "cpu" or "cuda"."""

    PICKS = 128
    """Stretches of the vocabulary that pick_part and candidates_part look at."""

    KEPT = 64
    """The largest logits that candidates_join gives."""

    def __init__(self, device: str) -> None:
        if device not in ("cpu", "cuda"):
            raise ValueError(f"no model operations for device {device!r}: cpu or cuda")
        self.device = device
        self._built: dict[tuple, PrimFunc] = {}

    def _build(self, name: str, *static: object) -> PrimFunc:
        """Each PrimFunc is made once: parsing takes longer than everything else about a layer."""
        key = (name, *static)
        if key not in self._built:
            module = import_module(f"tvm_sparse.schedules.{self.device}.{MODULES[name]}")
            built = as_kernel(getattr(module, name)(*static))
            self._built[key] = built.with_attr(OPERATION_ATTR, json.dumps(key))
        return self._built[key]

    def embedding(self, tokens: int | None, vocab: int, hidden: int, table_dtype: str, dtype: str) -> PrimFunc:
        """(ids [n] int32, table [vocab, hidden] table_dtype, y [n, hidden] dtype): y = table[ids]."""
        return self._build("embedding", tokens, vocab, hidden, table_dtype, dtype)

    def rms_norm(self, tokens: int | None, hidden: int, eps: float, dtype: str) -> PrimFunc:
        """(x [n, hidden] dtype, w [hidden] f32, y [n, hidden] dtype): y = x * rsqrt(mean(x^2) + eps) * w."""
        return self._build("rms_norm", tokens, hidden, eps, dtype)

    def add_rms_norm(self, tokens: int | None, hidden: int, eps: float, dtype: str) -> PrimFunc:
        """(x [n, hidden], delta [n, hidden], w [hidden] f32, total [n, hidden], y [n, hidden]), all but w of dtype.

        total = x + delta, rounded to dtype; y = rms_norm(total as rounded).
        """
        return self._build("add_rms_norm", tokens, hidden, eps, dtype)

    def silu_mul(self, tokens: int | None, inner: int, dtype: str) -> PrimFunc:
        """(gate_up [n, 2 inner] dtype, y [n, inner] dtype): y = silu(gate) * up."""
        return self._build("silu_mul", tokens, inner, dtype)

    def causal_conv(self, tokens: int | None, batch: int, channels: int, dtype: str) -> PrimFunc:
        """(mixed [n, P] dtype, w [channels, 4] f32, slot, conv_state [batch, 3, channels] f32 in place,
        y [n, channels] f32).

        Depthwise causal convolution of width 4 over columns 0..channels-1 of `mixed`, then silu:
        y[t, c] = silu(sum_j w[c, j] x[t - 3 + j, c]). The state holds the three rows before the first token, oldest
        first, and afterwards the last three rows; with n < 3 the older ones move up.
        """
        return self._build("causal_conv", tokens, batch, channels, dtype)

    def gated_delta(
        self,
        tokens: int | None,
        batch: int,
        key_heads: int,
        value_heads: int,
        key_dim: int,
        value_dim: int,
        dtype: str,
    ) -> PrimFunc:
        """(y [n, C] f32, mixed [n, P] dtype, A_log [Vh] f32, dt_bias [Vh] f32, slot,
        state [batch, Vh, Dk, Dv] f32 in place, o [n, Vh Dv] f32).

        The gated delta rule, Yang et al. 2024 (arXiv:2412.06464), equation 10.

        y is causal_conv's result, q [Kh, Dk] | k [Kh, Dk] | v [Vh, Dv], C = 2 Kh Dk + Vh Dv. Columns of `mixed` from
        C + Vh Dv on: b [Vh] | a [Vh]. Value head h uses key head h // (Vh / Kh). For each token and value head:
        q, k = x * rsqrt(sum(x^2) + 1e-6), q /= sqrt(Dk); beta = sigmoid(b); g = -exp(A_log) * softplus(a + dt_bias);
        S = exp(g) S; delta = beta (v - S^T k); S = S + k delta^T; o = S^T q.
        """
        return self._build("gated_delta", tokens, batch, key_heads, value_heads, key_dim, value_dim, dtype)

    def gated_norm(
        self,
        tokens: int | None,
        key_heads: int,
        value_heads: int,
        key_dim: int,
        value_dim: int,
        eps: float,
        dtype: str,
    ) -> PrimFunc:
        """(o [n, Vh Dv] f32, mixed [n, P] dtype, w [Dv] f32, y [n, Vh Dv] dtype).

        For each head: y = w * o * rsqrt(mean(o^2) + eps) * silu(z); z = columns C .. C + Vh Dv - 1 of `mixed`,
        C = 2 Kh Dk + Vh Dv. w is plain (not 1 + w).
        """
        return self._build("gated_norm", tokens, key_heads, value_heads, key_dim, value_dim, eps, dtype)

    def has_delta_step(self, key_heads: int, value_heads: int, value_dim: int) -> bool:
        """Whether a decode step has `delta_step`: on a GPU, with as many value heads a key head as a cluster holds."""
        if self.device == "cpu":
            return False
        from tvm_sparse.schedules.cuda.delta_step import splits_of

        return splits_of(key_heads, value_heads, value_dim) > 0

    def delta_step(
        self, tokens: int, key_heads: int, value_heads: int, key_dim: int, value_dim: int, eps: float, dtype: str
    ) -> PrimFunc:
        """(mixed [n, P] dtype, w_conv [C, 4] f32, A_log [Vh] f32, dt_bias [Vh] f32, w_norm [Dv] f32,
        conv_state [n, 3, C] f32 in place, state [n, Vh, Dk, Dv] f32 in place, y [n, Vh Dv] dtype).

        causal_conv, gated_delta and gated_norm for one token of each of n sequences. Decode only.
        """
        return self._build("delta_step", tokens, key_heads, value_heads, key_dim, value_dim, eps, dtype)

    def rope_append(
        self,
        tokens: int | None,
        batch: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        rotary_dim: int,
        theta: float,
        eps: float,
        dtype: str,
    ) -> PrimFunc:
        """(qkv [n, P] dtype, q_norm [D] f32, k_norm [D] f32, slot, position, k_cache [batch, Hkv, T, D] dtype in place,
        v_cache likewise in place, q [n, Hq D] f32).

        Columns of `qkv`: for each query head q [D] | gate [D]; then k [Hkv, D], then v [Hkv, D]. q and k are RMS-normed
        over D with q_norm, k_norm (1 + w already), then rotated: the first rotary_dim dims, in pairs
        (i, i + rotary_dim / 2), by angle position * theta^(-2 i / rotary_dim), inverse frequency and angle rounded to
        float32 (cos and sin must hold for angles up to 262144: no fast-math variants). k and v go to the caches at
        the token's position.
        """
        return self._build(
            "rope_append",
            tokens,
            batch,
            heads,
            kv_heads,
            head_dim,
            rotary_dim,
            theta,
            eps,
            dtype,
        )

    def attention(
        self, tokens: int | None, batch: int, heads: int, kv_heads: int, head_dim: int, dtype: str
    ) -> PrimFunc:
        """(q [n, Hq D] f32, qkv [n, P] dtype, slot, position, k_cache [batch, Hkv, T, D] dtype, v_cache likewise,
        y [n, Hq D] dtype): softmax(q k^T / sqrt(D)) v over positions 0 .. the token's own, times sigmoid(gate).

        Query head h reads key head h // (Hq / Hkv). `position` is still the one before this call's tokens, the caches
        already hold them. Gates stand in `qkv` as rope_append says.
        """
        return self._build("attention", tokens, batch, heads, kv_heads, head_dim, dtype)

    def attention_shares(
        self, tokens: int, heads: int, kv_heads: int, head_dim: int, rotary_dim: int, dtype: str
    ) -> int:
        """Into how many shares a decode step may split a context: 0 where it has no `attention_part`."""
        if self.device == "cpu":
            return 0
        from tvm_sparse.schedules.cuda.attention_step import shares_of

        return shares_of(tokens, heads, kv_heads, head_dim, rotary_dim, dtype)

    def attention_part(
        self,
        tokens: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        rotary_dim: int,
        theta: float,
        eps: float,
        dtype: str,
    ) -> PrimFunc:
        """(qkv [n, P] dtype, q_norm [D] f32, k_norm [D] f32, position [n], k_cache [n, Hkv, T, D] dtype in place,
        v_cache likewise in place, sums [n, Hq, S, D] f32, marks [n, Hq, S, 2] f32).

        rope_append and attention for one token of each of n sequences, as far as each of S shares of the context
        goes: the sum of values with weights 2^(score - largest), the largest score (in base 2) and the sum of the
        weights. Which shares a length uses, and leaves unwritten, is known to attention_join. Decode only.
        """
        return self._build(
            "attention_part", tokens, heads, kv_heads, head_dim, rotary_dim, theta, eps, dtype
        )

    def attention_join(
        self, tokens: int, heads: int, kv_heads: int, head_dim: int, rotary_dim: int, dtype: str
    ) -> PrimFunc:
        """(sums, marks, qkv [n, P] dtype, position [n], k_cache, y [n, Hq D] dtype): attention's result, gated."""
        return self._build("attention_join", tokens, heads, kv_heads, head_dim, rotary_dim, dtype)

    def last_row(self, hidden: int, dtype: str) -> PrimFunc:
        """(x [n, hidden] dtype, y [1, hidden] dtype): the last token's row, n symbolic."""
        return self._build("last_row", hidden, dtype)

    def log_probs(self, vocab: int) -> PrimFunc:
        """(logits [n, vocab] f32, targets [n] int32, y [n] f32): y = log_softmax(logits)[target], n symbolic."""
        return self._build("log_probs", vocab)

    def advance(self, tokens: int | None, batch: int, result_shape: tuple[int | None, ...]) -> PrimFunc:
        """(ids [n] int32, slot, position [batch] in place, result f32 in place): n tokens are done.

        tokens None: position[slot[0]] += n; else each position += 1. `result` (logits or log-probabilities, a None in
        its shape is n) is neither read nor written: it passes through so that the update can be neither dropped
        nor moved before the reads of `position`.
        """
        return self._build("advance", tokens, batch, result_shape)

    def pick_part(self, tokens: int, vocab: int) -> PrimFunc:
        """(logits [n, vocab] f32, values [n, PICKS] f32, places [n, PICKS] int32): each stretch's largest logit.

        Of equal ones the first. Only on a GPU, where logits do not have to come to the host.
        """
        return self._build("pick_part", tokens, vocab, self.PICKS)

    def pick_join(self, tokens: int) -> PrimFunc:
        """(values [n, PICKS] f32, places [n, PICKS] int32, ids [n] int32): the place of the largest. Only on a GPU."""
        return self._build("pick_join", tokens, self.PICKS)

    def candidates_part(self, tokens: int, vocab: int) -> PrimFunc:
        """(logits [n, vocab] f32, scale [1] f32, keys [n, PICKS, KEPT] uint64, sums [n, PICKS, 2] f32).

        Each stretch's largest logits in order, packed with their ids; its largest times scale, and the sum of
        e^((logit - largest) scale). Only on a GPU.
        """
        return self._build("candidates_part", tokens, vocab, self.PICKS)

    def candidates_join(self, tokens: int) -> PrimFunc:
        """(keys, sums, values [n, KEPT] f32, ids [n, KEPT] int32, log_sum [n] f32).

        The largest logits in order, of equal ones the first, and log sum e^(logit scale) over all. Only on a GPU.
        """
        return self._build("candidates_join", tokens, self.PICKS)
