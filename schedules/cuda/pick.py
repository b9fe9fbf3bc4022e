"""The id of the largest logit, on a GPU: CTAs take stretches of the vocabulary, a last one their winners.

Of equal logits the lowest id wins, as numpy's argmax has it.
"""

from __future__ import annotations

import tvm
from tvm.script import tirx as T

from tvm_sparse.schedules.cuda.dependent_launch import dependent, read, read_int, start_dependents, wait_for_inputs

THREADS = 256

_BEST = """
__device__ __forceinline__ void tvms_best(float* value, int* id) {
  // Over the CTA; thread 0 gets the result.
  __shared__ float values[32];
  __shared__ int ids[32];
  for (int round = 0; round < 2; ++round) {
    for (int step = 16; step > 0; step >>= 1) {
      float other = __shfl_xor_sync(0xffffffffu, *value, step);
      int at = __shfl_xor_sync(0xffffffffu, *id, step);
      if (other > *value || (other == *value && at < *id)) {
        *value = other;
        *id = at;
      }
    }
    if (round) return;
    if ((threadIdx.x & 31) == 0) {
      values[threadIdx.x >> 5] = *value;
      ids[threadIdx.x >> 5] = *id;
    }
    __syncthreads();
    int mine = min(threadIdx.x & 31, (blockDim.x >> 5) - 1);
    *value = values[mine];
    *id = ids[mine];
  }
}
"""


def _best(value, index):
    return T.evaluate(
        T.cuda.func_call("tvms_best", T.address_of(value[0]), T.address_of(index[0]), source_code=_BEST)
    )


def pick_part(tokens: int, vocab: int, stretches: int) -> tvm.tirx.PrimFunc:
    """See schedules/ops.py."""
    each = -(-vocab // stretches)

    @T.prim_func(s_tir=True)
    def pick_part(
        logits: T.Buffer((tokens, vocab), "float32"),
        values: T.Buffer((tokens, stretches), "float32"),
        places: T.Buffer((tokens, stretches), "int32"),
    ):
        stretch = T.launch_thread("blockIdx.x", stretches)
        token = T.launch_thread("blockIdx.y", tokens)
        thread = T.launch_thread("threadIdx.x", THREADS)
        value = T.alloc_buffer((1,), "float32", scope="local")
        index = T.alloc_buffer((1,), "int32", scope="local")
        here = T.alloc_buffer((1,), "float32", scope="local")
        start_dependents()
        wait_for_inputs()
        value[0] = T.float32(-3.4028234663852886e38)
        index[0] = T.min(stretch * each, vocab - 1)
        for step in T.unroll(T.ceildiv(each, THREADS)):
            if step * THREADS + thread < each and stretch * each + step * THREADS + thread < vocab:
                here[0] = read(logits[token, stretch * each + step * THREADS + thread])
                if here[0] > value[0]:
                    value[0] = here[0]
                    index[0] = stretch * each + step * THREADS + thread
        _best(value, index)
        if thread == 0:
            values[token, stretch] = value[0]
            places[token, stretch] = index[0]

    return dependent(pick_part)


def pick_join(tokens: int, stretches: int) -> tvm.tirx.PrimFunc:
    """See schedules/ops.py."""

    @T.prim_func(s_tir=True)
    def pick_join(
        values: T.Buffer((tokens, stretches), "float32"),
        places: T.Buffer((tokens, stretches), "int32"),
        ids: T.Buffer((tokens,), "int32"),
    ):
        token = T.launch_thread("blockIdx.x", tokens)
        thread = T.launch_thread("threadIdx.x", stretches)
        value = T.alloc_buffer((1,), "float32", scope="local")
        index = T.alloc_buffer((1,), "int32", scope="local")
        start_dependents()
        wait_for_inputs()
        value[0] = read(values[token, thread])
        index[0] = read_int(places[token, thread])
        _best(value, index)
        if thread == 0:
            ids[token] = index[0]

    return dependent(pick_join)
