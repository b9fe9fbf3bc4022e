"""What the CPU operations share: vector widths, symbolic dimensions, exp and sums over lanes."""

from __future__ import annotations

from math import gcd

import tvm
from tvm.script import tirx as T


def lanes(extent: int, most: int = 16) -> int:
    """The widest vector, a power of two up to `most`, that divides a row of `extent` numbers."""
    return gcd(extent, most)


def symbolic(name: str) -> tvm.tirx.Var:
    """A dimension that only the call decides."""
    return tvm.tirx.Var(name, "int64")


def count(tokens: int | None) -> int | tvm.tirx.Var:
    """The extent of a token dimension."""
    return symbolic("n") if tokens is None else tokens


def over_tokens(tokens: int | None):
    """The loop over independent tokens: a single token is not worth waking the other threads."""
    return T.serial if tokens == 1 else T.parallel


def f32(x):
    return T.Cast("float32", x)


def tree_sum(buffer, extent: int):
    """The sum of a small local buffer in one fixed order, log2(extent) additions deep."""
    return _tree([buffer[i] for i in range(extent)], lambda a, b: a + b)


def tree_max(buffer, extent: int):
    return _tree([buffer[i] for i in range(extent)], T.max)


def _tree(terms: list, join):
    while len(terms) > 1:
        joined = [join(a, b) for a, b in zip(terms[::2], terms[1::2], strict=False)]
        terms = joined + terms[len(joined) * 2 :]
    return terms[0]


def exp(x):
    """exp in float32 to about 1 unit in the last place (Cephes expf), of operations that every x86 vectorises."""
    x = T.min(T.max(x, T.float32(-87.3)), T.float32(88.3))
    scaled = x * T.float32(1.44269504088896341)
    power = T.Cast("int32", scaled + T.Select(scaled >= T.float32(0), T.float32(0.5), T.float32(-0.5)))
    r = x - f32(power) * T.float32(0.693359375) - f32(power) * T.float32(-2.12194440e-4)
    series = T.float32(1.9875691500e-4)
    for term in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        series = series * r + T.float32(term)
    return (series * r * r + r + T.float32(1)) * T.reinterpret("float32", T.shift_left(power + 127, 23))


def sigmoid(x):
    return T.float32(1) / (T.float32(1) + exp(-x))


def silu(x):
    return x / (T.float32(1) + exp(-x))
