"""TensorIR kernels: what they compute, the spaces of their schedules, and the one table that finds them."""

import tvm_sparse.schedules.fast_parse  # noqa: F401  TVMScript is parsed from here on
