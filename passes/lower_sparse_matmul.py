"""LowerSparseMatmul: matmuls on annotated parameters become calls of their format's kernel.

    y = matmul(x, permute_dims(w))        ->    y = call_tir(kernel, (x, w.mask, w.row_start, w.values))

or, where tensor cores serve many tokens (schedules/product.py), of host code that calls several kernels:

                                          ->    y, _ = call_dps_packed(product, (x, w.mask, w.row_start, w.values))

with the kernels under symbols of their own and a note of the products on the module. The second result is scratch,
planned as any other: one place in memory serves all matrices.

The parameter w gives way to its packed buffers, in the format's order, at its place among the parameters; a dense
parameter keeps its name. The kernel is a sketch (schedules/space.py): ApplySchedules fills it in.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import tvm
from tvm import relax

from tvm_sparse.errors import Refusal
from tvm_sparse.formats import FORMATS
from tvm_sparse.formats.base import FormatChoice
from tvm_sparse.passes.annotate_sparsity import FORMATS_ATTR, annotated_formats
from tvm_sparse.passes.linear import Linear, match_linear, relax_functions
from tvm_sparse.schedules.product import Product, dense_spec, product, write_products
from tvm_sparse.schedules.space import sketch
from tvm_sparse.schedules.spec import KERNEL_DTYPES, KernelSpec
from tvm_sparse.schedules.table import decoder


@tvm.transform.module_pass(opt_level=0)
class LowerSparseMatmul:
    """`arch` is a KernelSpec's: "x86-64", "sm_90a" or "sm_100a".

    Handles any x of two or more dimensions in the dtypes that kernels know, bfloat16 and float32, as is the result's.
    Raises Refusal for any other dtype, and where a parameter that is to be packed has another use than as a weight of
    linear layers.
    """

    def __init__(self, arch: str):
        self.arch = arch

    def transform_module(self, mod: tvm.IRModule, _: tvm.transform.PassContext) -> tvm.IRModule:
        lowered = _Lowering(mod.clone(), self.arch)
        for gvar, function in relax_functions(mod).items():
            if FORMATS_ATTR in (function.attrs or {}):
                lowered.builder_.update_func(gvar, lowered.lower(function))
        mod = relax.transform.DeadCodeElimination()(lowered.builder_.get())
        return write_products(mod, list(lowered.products.values()))


@relax.expr_functor.mutator
class _Lowering(relax.PyExprMutator):
    def __init__(self, mod: tvm.IRModule, arch: str):
        super().__init__(mod)
        self.arch = arch
        self.formats: dict[str, FormatChoice] = {}
        self.buffers: dict[str, list[relax.Var]] = {}
        self.kernels: dict[KernelSpec, tvm.ir.GlobalVar] = {}
        self.products: dict[str, Product] = {}
        self.called: set[str] = set()  # kernels that products call

    def lower(self, function: relax.Function) -> relax.Function:
        params = {param.name: param for param in function.params}
        self.formats = {name: _stored(choice, params[name]) for name, choice in annotated_formats(function).items()}
        self.buffers = {name: _packed(params[name], choice) for name, choice in self.formats.items()}
        body = self.visit_expr(function.body)
        used = _uses(body)
        flat: list[relax.Var] = []
        for param in function.params:
            replaced = self.buffers.get(param.name, [param])
            if param in used and param not in replaced:
                raise Refusal(f"{param.name}: used other than as a linear layer's weight; keep it dense (--exclude)")
            flat += replaced
        attrs = {key: value for key, value in function.attrs.items() if key != FORMATS_ATTR}
        return relax.Function(
            flat, body, function.ret_ty, function.is_pure, tvm.ir.make_node("ir.DictAttrs", **attrs), function.span
        )

    def visit_call_(self, call: relax.Call) -> relax.Expr:
        linear = match_linear(call, self.lookup_binding)
        if linear is None or linear.weight.name not in self.formats:
            return super().visit_call_(call)
        return self._call_kernel(linear, self.visit_expr(linear.x))

    def _call_kernel(self, linear: Linear, x: relax.Expr) -> relax.Expr:
        n, k = linear.shape
        *leading, _ = x.ty.shape
        if len(leading) != 1:
            x = self.builder_.emit(relax.op.reshape(x, (prod(leading), k)))
        tokens = x.ty.shape[0]
        m = int(tokens) if isinstance(tokens, tvm.tirx.IntImm) else None
        choice = self.formats[linear.weight.name]
        for dtype in (str(x.ty.dtype), linear.out_dtype):
            if dtype not in KERNEL_DTYPES:
                known = " and ".join(KERNEL_DTYPES)
                raise Refusal(f"{linear.weight.name}: a linear layer in {dtype}, kernels take {known}")
        spec = KernelSpec(choice, n, k, m, str(x.ty.dtype), linear.out_dtype, self.arch)
        arguments = relax.Tuple([x, *self.buffers[linear.weight.name]])
        out_ty = relax.TensorType((tokens, n), linear.out_dtype)
        made = product(spec)
        if made is not None:
            y = self._call_product(made, spec, arguments, out_ty)
        else:
            y = relax.op.call_tir(self._kernel(spec), arguments, out_ty)
        if len(leading) == 1:
            return y
        return relax.op.reshape(self.builder_.emit(y), (*leading, n))

    def _kernel(self, spec: KernelSpec) -> tvm.ir.GlobalVar:
        if spec not in self.kernels:
            self.kernels[spec] = self.builder_.add_func(sketch(spec), spec.name)
        return self.kernels[spec]

    def _call_product(
        self, made: Product, spec: KernelSpec, arguments: relax.Tuple, out_ty: relax.TensorType
    ) -> relax.TupleGetItem:
        self.products[made.symbol] = made
        self._add_symbol(made.dense, lambda: sketch(dense_spec(spec)))
        if made.few:
            self._add_symbol(made.few, lambda: sketch(spec))
        if made.decode:
            self._add_symbol(made.decode, lambda: decoder(spec))
        scratch = relax.TensorType((made.scratch,), "uint8")
        both = relax.op.call_dps_packed(relax.ExternFunc(made.symbol), arguments, [out_ty, scratch])
        return relax.TupleGetItem(self.builder_.emit(both), 0)

    def _add_symbol(self, name: str, make: Callable[[], tvm.tirx.PrimFunc]) -> None:
        """A kernel that host code calls: its symbol keeps it in the library."""
        if name not in self.called:
            self.called.add(name)
            self.builder_.add_func(make().with_attr("global_symbol", name), name)


def _uses(body: relax.SeqExpr) -> set[relax.Var]:
    """What a body reads from outside, other than for values that nothing needs any more."""
    needed = set(relax.analysis.free_vars(body.body))
    for block in reversed(body.blocks):
        for binding in reversed(block.bindings):
            pure = isinstance(block, relax.DataflowBlock)
            if not pure or binding.var in needed or not isinstance(binding.var, relax.DataflowVar):
                needed |= set(relax.analysis.free_vars(binding.value))
    return needed


def _stored(choice: FormatChoice, param: relax.Var) -> FormatChoice:
    """A dense parameter is read in the dtype it has: it may have other uses, an embedding's for one."""
    if choice.name != "dense":
        return choice
    return FormatChoice("dense", (("width", 32),) if str(param.ty.dtype) == "float32" else ())


def _packed(param: relax.Var, choice: FormatChoice) -> list[relax.Var]:
    """The parameters that hold a packed matrix; a dimension the weights decide is a variable of its own."""
    if choice.name == "dense":
        return [param]
    n, k = (int(dim) for dim in param.ty.shape)
    dims: dict[str, tvm.tirx.Var] = {}
    found = []
    for buffer in FORMATS[choice.name].buffers((n, k), choice):
        sizes = [d if isinstance(d, int) else dims.setdefault(d, tvm.tirx.Var(d, "int64")) for d in buffer.shape]
        found.append(relax.Var(f"{param.name}.{buffer.name}", relax.TensorType(sizes, buffer.dtype)))
    return found
