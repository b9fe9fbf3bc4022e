"""The Qwen3.5 text model as a Relax module, dense: three functions that share every operation.

  prefill(ids [n], slot [1], position [B], state..., params...)            -> logits [1, V] of the last token
  decode (ids [B], slot [1], position [B], state..., params...)            -> logits [B, V], one token for every slot
  score  (ids [n], slot [1], position [B], targets [n], state..., params...) -> log-probabilities [n] of the targets

ids, slot, position and targets are int32, logits and log-probabilities float32. State and position are updated in
place; what a slot holds is continued, so a long prompt may come in pieces. Every projection is a plain
`matmul(x, permute_dims(w))` on a parameter with the checkpoint's own short name: what a projection becomes is decided
by passes, not here. Operations between the projections are `schedules.ops`.

Shapes: n tokens (symbolic in prefill and score, B in decode), h hidden, P a fused projection's rows, T the context.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import tvm
from tvm import relax

from tvm_sparse.layout import make_layout
from tvm_sparse.models.config import LINEAR, ModelConfig, tensors
from tvm_sparse.passes.bundle_parameters import NUM_STATE_ATTR
from tvm_sparse.schedules.ops import ModelOps

CONTEXT = "context"
"""Stands for the symbolic dimension T in a StateTensor's shape."""


@dataclass(frozen=True)
class Chunks:
    """The most tokens one call may bring: memory is planned for so many."""

    prefill: int
    score: int


CHUNKS = {"cpu": Chunks(prefill=256, score=64), "cuda": Chunks(prefill=2048, score=256)}


@dataclass(frozen=True)
class StateTensor:
    """A tensor that lives from call to call, owned by the caller, zero before a sequence's first token."""

    name: str
    shape: tuple[int | str, ...]
    dtype: str


def state_tensors(config: ModelConfig, batch: int, dtype: str) -> tuple[StateTensor, ...]:
    """All state in the order the functions take it: two tensors a layer."""
    kv = (batch, config.num_key_value_heads, CONTEXT, config.head_dim)
    conv = (batch, config.linear_conv_kernel_dim - 1, config.conv_dim)
    recurrent = (
        batch,
        config.linear_num_value_heads,
        config.linear_key_head_dim,
        config.linear_value_head_dim,
    )
    found: list[StateTensor] = []
    for layer, kind in enumerate(config.layer_types):
        if kind == LINEAR:
            found.append(StateTensor(f"layers.{layer}.conv_state", conv, "float32"))
            found.append(StateTensor(f"layers.{layer}.recurrent_state", recurrent, "float32"))
        else:
            found.append(StateTensor(f"layers.{layer}.k_cache", kv, dtype))
            found.append(StateTensor(f"layers.{layer}.v_cache", kv, dtype))
    return tuple(found)


def build_module(
    config: ModelConfig,
    dtype: str = "bfloat16",
    batch: int = 1,
    device: str = "cpu",
    weight_dtype: str | None = None,
    wide: Collection[str] = (),
) -> tvm.IRModule:
    """The dense module with functions prefill, decode and score.

    `dtype` is that of activations and caches, `weight_dtype` (default: the same) that of matrices and embedding,
    but for those of the layout's parameters named in `wide`, which are float32; norms and the other vectors are
    float32, laid out as the layout says. `device` ("cpu" or "cuda") picks the kernels
    of the operations between projections.
    """
    builder = relax.BlockBuilder()
    ops = ModelOps(device)
    for name in ("prefill", "decode", "score"):
        _Writer(name, builder, ops, config, dtype, batch, weight_dtype or dtype, wide).write()
    if device == "cuda":
        _write_pick(builder, ops, batch, config.vocab_size)
        _write_candidates(builder, ops, batch, config.vocab_size)
    return builder.finalize()


def _write_candidates(builder: relax.BlockBuilder, ops: ModelOps, batch: int, vocab: int) -> None:
    """candidates(logits [B, V], scale [1]) -> values [B, K], ids [B, K], log_sum [B]: what sampling needs of them."""
    logits, scale = _var("logits", (batch, vocab), "float32"), _var("scale", (1,), "float32")
    part = builder.add_func(ops.candidates_part(batch, vocab), "candidates_part")
    join = builder.add_func(ops.candidates_join(batch), "candidates_join")
    with builder.function("candidates", [logits, scale]):
        with builder.dataflow():
            parts = [((batch, ops.PICKS, ops.KEPT), "uint64"), ((batch, ops.PICKS, 2), "float32")]
            found = builder.emit(
                relax.op.call_tir(part, relax.Tuple([logits, scale]), [relax.TensorType(*each) for each in parts])
            )
            both = relax.Tuple([builder.emit(relax.TupleGetItem(found, i)) for i in range(2)])
            results = [((batch, ops.KEPT), "float32"), ((batch, ops.KEPT), "int32"), ((batch,), "float32")]
            out = builder.emit_output(relax.op.call_tir(join, both, [relax.TensorType(*each) for each in results]))
        builder.emit_func_output(out)


