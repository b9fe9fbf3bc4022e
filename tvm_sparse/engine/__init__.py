"""Runs an artefact: needs tvm_ffi, numpy and TVM's runtime library; neither torch nor TVM's compiler or package."""

from tvm_sparse.engine.engine import Engine

__all__ = ["Engine"]
