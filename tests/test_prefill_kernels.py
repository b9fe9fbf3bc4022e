"""Prefill's tensor core kernels of a GPU, emulated here, against float64, and what their algebra rests on."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import tvm
from emulated_tensor_cores import Kernels
from hypothesis import given, settings
from hypothesis import strategies as st

from tvm_sparse.codegen import cuda
from tvm_sparse.schedules.cuda import attention_tiled, gated_delta_chunked
from tvm_sparse.schedules.ops import as_kernel
from tvm_sparse.targets import MACHINES

sys.path.insert(0, str(Path(__file__).parent / "gpu"))
import reference
from cases import Shape

pytestmark = pytest.mark.usefixtures("toolkit")


def shape(key_heads=1, value_heads=2, dim=64, heads=2, kv_heads=1, head_dim=64) -> Shape:
    delta = (key_heads, value_heads, dim, dim)
    return Shape("small", 2, 64, 64, *delta, heads, kv_heads, head_dim, 16, 10, "bfloat16")


def test_kernels_ask_for_all_their_memory(monkeypatch):
    """TVM shrinks buffers to what it sees used: the host code must still allot what the kernels were written for."""
    toolkit, target = cuda.prepare(), cuda.cuda_target([MACHINES["h200"]])
    monkeypatch.setattr(cuda, "compile_source", lambda *_: b"none")
    functions = {
        "delta": gated_delta_chunked.gated_delta(1, 16, 48, 128, 128, "bfloat16"),
        "attention": attention_tiled.attention(1, 24, 4, 256, "bfloat16"),
    }
    mod = tvm.IRModule({name: as_kernel(f).with_attr("global_symbol", name) for name, f in functions.items()})
    with cuda._nvcc(toolkit, ["sm_90a"]), target:
        host = tvm.compile(mod, target=target).mod.inspect_source()
    for in_shared in (47104, 151552, (128 + 4 * 64) * 256 * 2):
        assert f"store i64 {in_shared}," in host
    assert not re.search(r"%(queries|keys|inside|across|gates) = .*\(i32 2, i32 %dev_id, i64 \d", host)


def relative_error(out: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((out.double() - wanted).norm() / wanted.norm())


DECAYS = {"usual": (0.0, -4.0), "none": (-30.0, -8.0), "strong": (2.5, 4.0), "mixed": (0.0, 0.0)}
"""Means of A_log and dt_bias."""


machines = pytest.fixture(scope="module", params=[False, True], ids=["mma", "wgmma"])


@machines
def delta_kernels(request, tmp_path_factory):
    s = shape()
    function = gated_delta_chunked.gated_delta(s.batch, s.key_heads, s.value_heads, s.key_dim, s.value_dim, s.dtype)
    return Kernels(as_kernel(function), "delta", tmp_path_factory.mktemp("delta"), request.param)


def run_delta(kernels, s, y, mixed, a_log, dt_bias, slot, state) -> torch.Tensor:
    n, heads, chunks = len(y), s.value_heads, -(-len(y) // 64)

    def poisoned(*size, dtype=torch.float16):
        return torch.full(size, float("nan"), dtype=dtype)

    held = {"y": y, "mixed": mixed, "a_log": a_log, "dt_bias": dt_bias, "slot": slot, "state": state}
    held |= {"n": n, "row_length": mixed.shape[1], "cse_v1": chunks}
    held |= {name: poisoned(chunks, s.key_heads, 64, s.key_dim) for name in ("queries", "keys")}
    held |= {"inside": poisoned(chunks, heads, 64, 64), "across": poisoned(chunks, heads, s.key_dim, 64)}
    held |= {"gates": poisoned(chunks, heads, 2, 64, dtype=torch.float32)}
    held |= {"o": poisoned(n, heads * s.value_dim, dtype=torch.float32)}
    kernels.run("delta_kernel", (chunks, heads), 128, held)
    kernels.run("delta_kernel_1", (s.value_dim // 64, heads), 128, held)
    return held["o"]


@pytest.mark.parametrize(("decay", "scale"), [*((decay, 1.0) for decay in DECAYS), ("usual", 1e-6), ("none", 1e5)])
def test_the_chunked_delta_rule_equals_the_recurrence(delta_kernels, decay, scale):
    """Two calls that end inside a chunk; similar keys; values far outside float16's range, on either side."""
    s, random = shape(), torch.Generator().manual_seed(0)
    width = s.value_heads * s.value_dim

    def drawn(*size):
        return torch.randn(*size, generator=random)

    y = drawn(81, s.channels) + drawn(1, s.channels)
    y[:, -width:] *= scale
    mixed = drawn(81, s.channels + width + 2 * s.value_heads).bfloat16()
    a_log, dt_bias = (drawn(s.value_heads) + mean for mean in DECAYS[decay])
    state, slot = drawn(2, s.value_heads, s.key_dim, s.value_dim) * scale, torch.ones(1, dtype=torch.int32)
    before = state.clone()
    wanted, wanted_state = reference.gated_delta(s, y, mixed, a_log, dt_bias, state[1])
    out = [
        run_delta(delta_kernels, s, y[part], mixed[part], a_log, dt_bias, slot, state)
        for part in (slice(0, 70), slice(70, 81))
    ]
    assert relative_error(torch.cat(out), wanted) < 1e-3
    assert relative_error(state[1], wanted_state) < 1e-3
    assert torch.equal(state[0], before[0])


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), alike=st.floats(0, 10), decay=st.floats(-8, 4))
def test_what_does_not_depend_on_the_state_is_bounded(seed, alike, decay):
    """A, G and B of gated_delta_chunked, whatever keys and gates: within [-1, 1], where float16 has 11 bits."""
    random = np.random.default_rng(seed)
    q, k = (random.standard_normal((64, 16)) + alike * random.standard_normal(16) for _ in range(2))
    q, k = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (q, k))
    beta = 1 / (1 + np.exp(-4 * random.standard_normal(64)))
    gamma = -np.cumsum(np.exp(decay + random.standard_normal(64)))
    lower = np.tril(np.exp(np.tril(gamma[:, None] - gamma)))
    a = np.linalg.inv(np.eye(64) + np.tril(beta[:, None] * (k @ k.T) * lower, -1))
    inside, across = np.tril(q @ k.T * lower) @ a, k.T * np.exp(gamma[-1] - gamma) @ a
    assert max(np.abs(x).max() for x in (a, inside, across)) < 1 + 1e-9


