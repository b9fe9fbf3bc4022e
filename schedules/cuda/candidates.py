"""The largest logits in order, and the logarithm of the sum of all weights at a temperature: what sampling needs.

CTAs sort stretches of the vocabulary in shared memory (Batcher's bitonic network) and keep the first; one more CTA
does the same with what they kept. A key is the logit's bits, made to grow with the number, over the inverted id: of
equal logits the lowest id comes first. Sums are added in a fixed order.
"""

from __future__ import annotations

import tvm
from tvm.script import tirx as T

from tvm_sparse.schedules.cuda.dependent_launch import dependent, read, start_dependents, wait_for_inputs
from tvm_sparse.schedules.cuda.device_code import block_max, block_sum

THREADS = 1024
KEPT = 64  # of a stretch, and in the end

_SORT = """
#ifndef TVMS_SORT
#define TVMS_SORT
__device__ __forceinline__ uint64_t tvms_key(float value, int id) {
  unsigned bits = __float_as_uint(value);
  bits = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return (uint64_t)bits << 32 | (0xffffffffu - (unsigned)id);
}
__device__ __forceinline__ float tvms_key_value(uint64_t key) {
  unsigned bits = (unsigned)(key >> 32);
  return __uint_as_float(bits & 0x80000000u ? bits ^ 0x80000000u : ~bits);
}
__device__ __forceinline__ int tvms_key_id(uint64_t key) {
  return (int)(0xffffffffu - (unsigned)key);
}
__device__ __forceinline__ void tvms_sort_down(uint64_t* keys, int count) {
  // `count` is a power of two; the largest comes first.
  for (int size = 2; size <= count; size <<= 1)
    for (int step = size >> 1; step > 0; step >>= 1) {
      __syncthreads();
      for (int i = threadIdx.x; i < count / 2; i += blockDim.x) {
        int low = 2 * i - (i & (step - 1)), high = low + step;
        uint64_t a = keys[low], b = keys[high];
        if ((a < b) == ((low & size) == 0)) {
          keys[low] = b;
          keys[high] = a;
        }
      }
    }
  __syncthreads();
}
#endif
"""


def _power(count: int) -> int:
    return 1 << (count - 1).bit_length()


def _call(name: str, *arguments: tvm.tirx.Expr, returns: str = "void") -> tvm.tirx.Expr:
    return T.cuda.func_call(f"tvms_{name}", *arguments, source_code=_SORT, return_type=returns)


def candidates_part(tokens: int, vocab: int, stretches: int) -> tvm.tirx.PrimFunc:
    """See schedules/ops.py."""
    each = -(-vocab // stretches)
    size = max(_power(each), KEPT)

    @T.prim_func(s_tir=True)
    def candidates_part(
        logits: T.Buffer((tokens, vocab), "float32"),
        scale: T.Buffer((1,), "float32"),
        keys: T.Buffer((tokens, stretches, KEPT), "uint64"),
        sums: T.Buffer((tokens, stretches, 2), "float32"),
    ):
        stretch = T.launch_thread("blockIdx.x", stretches)
        token = T.launch_thread("blockIdx.y", tokens)
        thread = T.launch_thread("threadIdx.x", THREADS)
        sorted_keys = T.alloc_buffer((size,), "uint64", scope="shared")
        value = T.alloc_buffer((1,), "float32", scope="local")
        largest = T.alloc_buffer((1,), "float32", scope="local")
        total = T.alloc_buffer((1,), "float32", scope="local")
        start_dependents()
        wait_for_inputs()
        largest[0] = T.float32(-3.4028234663852886e38)
        for step in range(T.ceildiv(size, THREADS)):
            if step * THREADS + thread < size:
                sorted_keys[step * THREADS + thread] = T.uint64(0)
                if step * THREADS + thread < each and stretch * each + step * THREADS + thread < vocab:
                    value[0] = read(logits[token, stretch * each + step * THREADS + thread])
                    largest[0] = T.max(largest[0], value[0])
                    sorted_keys[step * THREADS + thread] = _call(
                        "key", value[0], stretch * each + step * THREADS + thread, returns="uint64"
                    )
        largest[0] = block_max(largest[0])
        total[0] = T.float32(0)
        for step in range(T.ceildiv(each, THREADS)):
            if step * THREADS + thread < each and stretch * each + step * THREADS + thread < vocab:
                total[0] += T.exp(
                    (read(logits[token, stretch * each + step * THREADS + thread]) - largest[0])
                    * read(scale[0])
                )
        total[0] = block_sum(total[0])
        T.evaluate(_call("sort_down", T.address_of(sorted_keys[0]), size))
        if thread < KEPT:
            keys[token, stretch, thread] = sorted_keys[thread]
        if thread == 0:
            sums[token, stretch, 0] = largest[0] * read(scale[0])
            sums[token, stretch, 1] = total[0]

    return dependent(candidates_part)


def candidates_join(tokens: int, stretches: int) -> tvm.tirx.PrimFunc:
    """See schedules/ops.py."""
    size = _power(stretches * KEPT)

    @T.prim_func(s_tir=True)
    def candidates_join(
        keys: T.Buffer((tokens, stretches, KEPT), "uint64"),
        sums: T.Buffer((tokens, stretches, 2), "float32"),
        values: T.Buffer((tokens, KEPT), "float32"),
        ids: T.Buffer((tokens, KEPT), "int32"),
        log_sum: T.Buffer((tokens,), "float32"),
    ):
        token = T.launch_thread("blockIdx.x", tokens)
        thread = T.launch_thread("threadIdx.x", THREADS)
        sorted_keys = T.alloc_buffer((size,), "uint64", scope="shared.dyn")
        mark = T.alloc_buffer((2,), "float32", scope="local")
        largest = T.alloc_buffer((1,), "float32", scope="local")
        for step in range(T.ceildiv(size, THREADS)):
            if step * THREADS + thread < size:
                sorted_keys[step * THREADS + thread] = T.uint64(0)
                if step * THREADS + thread < stretches * KEPT:
                    sorted_keys[step * THREADS + thread] = keys[
                        token, (step * THREADS + thread) // KEPT, (step * THREADS + thread) % KEPT
                    ]
        mark[0] = T.float32(-3.4028234663852886e38)
        mark[1] = T.float32(0)
        if thread < stretches:
            mark[0] = read(sums[token, thread, 0])
            mark[1] = read(sums[token, thread, 1])
        largest[0] = block_max(mark[0])
        mark[1] = block_sum(mark[1] * T.exp(mark[0] - largest[0]))
        T.evaluate(_call("sort_down", T.address_of(sorted_keys[0]), size))
        if thread < KEPT:
            values[token, thread] = _call("key_value", sorted_keys[thread], returns="float32")
            ids[token, thread] = _call("key_id", sorted_keys[thread], returns="int32")
        if thread == 0:
            log_sum[token] = largest[0] + T.log(mark[1])

    return candidates_join
