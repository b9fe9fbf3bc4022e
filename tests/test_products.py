"""Products of many tokens on a GPU: what lowering makes of a matmul, and the host code, with a cuBLASLt made here."""

from __future__ import annotations

import ctypes
import subprocess
from dataclasses import replace

import pytest
import torch
import tvm
import tvm_ffi
from tvm import relax
from tvm.script import ir as I
from tvm.script import relax as R

from tvm_sparse.codegen.cpu import compile_c
from tvm_sparse.codegen.cuda_stub import c_compiler
from tvm_sparse.codegen.many_tokens import host_code
from tvm_sparse.errors import Refusal
from tvm_sparse.formats import FORMATS
from tvm_sparse.passes.annotate_sparsity import AnnotateSparsity
from tvm_sparse.passes.apply_schedules import ApplySchedules
from tvm_sparse.passes.lower_sparse_matmul import LowerSparseMatmul
from tvm_sparse.passes.verify_schedules import UnfinishedKernel, VerifySchedules
from tvm_sparse.plan import keep_dense
from tvm_sparse.schedules.product import WORKSPACE, Product, product, read_products, write_products
from tvm_sparse.schedules.space import sketch
from tvm_sparse.schedules.spec import KernelSpec
from tvm_sparse.schedules.table import decoder

BITMAP, DENSE = FORMATS["bitmap"].choice(), FORMATS["dense"].choice()


@I.ir_module
class Two:
    @R.function
    def main(
        x: R.Tensor(("m", 64), "bfloat16"),
        up: R.Tensor((48, 64), "bfloat16"),
        head: R.Tensor((8, 48), "bfloat16"),
    ):
        with R.dataflow():
            ut = R.permute_dims(up)
            h = R.matmul(x, ut)
            ht = R.permute_dims(head)
            y = R.matmul(h, ht, out_dtype="float32")
            R.output(y)
        return y


def lowered(mod: tvm.IRModule) -> tvm.IRModule:
    plan = {
        "up": replace(keep_dense("up", (48, 64), 1, "a test"), choice=BITMAP),
        "head": keep_dense("head", (8, 48), 1, "a test"),
    }
    return tvm.transform.Sequential([AnnotateSparsity(plan), LowerSparseMatmul("sm_90a")])(mod)


def expected() -> tvm.IRModule:
    """Two calls of host code, each with its result and scratch; the kernels they call beside them."""
    builder, m, nv = relax.BlockBuilder(), tvm.tirx.Var("m", "int64"), tvm.tirx.Var("nv", "int64")
    up = KernelSpec(BITMAP, 48, 64, None, "bfloat16", "bfloat16", "sm_90a")
    head = KernelSpec(DENSE, 8, 48, None, "bfloat16", "float32", "sm_90a")
    products = [product(up), product(head)]
    kernels = {
        "matmul_dense_48x64_mn_bf16_bf16": sketch(replace(up, choice=DENSE)),
        "matmul_bitmap_48x64_mn_bf16_bf16": sketch(up),
        "decode_bitmap_48x64": decoder(up),
        "matmul_dense_8x48_mn_bf16_f32": sketch(head),
    }
    declared = {
        "x": ((m, 64), "bfloat16"), "up.mask": ((48, 2), "uint32"), "up.row_start": ((49,), "int32"),
        "up.values": ((nv,), "bfloat16"), "head": ((8, 48), "bfloat16"),
    }  # fmt: skip
    x, *buffers, weight = [relax.Var(name, relax.TensorType(*facts)) for name, facts in declared.items()]

    def call(made: Product, arguments: list[relax.Var], out: relax.TensorType) -> relax.Expr:
        types = [out, relax.TensorType((made.scratch,), "uint8")]
        return builder.emit(relax.op.call_dps_packed(relax.ExternFunc(made.symbol), relax.Tuple(arguments), types))

    with builder.function("main", [x, *buffers, weight]):
        with builder.dataflow():
            first = call(products[0], [x, *buffers], relax.TensorType((m, 48), "bfloat16"))
            h = builder.emit(relax.TupleGetItem(first, 0))
            second = call(products[1], [h, weight], relax.TensorType((m, 8), "float32"))
            y = builder.emit_output(relax.TupleGetItem(second, 0))
        builder.emit_func_output(y)
    for name, kernel in kernels.items():
        builder.add_func(kernel.with_attr("global_symbol", name), name)
    return write_products(builder.finalize(), products)