def _write_pick(builder: relax.BlockBuilder, ops: ModelOps, batch: int, vocab: int) -> None:
    """pick(logits [B, V], ids [B]): each sequence's likeliest token becomes the next step's input, on the device."""
    logits, ids = _var("logits", (batch, vocab), "float32"), _var("ids", (batch,), "int32")
    part, join = (builder.add_func(kernel, kernel_name) for kernel, kernel_name in (
        (ops.pick_part(batch, vocab), "pick_part"), (ops.pick_join(batch), "pick_join")))  # fmt: skip
    with builder.function("pick", [logits, ids]):
        with builder.dataflow():
            winners = [relax.TensorType((batch, ops.PICKS), dtype) for dtype in ("float32", "int32")]
            found = builder.emit(relax.op.call_tir(part, relax.Tuple([logits]), winners))
            arguments = relax.Tuple([*(builder.emit(relax.TupleGetItem(found, i)) for i in range(2)), ids])
            chosen = builder.emit_output(relax.op.call_tir_inplace(join, arguments, [2], [ids.ty]))
        builder.emit_func_output(chosen)


class _Writer:
    """Writes one function: `write` is the model, the methods after it one part each."""

    def __init__(
        self,
        name: str,
        builder: relax.BlockBuilder,
        ops: ModelOps,
        config: ModelConfig,
        dtype: str,
        batch: int,
        weight_dtype: str,
        wide: Collection[str],
    ) -> None:
        self.name, self.builder, self.ops, self.config = name, builder, ops, config
        self.dtype, self.batch = dtype, batch
        self.tokens = batch if name == "decode" else None  # as schedules.ops counts them
        self.n = batch if name == "decode" else tvm.tirx.Var("n", "int64")
        context = tvm.tirx.Var("T", "int64")

        self.ids = _var("ids", (self.n,), "int32")
        self.slot = _var("slot", (1,), "int32")
        self.position = _var("position", (batch,), "int32")
        self.targets = _var("targets", (self.n,), "int32")
        self.state = {
            tensor.name: _var(tensor.name, [context if d == CONTEXT else d for d in tensor.shape], tensor.dtype)
            for tensor in state_tensors(config, batch, dtype)
        }
        known = tensors(config)
        self.weights = {}
        for param in make_layout(config).params:
            matrix_dtype = "float32" if param.name in wide else weight_dtype
            for source in param.sources:
                vector = param.dtype == "float32"  # shaped by the layout, a matrix as in the checkpoint
                shape = param.shape if vector else known[source].shape
                self.weights[source] = _var(source, shape, "float32" if vector else matrix_dtype)

    def write(self) -> None:
        inputs = [self.ids, self.slot, self.position, *([self.targets] if self.name == "score" else [])]
        parameters = [*inputs, *self.state.values(), *self.weights.values()]
        attrs: dict[str, object] = {"num_input": len(inputs) + len(self.state), NUM_STATE_ATTR: len(self.state)}
        if self.tokens is None:
            attrs["tir_var_upper_bound"] = {"n": getattr(CHUNKS[self.ops.device], self.name)}
        with self.builder.function(self.name, parameters, attrs):
            with self.builder.dataflow():
                result = self.builder.emit_output(self.model())
            self.builder.emit_func_output(result)

    def model(self) -> relax.Expr:
        c = self.config
        table = self.weights["embed_tokens.weight"]
        x = self.call(
            "embedding", (c.vocab_size, c.hidden_size, str(table.ty.dtype), self.dtype),
            [self.ids, table], [((self.n, c.hidden_size), self.dtype)],
        )  # fmt: skip
        y = self.norm(x, "layers.0.input_layernorm.weight")
        for layer, kind in enumerate(c.layer_types):
            weights = f"layers.{layer}"
            delta = self.deltanet(y, layer, weights) if kind == LINEAR else self.attention(y, layer, weights)
            x, y = self.add_norm(x, delta, f"{weights}.post_attention_layernorm.weight")
            delta = self.mlp(y, weights)
            last = layer + 1 == c.num_hidden_layers
            x, y = self.add_norm(x, delta, "norm.weight" if last else f"layers.{layer + 1}.input_layernorm.weight")
        return self.finish(self.head(y))

    def head(self, y: relax.Expr) -> relax.Expr:
        """Final hidden states [n, h] -> logits float32 [1 | B, V], or log-probabilities [n]."""
        c = self.config
        if self.name == "prefill":
            y = self.call("last_row", (c.hidden_size, self.dtype), [y], [((1, c.hidden_size), self.dtype)], False)
        head = "embed_tokens.weight" if c.tie_word_embeddings else "lm_head.weight"
        logits = self.project(y, head, "float32")
        if self.name != "score":
            return logits
        return self.call("log_probs", (c.vocab_size,), [logits, self.targets], [((self.n,), "float32")], False)

    def finish(self, result: relax.Expr) -> relax.Expr:
        """Advances the position; `result` passes through, so that this happens last and is not dropped."""
        shape = {"prefill": (1, self.config.vocab_size), "decode": (self.batch, self.config.vocab_size)}
        static = shape.get(self.name, (None,))
        return self.call(
            "advance", (self.batch, static), [self.ids, self.slot, self.position, result],
            [((self.batch,), "int32"), (result.ty.shape, "float32")], in_place=[2, 3],
        )[1]  # fmt: skip

    def mlp(self, y: relax.Expr, weights: str) -> relax.Expr:
        """[n, h] -> [n, h]: down(silu(gate y) * up y)."""
        gate_up = self.project_all(y, [f"{weights}.mlp.{part}_proj.weight" for part in ("gate", "up")])
        inner = self.config.intermediate_size
        hidden = self.call("silu_mul", (inner, self.dtype), [gate_up], [((self.n, inner), self.dtype)])
        return self.project(hidden, f"{weights}.mlp.down_proj.weight")

    def deltanet(self, y: relax.Expr, layer: int, weights: str) -> relax.Expr:
        """[n, h] -> [n, h]: short convolution, gated delta rule, gated norm."""
        c, inside = self.config, f"{weights}.linear_attn"
        sizes = (c.linear_num_key_heads, c.linear_num_value_heads, c.linear_key_head_dim, c.linear_value_head_dim)
        conv_state, recurrent = (self.state[f"layers.{layer}.{name}"] for name in ("conv_state", "recurrent_state"))
        # [n, P]: q | k | v (C columns), z, b, a
        mixed = self.project_all(y, [f"{inside}.in_proj_{part}.weight" for part in ("qkv", "z", "b", "a")])
        if self.tokens is not None and self.ops.has_delta_step(sizes[0], sizes[1], sizes[3]):
            names = ("conv1d.weight", "A_log", "dt_bias", "norm.weight")
            vectors = [self.weights[f"{inside}.{name}"] for name in names]
            o, _, _ = self.call(
                "delta_step", (*sizes, c.rms_norm_eps, self.dtype), [mixed, *vectors, conv_state, recurrent],
                [((self.n, c.value_dim), self.dtype), *((t.ty.shape, "float32") for t in (conv_state, recurrent))],
                in_place=[-1, 5, 6],
            )  # fmt: skip
            return self.project(o, f"{inside}.out_proj.weight")
        qkv, _ = self.call(
            "causal_conv", (self.batch, c.conv_dim, self.dtype),
            [mixed, self.weights[f"{inside}.conv1d.weight"], self.slot, conv_state],
            [((self.n, c.conv_dim), "float32"), (conv_state.ty.shape, "float32")], in_place=[-1, 3],
        )  # fmt: skip
        o, _ = self.call(
            "gated_delta", (self.batch, *sizes, self.dtype),
            [qkv, mixed, self.weights[f"{inside}.A_log"], self.weights[f"{inside}.dt_bias"], self.slot, recurrent],
            [((self.n, c.value_dim), "float32"), (recurrent.ty.shape, "float32")], in_place=[-1, 5],
        )  # fmt: skip
        o = self.call(
            "gated_norm", (*sizes, c.rms_norm_eps, self.dtype), [o, mixed, self.weights[f"{inside}.norm.weight"]],
            [((self.n, c.value_dim), self.dtype)],
        )  # fmt: skip
        return self.project(o, f"{inside}.out_proj.weight")

    def attention(self, y: relax.Expr, layer: int, weights: str) -> relax.Expr:
        """[n, h] -> [n, h]: gated attention over everything the slot holds."""
        c, inside = self.config, f"{weights}.self_attn"
        sizes = (self.batch, c.num_attention_heads, c.num_key_value_heads, c.head_dim)
        k_cache, v_cache = (self.state[f"layers.{layer}.{name}"] for name in ("k_cache", "v_cache"))
        cache = (k_cache.ty.shape, self.dtype)
        # [n, P]: each query head's q | gate, then k, v
        qkv = self.project_all(y, [f"{inside}.{part}_proj.weight" for part in ("q", "k", "v")])
        norms = [self.weights[f"{inside}.{part}_norm.weight"] for part in "qk"]
        if self.tokens is not None and (shares := self.ops.attention_shares(*sizes, c.rotary_dim, self.dtype)):
            sums, marks, k_cache, v_cache = self.call(
                "attention_part", (*sizes[1:], c.rotary_dim, c.rope_theta, c.rms_norm_eps, self.dtype),
                [qkv, *norms, self.position, k_cache, v_cache],
                [((self.n, sizes[1], shares, size), "float32") for size in (c.head_dim, 2)] + [cache, cache],
                in_place=[-1, -1, 4, 5],
            )  # fmt: skip
            o = self.call(
                "attention_join", (*sizes[1:], c.rotary_dim, self.dtype), [sums, marks, qkv, self.position, k_cache],
                [((self.n, c.query_dim), self.dtype)],
            )  # fmt: skip
            return self.project(o, f"{inside}.o_proj.weight")
        q, k_cache, v_cache = self.call(
            "rope_append", (*sizes, c.rotary_dim, c.rope_theta, c.rms_norm_eps, self.dtype),
            [qkv, *norms, self.slot, self.position, k_cache, v_cache],
            [((self.n, c.query_dim), "float32"), cache, cache], in_place=[-1, 5, 6],
        )  # fmt: skip
        o = self.call(
            "attention", (*sizes, self.dtype), [q, qkv, self.slot, self.position, k_cache, v_cache],
            [((self.n, c.query_dim), self.dtype)],
        )  # fmt: skip
        return self.project(o, f"{inside}.o_proj.weight")

    def norm(self, x: relax.Expr, weight: str) -> relax.Expr:
        c = self.config
        return self.call(
            "rms_norm", (c.hidden_size, c.rms_norm_eps, self.dtype), [x, self.weights[weight]],
            [((self.n, c.hidden_size), self.dtype)],
        )  # fmt: skip

    def add_norm(self, x: relax.Expr, delta: relax.Expr, weight: str) -> tuple[relax.Expr, relax.Expr]:
        """The residual stream x + delta [n, h], and its norm."""
        c = self.config
        total, y = self.call(
            "add_rms_norm", (c.hidden_size, c.rms_norm_eps, self.dtype), [x, delta, self.weights[weight]],
            [((self.n, c.hidden_size), self.dtype)] * 2,
        )  # fmt: skip
        return total, y

    def project(self, x: relax.Expr, weight: str, out_dtype: str | None = None) -> relax.Expr:
        """x [m, K] -> [m, N] with weight [N, K]."""
        transposed = self.builder.emit(relax.op.permute_dims(self.weights[weight]))
        return self.builder.emit(relax.op.matmul(x, transposed, out_dtype=out_dtype or self.dtype))

    def project_all(self, x: relax.Expr, weights: list[str]) -> relax.Expr:
        """Several projections of one input, side by side: FuseProjections makes one of them."""
        return self.builder.emit(relax.op.concat([self.project(x, weight) for weight in weights], axis=-1))

    def call(
        self,
        operation: str,
        static: tuple,
        inputs: list[relax.Expr],
        outputs: list[tuple],
        counted: bool = True,
        in_place: list[int] | None = None,
    ):
        """One of schedules.ops; `counted` operations take the number of tokens first.

        `outputs` are (shape, dtype), `in_place` names for each the input it overwrites (-1: none). Returns the
        results as a tuple, a single one bare.
        """
        kernel = getattr(self.ops, operation)(*((self.tokens,) if counted else ()), *static)
        function = self.builder.add_func(kernel, f"{operation}_{self.name}" if counted else operation)
        types = [relax.TensorType(shape, dtype) for shape, dtype in outputs]
        arguments = relax.Tuple(inputs)
        result = self.builder.emit(
            relax.op.call_tir(function, arguments, types if len(types) > 1 else types[0])
            if in_place is None
            else relax.op.call_tir_inplace(function, arguments, in_place, types)
        )
        if len(types) == 1:
            return result
        return tuple(self.builder.emit(relax.TupleGetItem(result, i)) for i in range(len(types)))


def _var(name: str, shape, dtype: str) -> relax.Var:
    return relax.Var(name, relax.TensorType(shape, dtype))
