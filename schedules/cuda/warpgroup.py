"""Device code for the products of four warps that an H200 has (`wgmma`, PTX ISA): twice the speed of tensor_core.py's.

Compiled for sm_90a alone, where TVMS_WARPGROUP is defined. Sums lie as the C of tensor_core.py, 16 rows a warp. Tiles
are panels of 64 columns, rows of 8 units as in tensor_core.py (the 128-byte swizzle), on 1024 bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

_COMMON = r"""
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) && !defined(TVMS_WARPGROUP)
#define TVMS_WARPGROUP
// A tile for wgmma: `across` bytes between panels of 64 columns, 1024 between groups of eight rows.
__device__ __forceinline__ unsigned long long tvms_tile(const char* at, int across = 16) {
  unsigned long long address = (unsigned)__cvta_generic_to_shared(at);
  return address >> 4 | (unsigned long long)(across >> 4) << 16 | 64ull << 32 | 1ull << 62;
}
__device__ __forceinline__ void tvms_products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void tvms_products_sent() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// All groups of products sent before the last LATEST are done.
template <int LATEST = 0> __device__ __forceinline__ void tvms_products_done() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(LATEST) : "memory");
}
// Sums of products that are done: no use of them moves before the wait.
template <int N> __device__ __forceinline__ void tvms_settled(float (&c)[N][4]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(c[i][0]), "+f"(c[i][1]), "+f"(c[i][2]), "+f"(c[i][3])::"memory");
}
// What this thread wrote to shared memory is there for products; a barrier must follow.
__device__ __forceinline__ void tvms_publish() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
#endif
"""


@dataclass(frozen=True)
class Product:
    """c [64, columns] += a b, or = a b where `add` is 0: `tvms_product_DTYPE(c, a, b, add)`.

    Specialisations of one template: what calls it may stand before the products of another kernel's widths.

    a [64, 16] lies in a warp's registers, 16 rows a warp, or (`from_tile`) in shared memory; b [16, columns] in shared
    memory, its 16 next to one another, or (`turned`, the name ends so too) its columns.
    """

    dtype: str
    columns: int
    from_tile: bool = False
    turned: bool = False

    def source(self) -> str:
        sums = self.columns // 2
        outputs = ", ".join(f"%{i}" for i in range(sums))
        operands = ", ".join(f'"+f"(c[{i // 4}][{i % 4}])' for i in range(sums))
        name = f"tvms_product_{self.dtype}" + "_turned" * self.turned
        if self.from_tile:
            declared, a, given, count = "unsigned long long a", f"%{sums}", '"l"(a)', 1
        else:
            declared, count = "const unsigned* a", 4
            a = "{" + ", ".join(f"%{sums + i}" for i in range(4)) + "}"
            given = ", ".join(f'"r"(a[{i}])' for i in range(4))
        flags = "1, 1, 0, " if self.from_tile else "1, 1, "
        guard = f"{name}_{int(self.from_tile)}".upper()
        blocks = self.columns // 8
        return f"""
#if defined(TVMS_WARPGROUP) && !defined({guard})
#define {guard}
template <int N> __device__ void {name}(float (&c)[N][4], {declared}, unsigned long long b, int add);
#endif
#if defined(TVMS_WARPGROUP) && !defined({guard}_{self.columns})
#define {guard}_{self.columns}
template <> __device__ __forceinline__ void {name}<{blocks}>(
    float (&c)[{blocks}][4], {declared}, unsigned long long b, int add) {{
  asm volatile("{{ .reg .pred p; setp.ne.b32 p, %{sums + count + 1}, 0; "
      "wgmma.mma_async.sync.aligned.m64n{self.columns}k16.f32.{self.dtype}.{self.dtype} "
      "{{{outputs}}}, {a}, %{sums + count}, p, {flags}{int(self.turned)}; }}"
      : {operands} : {given}, "l"(b), "r"(add));
}}
#endif
"""


def source(*products: Product) -> str:
    """The device code of some products and what goes with them; nothing for other machines than an H200."""
    return _COMMON + "".join(product.source() for product in products)
