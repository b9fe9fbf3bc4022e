"""The arguments every matmul kernel has: x, the format's buffers in order, y; between them those of what is fused."""

from __future__ import annotations

from tvm import tirx
from tvm.tirx.script import builder as T

from tvm_sparse.formats import FORMATS
from tvm_sparse.schedules.spec import KernelSpec


def arguments(spec: KernelSpec, m) -> tuple[tirx.Buffer, list[tirx.Buffer], tirx.Buffer]:
    """Declares the arguments of the function being built; a dimension the weights decide is a fresh variable."""
    x = T.arg("x", T.buffer((m, spec.k), spec.x_dtype))
    if spec.norm_eps:
        T.arg("norm", T.buffer((spec.k,), "float32"))
    buffers = []
    dims: dict[str, tirx.Var] = {}
    for buffer in FORMATS[spec.choice.name].buffers((spec.n, spec.k), spec.choice):
        shape = [d if isinstance(d, int) else dims.setdefault(d, tirx.Var(d, "int64")) for d in buffer.shape]
        buffers.append(T.arg(buffer.name or "weight", T.buffer(shape, buffer.dtype)))
    if spec.after == "add":
        T.arg("residual", T.buffer((m, spec.n), spec.out_dtype))
    y = T.arg("y", T.buffer((m, spec.out_features), spec.out_dtype))
    return x, buffers, y
