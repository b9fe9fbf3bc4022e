"""Checkpoints, read lazily: a local folder, the hub, or synthetic weights."""

from tvm_sparse.checkpoint.base import READ_ROWS, Checkpoint, WeightsUnavailable
from tvm_sparse.checkpoint.source import model_config, open_checkpoint

__all__ = ["READ_ROWS", "Checkpoint", "WeightsUnavailable", "model_config", "open_checkpoint"]
