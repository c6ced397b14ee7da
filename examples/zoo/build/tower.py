"""The vision tower: open_clip's own class, built from `model_config.json`, and its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from open_clip.model import CLIPVisionCfg, _build_vision_tower
from open_clip.transformer import VisionTransformer
from safetensors.torch import load_file, save_file
from torch import Tensor

ZOO = Path(__file__).resolve().parent.parent
CONFIG = ZOO / "model_config.json"
PREFIX = "visual."


def read_config() -> dict[str, Any]:
    """Reads the committed open_clip configuration."""
    return json.loads(CONFIG.read_text(encoding="utf-8"))


def build_tower() -> VisionTransformer:
    """Builds the tower with fresh weights; its keys are those of `CLIP.visual`."""
    config = read_config()["model_cfg"]
    return _build_vision_tower(config["embed_dim"], CLIPVisionCfg(**config["vision_cfg"]))


def normalise(pixels: Tensor) -> Tensor:
    """Applies the configuration's mean and standard deviation to images of 0 .. 1. [B, 3, H, W]."""
    preprocess = read_config()["preprocess_cfg"]
    mean, std = (torch.tensor(preprocess[key])[:, None, None] for key in ("mean", "std"))
    return (pixels - mean) / std


def save_tower(tower: VisionTransformer, path: Path) -> None:
    """Writes the weights in float16 under `visual.*`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {PREFIX + name: value.half().contiguous() for name, value in tower.state_dict().items()}
    partial = path.with_name(f".{path.name}.partial")
    save_file(tensors, partial, metadata={"format": "pt"})
    partial.chmod(0o644)  # safetensors writes files that only their owner may read
    partial.replace(path)


def load_tower(path: Path) -> VisionTransformer:
    """Reads what `save_tower` wrote; the float16 values are computed with in float32."""
    tower = build_tower()
    tower.load_state_dict(
        {name.removeprefix(PREFIX): value.float() for name, value in load_file(path).items()}, strict=True
    )
    return tower


@torch.no_grad()
def features_of(tower: VisionTransformer, images: Tensor, batch: int = 250) -> Tensor:
    """Unit features of finished images.

    Args:
        tower: the vision tower
        images: RGB, 0 .. 255. [B, 3, 32, 32] uint8
        batch: images at once

    Returns:
        L2-normalised. [B, D] float32
    """
    was_training = tower.training
    tower.eval()
    parts = [tower(normalise(part.float() / 255)) for part in images.split(batch)]
    tower.train(was_training)
    return torch.nn.functional.normalize(torch.cat(parts), dim=-1)
