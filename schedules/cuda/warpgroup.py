"""Device code for the products of four warps that an H200 has (`wgmma`, PTX ISA): twice the speed of tensor_core.py's.

Compiled for sm_90a alone, where TVMS_WARPGROUP is defined. Sums lie as the C of tensor_core.py, 16 rows a warp. Tiles
are panels of 64 columns, rows of 8 units as in tensor_core.py (the 128-byte swizzle), on 1024 bytes.
"""

from __future__ import annotations


def _product(name: str, columns: int, left: str, transposed: int) -> str:
    """c [64, columns] += a b: `left` is "l" for a in shared memory, "r" for a warp's 16 rows of it in registers."""
    sums = columns // 2
    outputs = ", ".join(f"%{i}" for i in range(sums))
    operands = ", ".join(f'"+f"(c[{i // 4}][{i % 4}])' for i in range(sums))
    if left == "l":
        declared, a, given = "unsigned long long a", f"%{sums}", '"l"(a)'
        count, flags = 1, f", 1, 1, 0, {transposed}"
    else:
        declared, a = "const unsigned* a", "{" + ", ".join(f"%{sums + i}" for i in range(4)) + "}"
        given, count, flags = ", ".join(f'"r"(a[{i}])' for i in range(4)), 4, f", 1, 1, {transposed}"
    return f"""
__device__ __forceinline__ void {name}(float (&c)[{columns // 8}][4], {declared}, unsigned long long b, int add) {{
  asm volatile("{{ .reg .pred p; setp.ne.b32 p, %{sums + count + 1}, 0; "
      "wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.bf16.bf16 {{{outputs}}}, {a}, %{sums + count}, p{flags}; }}"
      : {operands} : {given}, "l"(b), "r"(add));
}}
"""


def source(columns: int) -> str:
    """`tvms_score` [64, 64] += A B^T from shared memory, `tvms_gather` [64, columns] += A B, A in registers."""
    return (
        r"""
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) && !defined(TVMS_WARPGROUP)
#define TVMS_WARPGROUP
// A tile for wgmma: `across` bytes between panels of 64 columns, 1024 between groups of eight rows.
__device__ __forceinline__ unsigned long long tvms_tile(const char* at, int across) {
  unsigned long long address = (unsigned)__cvta_generic_to_shared(at);
  return address >> 4 | (unsigned long long)(across >> 4) << 16 | 64ull << 32 | 1ull << 62;
}
__device__ __forceinline__ void tvms_products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void tvms_products_sent() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void tvms_products_done() { asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); }
// What this thread wrote to shared memory is there for products; a barrier must follow.
__device__ __forceinline__ void tvms_publish() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
#endif
"""
        f"""
#if defined(TVMS_WARPGROUP) && !defined(TVMS_WARPGROUP_{columns})
#define TVMS_WARPGROUP_{columns}
{_product("tvms_score", 64, "l", 0)}{_product("tvms_gather", columns, "r", 1)}
#endif
"""
    )
