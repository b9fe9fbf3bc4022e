"""The memory plan: what an engine allocates is known, and refused, before it allocates."""

import gc

import numpy as np
import pytest

from tvm_sparse.codegen.workspace import _kept
from tvm_sparse.engine.mapped import Foreign
from tvm_sparse.engine.memory import MemoryPlan, plan_memory
from tvm_sparse.engine.runtime import Device, load_tvm_ffi
from tvm_sparse.errors import Refusal
from tvm_sparse.schedules.ops import ModelOps

FACTS = {
    "device": "cuda",
    "config": {"tie_word_embeddings": True},
    "workspace": 1000,
    "state": [
        {"name": "layers.0.recurrent_state", "shape": [2, 4, 8, 8], "dtype": "float32"},
        {"name": "layers.3.k_cache", "shape": [2, 4, "context", 16], "dtype": "bfloat16"},
    ],
}


def test_what_is_counted():
    plan = plan_memory(FACTS, {"a": 500, "embed_tokens.weight": 700}, context=100)
    assert plan == MemoryPlan(weights=1200, states=2 * 4 * 64 * 4, workspace=1000, position=2 * 4 * 16 * 2, context=100)
    assert plan.total == 1200 + 2048 + 1000 + 25600


def test_an_embedding_that_is_only_looked_up_stands_in_the_hosts_memory():
    weights = {"a": 500, "embed_tokens.weight": 700}
    untied = {**FACTS, "config": {"tie_word_embeddings": False}}
    plan = plan_memory(untied, weights, context=100)
    assert (plan.weights, plan.on_host, plan.total) == (500, 700, 500 + 2048 + 1000 + 25600)
    assert str(plan).endswith(", and 0.0 MB of the host's")
    assert plan_memory({**untied, "device": "cpu"}, weights, context=100).on_host == 0


def test_memory_of_the_hosts_is_a_tensor_until_its_last_user_is_gone():
    freed: list[int] = []
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    cpu = Device("cpu")
    tensor = load_tvm_ffi().from_dlpack(Foreign(array.ctypes.data, (3, 4), "float32", (1, 0), lambda: freed.append(1)))
    assert (tuple(tensor.shape), str(tensor.dtype)) == ((3, 4), "float32")
    array[1, 1] = 50
    assert np.array_equal(cpu.download(tensor), array) and not freed
    del tensor
    gc.collect()
    assert freed == [1]


def test_the_largest_context_fills_what_is_there():
    plan = plan_memory(FACTS, {"a": 1200}, context=100)
    fits = plan.largest_context(plan.total - 1)
    assert fits == 99
    assert plan.largest_context(10) == 0


def test_too_little_memory_is_refused_with_the_sum_and_the_way_on():
    plan = MemoryPlan(weights=17 * 10**9, states=10**8, workspace=10**8, position=65536, context=4096)
    says = r"needs 17\.47 GB \(weights 17\.00 GB \+ caches .* at most --context 2\d\d\d fits"
    with pytest.raises(Refusal, match=says):
        plan.require(17_640_000_000, "cuda:0", "OUT")
    with pytest.raises(Refusal, match="no context fits"):
        plan.require(10**9, "cuda:0", "OUT")
    plan.require(20 * 10**9, "cuda:0", "OUT")


def test_what_an_operation_keeps_between_its_kernels_is_counted():
    """K, Q, their products and gates of the delta rule: 27 KB a token of the 27B."""
    kept = _kept(ModelOps("cuda").gated_delta(None, 1, 16, 48, 128, 128, "bfloat16"), tokens=2048)
    square, tile = 64 * 64, 64 * 128
    assert kept == 32 * (2 * (2 * 16 * tile + 48 * square + 48 * tile) + 4 * 48 * 2 * 64)
