"""Checkpoints, read lazily: a local folder, the hub, or synthetic weights."""

from tvm_sparse.checkpoint.base import READ_ROWS, Checkpoint, WeightsUnavailable
from tvm_sparse.checkpoint.source import model_config, open_checkpoint
from tvm_sparse.checkpoint.whole import Stored, VisionTower, stored_tensors

__all__ = [
    "READ_ROWS",
    "Checkpoint",
    "Stored",
    "VisionTower",
    "WeightsUnavailable",
    "model_config",
    "open_checkpoint",
    "stored_tensors",
]
