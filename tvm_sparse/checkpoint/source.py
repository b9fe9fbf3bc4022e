"""Where a model's configuration and weights come from: `--model` and `--weights` as the command line has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tvm_sparse.checkpoint.base import Checkpoint
from tvm_sparse.checkpoint.folder import FolderCheckpoint, folder_config
from tvm_sparse.checkpoint.hub import HUB_IDS, cached, download, fetch_configuration, is_hub_id
from tvm_sparse.checkpoint.synthetic import SyntheticCheckpoint
from tvm_sparse.errors import Refusal
from tvm_sparse.models.config import REGISTERED, ModelConfig


def model_config(model: str) -> ModelConfig:
    """The configuration of `--model`: a folder, a registered name or a hub id. Raises Refusal."""
    if Path(model).is_dir():
        return folder_config(Path(model))
    if model.lower() in REGISTERED:
        return REGISTERED[model.lower()]
    if is_hub_id(model):
        return folder_config(fetch_configuration(model))
    raise Refusal(f"unknown model {model}: give a folder, a hub id or one of {', '.join(REGISTERED)}")


def open_checkpoint(
    where: str, config: ModelConfig | None = None, *, model: str | None = None, seed: int = 0
) -> Checkpoint:
    """Opens `--weights`: a folder, a hub id, a registered name, `synthetic`, or `auto`.

    `auto` is `model` as a folder, else its copy in the local hub cache, else the hub. With `config` the weights must
    fit it; `seed` is of synthetic ones. Raises Refusal for bad input, WeightsUnavailable where no weights can be had.
    """
    if where == "synthetic":
        if config is None:
            raise Refusal("synthetic weights need a model: pass --model")
        return SyntheticCheckpoint(config, seed)
    if where == "auto":
        if model is None:
            raise Refusal("weights auto needs a model: pass --model, or --weights FOLDER")
        where = model
    if Path(where).is_dir():
        return FolderCheckpoint(Path(where), config)
    hub_id = HUB_IDS.get(where.lower(), where)
    if not is_hub_id(hub_id):
        raise Refusal(f"no folder {where}: give a folder with safetensors, a hub id, or synthetic")
    folder = cached(hub_id) or download(hub_id)
    origin: dict[str, Any] = {"kind": "hub", "id": hub_id, "revision": folder.name}
    return FolderCheckpoint(folder, config, origin)
