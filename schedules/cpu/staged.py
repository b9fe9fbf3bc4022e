"""x copied as float32 with zeros after its last column, for formats that read past it or column by column."""

from __future__ import annotations

from tvm import tirx
from tvm.tirx.script import builder as T


def stage(x: tirx.Buffer, past: int) -> tirx.Buffer:
    """Emits the copy: float32 [m, k + past], exact for both dtypes of x."""
    m, k = x.shape
    k = int(k)
    staged = T.alloc_buffer((m, k + past), "float32")
    with T.parallel(0, m) as token:
        with T.serial(0, k) as column:
            T.buffer_store(staged, T.cast(x[token, column], "float32"), [token, column])
        with T.serial(0, past) as column:
            T.buffer_store(staged, T.float32(0), [token, k + column])
    return staged
