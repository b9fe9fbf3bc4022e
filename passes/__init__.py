"""Graph passes, one a file, each named for what it does."""

import tvm_ffi

from tvm_sparse.errors import Refusal

# A pass is called through TVM, which passes on only the exceptions it knows; any other arrives as a RuntimeError.
tvm_ffi.error.register_error("Refusal", Refusal)
