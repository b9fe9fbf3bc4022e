"""Pruning: tensor in, tensor with zeros out."""

from tvm_sparse.pruning.pattern import Pattern, parse_pattern
from tvm_sparse.pruning.pruner import Pruner, Zeros
from tvm_sparse.pruning.select import select
from tvm_sparse.pruning.weights import PrunedWeights

__all__ = ["Pattern", "PrunedWeights", "Pruner", "Zeros", "parse_pattern", "select"]