def test_many_tokens_become_a_call_of_host_code():
    tvm.ir.assert_structural_equal(lowered(Two), expected())


def test_kernels_that_host_code_calls_keep_their_names():
    mod = tvm.transform.Sequential([ApplySchedules(), VerifySchedules()])(lowered(Two))
    symbols = {str(f.attrs["global_symbol"]) for f in mod.functions.values() if "global_symbol" in f.attrs}
    for made in read_products(mod):
        assert {made.dense, made.few, made.decode} - {None} <= symbols


def test_a_product_without_its_kernel_is_unfinished():
    mod = write_products(tvm.IRModule(), [Product("some_product", "lost")])
    with pytest.raises(UnfinishedKernel, match="some_product calls lost, which is not in the module"):
        VerifySchedules()(mod)


def test_other_dtypes_are_refused_by_name():
    @I.ir_module
    class Half:
        @R.function
        def main(x: R.Tensor(("m", 64), "float16"), up: R.Tensor((48, 64), "float16")):
            with R.dataflow():
                ut = R.permute_dims(up)
                y = R.matmul(x, ut)
                R.output(y)
            return y

    plan = {"up": replace(keep_dense("up", (48, 64), 1, "a test"), choice=BITMAP)}
    with pytest.raises(Refusal, match="up: a linear layer in float16, kernels take bfloat16 and float32"):
        tvm.transform.Sequential([AnnotateSparsity(plan), LowerSparseMatmul("sm_90a")])(Half)


def test_who_goes_to_the_tensor_cores():
    spec = KernelSpec(BITMAP, 512, 1024, None, "bfloat16", "bfloat16", "sm_90a")
    many = product(spec)
    assert (many.few, many.most) == (spec.name, 1) and many.scratch == 2 * 512 * 1024 + WORKSPACE
    assert product(replace(spec, m=64)).few is None  # known to be many
    assert product(replace(spec, m=1)) is None
    assert product(replace(spec, choice=DENSE)).scratch == WORKSPACE
    assert product(replace(spec, choice=DENSE, m=1)) is None
    for other in (
        replace(spec, k=1020),  # rows of 2040 bytes
        replace(spec, x_dtype="float32"),
        replace(spec, arch="x86-64"),
        replace(spec, choice=FORMATS["dense"].choice(32)),
        replace(spec, n=248320, k=5120),  # more than is decoded at a time
    ):
        assert product(other) is None


