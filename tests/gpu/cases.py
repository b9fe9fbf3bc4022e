"""What the GPU scripts check: built here by build_library.py, run on a GPU host without TVM's compiler."""

from __future__ import annotations

from dataclasses import dataclass

from tvm_sparse.formats import FORMATS
from tvm_sparse.formats.base import FormatChoice

RAGGED = ((1, 8), (33, 40), (100, 17), (257, 1000), (1000, 999))
TOKENS: tuple[int | None, ...] = (1, 3, None)


@dataclass(frozen=True)
class Matmul:
    """One kernel under test; `decisions` empty means the defaults, `norm_eps` and `after` are KernelSpec's."""

    choice: FormatChoice
    n: int
    k: int
    m: int | None
    x_dtype: str
    out_dtype: str
    decisions: tuple[tuple[str, int], ...] = ()
    norm_eps: float = 0.0
    after: str = ""

    @property
    def name(self) -> str:
        options = "_".join(f"{value}" for _, value in self.choice.options)
        chosen = "_".join(f"{key}{value}" for key, value in self.decisions)
        parts = ("w" + self.choice.name.replace(":", "to"), options, f"{self.n}x{self.k}", f"m{self.m}")
        fused = "norm" if self.norm_eps else ""
        return "_".join((*parts, self.x_dtype, self.out_dtype, chosen, fused, self.after))


def _choices() -> list[FormatChoice]:
    dense, delta, block = FORMATS["dense"], FORMATS["delta"], FORMATS["block"]
    return [
        dense.choice(),
        dense.choice(32),
        FORMATS["bitmap"].choice(),
        FORMATS["2:4"].choice(),
        FORMATS["tiles"].choice(4, 7, 2, 3, 6),
        FORMATS["tiles"].choice(5, 132, 16, 1, 1),
        FORMATS["gather"].choice(4, 7, 3, 8, 1),
        FORMATS["gather"].choice(5, 132, 24, 4, 2),
        block.choice(16, 16),
        block.choice(1, 32),
        block.choice(4, 8),
        delta.choice(4, 132, 16, 8, 4),
        delta.choice(3, 7, 1, 1, 8),
        delta.choice(5, 264, 12, 16, 4),
        delta.choice(6, 3, 24, 32, 8),
        delta.choice(4, 132, 24, 8, 9),
        delta.choice(3, 5, 2, 32, 9),
    ]


def matmuls() -> list[Matmul]:
    """Every format on ragged shapes, with bfloat16 and float32 ends."""
    types = (("bfloat16", "float32"), ("float32", "float32"), ("bfloat16", "bfloat16"))
    found = []
    for index, (choice, (n, k), m) in enumerate(
        (c, s, m) for c in _choices() for s in RAGGED for m in TOKENS
    ):
        found.append(Matmul(choice, n, k, m, *types[index % 3]))
    large = [FORMATS["delta"].choice(classes=32), FORMATS["bitmap"].choice(), FORMATS["dense"].choice()]
    found += [Matmul(c, 512, 17408, m, "bfloat16", "bfloat16") for c in large for m in (1, 8, None)]
    usual = [FORMATS["delta"].choice(gap_bits, 132, 24, 8, unit) for gap_bits, unit in ((4, 9), (6, 4))]
    found += [Matmul(c, 1555, 1544, m, "bfloat16", "bfloat16") for c in usual for m in (2, 4, 5, 8, 12, 16, 24)]
    tiles = FORMATS["tiles"].choice(4, 20, 8, 2, 5)
    found += [Matmul(tiles, 1555, 1544, m, "bfloat16", "bfloat16") for m in (*range(1, 17), 17, 40)]
    gather = FORMATS["gather"].choice(4, 20, 24, 4, 2)
    found += [Matmul(gather, 1555, 1544, m, "bfloat16", "bfloat16") for m in (*range(1, 17), 17, 40)]
    for (n, k), unit, pairs, out_dtype, eps, after in (
        ((34816, 5120), 9, 1, "bfloat16", 1e-6, "silu_mul"),
        ((5120, 6144), 9, 0, "bfloat16", 0.0, "add"),
        ((1000, 5120), 4, 0, "float32", 1e-6, ""),
        ((600, 136), 4, 1, "float32", 1e-6, "silu_mul"),
        ((333, 100), 9, 0, "float32", 0.0, "add"),
    ):
        choice = FORMATS["delta"].choice(unit=unit, pairs=pairs)
        found.append(Matmul(choice, n, k, 1, "bfloat16", out_dtype, (), eps, after))
    return found