@pytest.mark.parametrize(
    ("n", "past", "context", "splits"),
    [(1, 0, 70, 1), (1, 0, 70, 3), (3, 37, 70, 2), (150, 21, 300, 1), (130, 100, 220, 1), (130, 100, 240, 3)],
)
def test_tiled_attention_equals_float64(n, past, context, splits, attention_kernel):
    """What lies in the caches past the last key is never used, and positions past the caches' end see all of them."""
    s, random = shape(), torch.Generator().manual_seed(0)
    qkv = torch.randn(n, 2 * (s.heads + s.kv_heads) * s.head_dim + 3, generator=random).bfloat16()
    q = torch.randn(n, s.heads * s.head_dim, generator=random) * 2
    caches = [torch.randn(s.batch, s.kv_heads, context, s.head_dim, generator=random).bfloat16() for _ in range(2)]
    for cache in caches:
        cache[:, :, past + n :] = float("nan")
    y = torch.full((n, s.heads * s.head_dim), float("nan"), dtype=torch.bfloat16)
    held = {"q": q, "qkv": qkv, "k_cache": caches[0], "v_cache": caches[1], "y": y}
    held |= {"n": n, "row_length": qkv.shape[1], "context": context}
    held |= {"slot": torch.ones(1, dtype=torch.int32), "position": torch.tensor([5, past], dtype=torch.int32)}
    held |= {"sums": torch.full((splits, n, s.heads, s.head_dim), float("nan"))}
    held |= {"stats": torch.full((splits, n, s.heads, 2), float("nan")), "cse_v3": -(-n // 128), "cse_v4": splits}
    attention_kernel.run("attention_kernel", (s.heads, -(-n // 128), splits), 256, held)
    attention_kernel.run("attention_kernel_1", (s.heads, n), s.head_dim // 2, held)
    there = min(n, context - past)
    gate = reference.split_qkv(s, qkv[:, :-3])[1]
    heads = q.view(n, s.heads, s.head_dim)
    wanted = reference.attention(s, heads[:there], gate[:there], caches[0][1], caches[1][1], past)
    assert relative_error(y[:there], wanted) < 4e-3
    assert y.isfinite().all()


@machines
def attention_kernel(request, tmp_path_factory):
    s = shape()
    function = attention_tiled.attention(s.batch, s.heads, s.kv_heads, s.head_dim, s.dtype)
    return Kernels(as_kernel(function), "attention", tmp_path_factory.mktemp("attention"), request.param)