# The host code's kernels and cuBLASLt, in C on the CPU. What was called is noted in `calls`, a letter each.
KERNELS = r"""
#include <stdint.h>
#include <string.h>
char calls[64];
typedef struct {
  void* data; int32_t device[2]; int32_t ndim; uint8_t code, bits; uint16_t lanes; int64_t *shape;
} Tensor;
typedef struct { int32_t type_index; uint32_t padding; Tensor* value; } Any;
static Tensor* of(const Any* any) { return any->type_index == 70 ? (Tensor*)((char*)any->value + 24) : any->value; }
int __tvm_ffi_few(void* s, const Any* a, int32_t n, Any* r) { strcat(calls, n == 3 ? "f" : "?"); return 0; }
int __tvm_ffi_decode(void* s, const Any* a, int32_t n, Any* r) {
  Tensor *packed = of(a), *w = of(a + 1);
  strcat(calls, n == 2 && w->ndim == 2 && w->code == 4 && w->bits == 16 && w->lanes == 1 ? "d" : "?");
  memcpy(w->data, packed->data, 2 * w->shape[0] * w->shape[1]);
  return 0;
}
int __tvm_ffi_dense(void* s, const Any* a, int32_t n, Any* r) { strcat(calls, n == 3 ? "o" : "?"); return 0; }
"""
LT = r"""
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
char lt_calls[64];
int lt_has_algorithm = 1, lt_status = 0, lt_starts = 1;
typedef struct { int type; uint64_t rows, cols; int64_t ld; } Layout;
typedef struct { int compute, scale, transposed; } Op;
typedef struct { uint64_t algo[8]; size_t workspace; int state; float waves; int reserved[4]; } Heuristic;
size_t cublasLtGetVersion(void) { return 130000; }
int cublasLtCreate(void** h) { *h = lt_starts ? lt_calls : NULL; strcat(lt_calls, "c"); return !lt_starts; }
int cublasLtMatmulDescCreate(void** d, int compute, int scale) {
  Op* op = calloc(1, sizeof *op); *op = (Op){compute, scale, 0}; *d = op; return 0;
}
int cublasLtMatmulDescDestroy(void* d) { free(d); return 0; }
int cublasLtMatmulDescSetAttribute(void* d, int a, const void* v, size_t n) {
  if (a != 3 || n != 4) return 7;
  ((Op*)d)->transposed = *(const int*)v;
  return 0;
}
int cublasLtMatrixLayoutCreate(void** l, int t, uint64_t r, uint64_t c, int64_t ld) {
  Layout* m = malloc(sizeof *m); *m = (Layout){t, r, c, ld}; *l = m; return 0;
}
int cublasLtMatrixLayoutDestroy(void* l) { free(l); return 0; }
int cublasLtMatmulPreferenceCreate(void** p) { *p = calloc(1, 64); return 0; }
int cublasLtMatmulPreferenceDestroy(void* p) { free(p); return 0; }
int cublasLtMatmulPreferenceSetAttribute(void* p, int a, const void* v, size_t n) {
  if (a == 3 && *(const uint32_t*)v & ~2u) return 7; /* partial sums in an order of arrival */
  return 0;
}
int cublasLtMatmulAlgoGetHeuristic(void* h, void* d, void* a, void* b, void* c, void* y, void* p, int n,
                                   Heuristic* best, int* count) {
  strcat(lt_calls, "h");
  memset(best, 0, sizeof *best);
  best->algo[0] = 42;
  *count = lt_has_algorithm;
  return 0;
}
static float wide(uint16_t bits) { uint32_t u = (uint32_t)bits << 16; float f; memcpy(&f, &u, 4); return f; }
int cublasLtMatmul(void* h, Op* op, const float* one, const uint16_t* a, Layout* la, const uint16_t* b, Layout* lb,
                   const float* zero, const void* c, Layout* lc, float* y, Layout* ly, const uint64_t* algo,
                   void* room, size_t size, void* stream) {
  strcat(lt_calls, "m");
  if (lt_status) return lt_status;
  if (op->compute != 68 || op->scale || op->transposed != 1 || *one != 1 || *zero || *algo != 42) return 7;
  if ((uintptr_t)room % 256 || size < 1024) return 7;
  if (la->type != 14 || lb->type != 14 || ly->type || ly->rows != la->cols || ly->cols != lb->cols) return 7;
  for (uint64_t i = 0; i < ly->rows; ++i) for (uint64_t j = 0; j < ly->cols; ++j) {
    float sum = 0;
    for (uint64_t k = 0; k < la->rows; ++k) sum += wide(a[i * la->ld + k]) * wide(b[j * lb->ld + k]);
    y[j * ly->ld + i] = sum;
  }
  return 0;
}
"""
N, K, MOST = 5, 8, 2