@dataclass(frozen=True)
class Shape:
    """A model's sizes; `batch` sequences decode together."""

    name: str
    batch: int
    hidden: int
    inner: int
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    heads: int
    kv_heads: int
    head_dim: int
    rotary_dim: int
    vocab: int
    dtype: str
    theta: float = 1e7
    eps: float = 1e-6

    @property
    def channels(self) -> int:
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim

    @property
    def shares(self) -> int:
        """As ModelOps.attention_shares, which needs TVM's compiler; a test compares them."""
        fits = self.dtype == "bfloat16" and self.head_dim % 64 == 0
        return min(64, 128 // (self.batch * self.kv_heads)) if fits else 0


SHAPES = (
    Shape("large", 2, 5120, 17408, 16, 48, 128, 128, 24, 4, 256, 64, 248320, "bfloat16"),
    Shape("tiny", 3, 64, 160, 2, 6, 16, 16, 4, 2, 32, 8, 512, "float32"),
    Shape("one", 1, 5120, 17408, 16, 48, 128, 128, 24, 4, 256, 64, 512, "bfloat16"),
    Shape("narrow", 5, 128, 256, 4, 8, 32, 32, 8, 1, 64, 16, 512, "bfloat16"),
    Shape("odd", 2, 100, 77, 3, 3, 24, 40, 5, 1, 96, 24, 1001, "bfloat16"),
)


def operations(shape: Shape, ops) -> dict[str, object]:
    """{kernel name: PrimFunc} of every model operation, prefill ("_p") and decode ("_d")."""
    s, found = shape, {}
    delta = (s.key_heads, s.value_heads, s.key_dim, s.value_dim)
    for tag, t in (("p", None), ("d", s.batch)):
        built = {
            "embedding": ops.embedding(t, s.vocab, s.hidden, "bfloat16", s.dtype),
            "rms_norm": ops.rms_norm(t, s.hidden, s.eps, s.dtype),
            "add_rms_norm": ops.add_rms_norm(t, s.hidden, s.eps, s.dtype),
            "silu_mul": ops.silu_mul(t, s.inner, s.dtype),
            "causal_conv": ops.causal_conv(t, s.batch, s.channels, s.dtype),
            "gated_delta": ops.gated_delta(t, s.batch, *delta, s.dtype),
            "gated_norm": ops.gated_norm(t, *delta, s.eps, s.dtype),
            "rope_append": ops.rope_append(
                t, s.batch, s.heads, s.kv_heads, s.head_dim, s.rotary_dim, s.theta, s.eps, s.dtype
            ),
            "attention": ops.attention(t, s.batch, s.heads, s.kv_heads, s.head_dim, s.dtype),
            "advance": ops.advance(t, s.batch, (1 if t is None else t, s.vocab)),
        }
        if t is not None and ops.has_delta_step(s.key_heads, s.value_heads, s.value_dim):
            built["delta_step"] = ops.delta_step(t, *delta, s.eps, s.dtype)
        attention = (s.heads, s.kv_heads, s.head_dim, s.rotary_dim)
        if t is not None and ops.attention_shares(t, *attention, s.dtype):
            built["attention_part"] = ops.attention_part(t, *attention, s.theta, s.eps, s.dtype)
            built["attention_join"] = ops.attention_join(t, *attention, s.dtype)
        if t is not None and ops.device == "cuda":
            built["pick_part"] = ops.pick_part(t, s.vocab)
            built["pick_join"] = ops.pick_join(t)
            built["candidates_part"] = ops.candidates_part(t, s.vocab)
            built["candidates_join"] = ops.candidates_join(t)
        found |= {f"{s.name}_{name}_{tag}": function for name, function in built.items()}
    found[f"{s.name}_last_row_p"] = ops.last_row(s.hidden, s.dtype)
    found[f"{s.name}_log_probs_p"] = ops.log_probs(s.vocab)
    return found