class Host:
    """The host code of a decoded ("sparse") and a dense product, linked with KERNELS, and perhaps with LT to open."""

    def __init__(self, folder, monkeypatch, lt: str | None) -> None:
        self.lt = None
        monkeypatch.setenv("TVM_SPARSE_CUBLASLT", "0")
        if lt is not None:
            self.lt = ctypes.CDLL(str(self.link(folder / "libcublasLt.so.13", {"lt": lt})))
            monkeypatch.setenv("TVM_SPARSE_CUBLASLT", str(folder / "libcublasLt.so.13"))
        products = [Product("sparse", "dense", "few", "decode", MOST), Product("plain", "dense")]
        path = self.link(folder / "lib.so", {"host": host_code(products), "kernels": KERNELS})
        self.module, self.library = tvm_ffi.load_module(str(path)), ctypes.CDLL(str(path))

    @staticmethod
    def link(path, sources: dict[str, str]):
        objects = [str(compile_c(source, path.with_name(f"{name}.o"))) for name, source in sources.items()]
        subprocess.run([c_compiler(), "-shared", "-o", str(path), *objects], check=True)
        return path

    def call(self, symbol: str, tokens: int, scratch: int = 4096, offset: int = 0) -> tuple[str, str, bool]:
        """What was called of the kernels, what of cuBLASLt, and whether y is the product."""
        x, w = torch.randn(tokens, K).bfloat16(), torch.randn(N, K).bfloat16()
        y = torch.zeros(tokens * N + 8)[offset : offset + tokens * N].view(tokens, N)
        room = torch.zeros(scratch + 256, dtype=torch.uint8)
        room = room[-room.data_ptr() % 256 :][:scratch]
        noted = [(ctypes.c_char * 64).in_dll(self.library, "calls")]
        noted += [(ctypes.c_char * 64).in_dll(self.lt, "lt_calls")] if self.lt else []
        for text in noted:
            text.value = b""
        self.module[symbol](x, w, y, room)
        right = torch.allclose(y, x.float() @ w.float().T, atol=1e-4)
        return noted[0].value.decode(), noted[1].value.decode() if self.lt else "", right


@pytest.fixture
def host(tmp_path, monkeypatch):
    return Host(tmp_path, monkeypatch, LT)


def test_many_tokens_are_decoded_and_multiplied(host):
    assert host.call("sparse", MOST + 1) == ("d", "chm", True)
    assert host.call("sparse", MOST + 1) == ("d", "m", True)  # the algorithm is chosen once for a shape
    assert host.call("sparse", MOST + 7) == ("d", "hm", True)
    assert host.call("plain", MOST + 7) == ("", "hm", True)  # another amount of scratch
    assert host.call("plain", 1) == ("", "hm", True)


def test_few_tokens_keep_to_the_formats_own_kernel(host):
    assert host.call("sparse", MOST)[:2] == ("f", "")
    assert host.call("sparse", 0)[:2] == ("", "")


def test_without_an_algorithm_the_librarys_own_kernel_serves(host):
    ctypes.c_int.in_dll(host.lt, "lt_has_algorithm").value = 0
    assert host.call("sparse", 9)[:2] == ("do", "ch")
    assert host.call("plain", 9)[:2] == ("o", "h")


def test_errors_name_the_product(host):
    ctypes.c_int.in_dll(host.lt, "lt_status").value = 13
    with pytest.raises(RuntimeError, match=r"sparse: cuBLASLt failed with status \(13\)"):
        host.call("sparse", 9)
    with pytest.raises(RuntimeError, match=r"plain: x, the weight and y must begin at multiples of bytes \(16\)"):
        host.call("plain", 9, offset=1)
    with pytest.raises(RuntimeError, match=r"sparse: the scratch buffer is too small, bytes \(64\)"):
        host.call("sparse", 9, scratch=64)


def test_a_cublaslt_that_does_not_start_is_done_without(host, capfd):
    ctypes.c_int.in_dll(host.lt, "lt_starts").value = 0
    assert host.call("sparse", 9)[:2] == ("do", "c")
    assert host.call("plain", 9)[:2] == ("o", "")
    assert capfd.readouterr().err.count("libcublasLt.so.13 does not start on this device") == 1


@pytest.mark.parametrize("lt", [None, "int cublasLtCreate(void** h) { return 1; }"], ids=["none", "another"])
def test_without_cublaslt_the_librarys_own_kernel_serves(tmp_path, monkeypatch, capfd, lt):
    monkeypatch.setenv("TVM_SPARSE_DEBUG", "1")
    host = Host(tmp_path, monkeypatch, None)
    if lt is not None:
        monkeypatch.setenv("TVM_SPARSE_CUBLASLT", str(Host.link(tmp_path / "other.so", {"other": lt})))
    assert host.call("sparse", 9)[0] == "do"
    assert host.call("plain", 9)[0] == "o"
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 1 and "many tokens: the library's own kernel" in said[0]
    assert lt is None or "lacks cublasLt" in said[0]
