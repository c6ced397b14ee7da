"""Adapts the pretrained base to the kinds of pictures it will meet: which two views show the same picture?

Words of outside pictures teach a tower of this size what icons and clip art show, but not to tell a garment from
a digit where both are grey on black. So the base goes on training on the tasks' training images, without their
class labels: two augmented views of each picture shall have the most similar features in the batch (InfoNCE; Chen et
al. 2020, SimCLR, equation 1), and the CLS token still describes the shapes of the whole image. Every batch has as many
pictures of each task, so that most of a picture's rivals come from other tasks, as in a batch of CLIP. Validation and
test images are never seen.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss, normalize

from .arrays import TaskArrays
from .augment import Augmentation, augment
from .finetune import as_pixels, split_validation
from .pretrain import DESCRIPTOR_SIZE, describe_shapes, learning_rate, set_patch_dropout
from .tower import load_tower, normalise, read_config, save_tower

VIEWS = Augmentation(
    zoom=(0.75, 1.4), stretch=0.2, rotate=12, shear=0.1, shift=0.08,
    brightness=0.3, saturation=0.4, hue=12, blur=0.25, noise=0.03, erase=0.25,
)  # fmt: skip
CHECKPOINT_EVERY = 200

console = Console(stderr=True)


@dataclass(frozen=True)
class ContrastSettings:
    """How the base is adapted.

    Attributes:
        steps: optimizer steps
        per_task: pictures of each task in a step; each is seen in two views
        peak_lr: highest learning rate
        warmup: steps up to the peak
        weight_decay: AdamW's, on matrices only
        temperature: of the softmax over similarities
        patch_dropout: share of patches dropped
        whole_from: share of the run after which no patches are dropped
        shape_weight: weight of the shape descriptor's loss
        ema: decay of the averaged weights, which are what is stored
        seed: of batches and augmentation
    """

    steps: int = 2200
    per_task: int = 16
    peak_lr: float = 7e-4
    warmup: int = 150
    weight_decay: float = 0.05
    temperature: float = 0.1
    patch_dropout: float = 0.5
    whole_from: float = 0.8
    shape_weight: float = 0.5
    ema: float = 0.99
    seed: int = 0


class ContrastModel(nn.Module):
    """The tower, and a layer from its CLS token to the shape descriptor; only the tower is kept."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower
        self.describe = nn.Linear(read_config()["model_cfg"]["vision_cfg"]["width"], DESCRIPTOR_SIZE)

    def forward(self, views: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Losses of pairs and shapes. views: rows i and i + B/2 show the same picture. [B, 3, H, W]."""
        tokens: list[Tensor] = []
        hook = self.tower.ln_post.register_forward_hook(lambda _m, _i, output: tokens.append(output))
        features = normalize(self.tower(views), dim=-1)
        hook.remove()
        shape = mse_loss(self.describe(tokens[0][:, 0]), describe_shapes(views))
        return pair_loss(features, temperature), shape


def pair_loss(features: Tensor, temperature: float) -> Tensor:
    """InfoNCE over a batch: each view's partner against all other views.

    Args:
        features: unit rows; i and i + B/2 are partners. [B, D] float32
        temperature: of the softmax

    Returns:
        mean cross-entropy. [] float32
    """
    count = len(features)
    similarities = features @ features.T / temperature
    similarities = similarities.masked_fill(torch.eye(count, dtype=torch.bool), -math.inf)
    partner = torch.arange(count).roll(count // 2)
    return cross_entropy(similarities, partner)


def adapt(
    tasks: Mapping[str, TaskArrays], start: Path, work: Path, base: Path, settings: ContrastSettings
) -> None:
    """Goes on training a base and writes it in float16, unless it is there already.

    Args:
        tasks: name -> images; only the training split is read, and no labels
        start: the tower that words trained
        work: gets the training checkpoint
        base: the file to write
        settings: how to train
    """
    if base.is_file():
        console.print(f"adapted base: {base} is there")
        return
    work.mkdir(parents=True, exist_ok=True)
    pools = [
        as_pixels(arrays.train_images[split_validation(task, arrays).train]) for task, arrays in tasks.items()
    ]
    torch.manual_seed(settings.seed)
    model = ContrastModel(load_tower(start))
    averaged = load_tower(start)
    matrices = [value for value in model.parameters() if value.ndim > 1]
    vectors = [value for value in model.parameters() if value.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=settings.peak_lr, betas=(0.9, 0.98), fused=True)
    state_file, first = work / "adapt.pt", 0
    if state_file.is_file():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        averaged.load_state_dict(state["averaged"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    began, running = time.time(), torch.zeros(2)
    model.train()
    for step in range(first, settings.steps):
        whole = step >= settings.whole_from * settings.steps
        set_patch_dropout(model.tower, 0.0 if whole else settings.patch_dropout)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings.steps, settings.warmup, settings.peak_lr)
        views = _views(pools, settings, step)
        pairs, shapes = model(normalise(views), settings.temperature)
        loss = pairs + settings.shape_weight * shapes
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            for mean, value in zip(averaged.parameters(), model.tower.parameters(), strict=True):
                mean.lerp_(value, 1 - settings.ema)
        now = torch.tensor([pairs.item(), shapes.item()])
        running = now if step == first else 0.98 * running + 0.02 * now
        done = step + 1
        if done % 50 == 0 or done == settings.steps:
            left = (settings.steps - done) * (time.time() - began) / (done - first) / 60
            losses = f"pairs {running[0]:.3f} shapes {running[1]:.3f}"
            console.print(f"step {done}/{settings.steps} {losses} {left:.1f} min left")
        if done % CHECKPOINT_EVERY == 0:
            state = {"model": model.state_dict(), "averaged": averaged.state_dict(), "step": done}
            torch.save(state | {"optimizer": optimizer.state_dict()}, state_file.with_suffix(".partial"))
            state_file.with_suffix(".partial").replace(state_file)
    save_tower(averaged, base)


def _views(pools: list[Tensor], settings: ContrastSettings, step: int) -> Tensor:
    """Two views of every picture of one step. [2 * tasks * per_task, 3, H, W] float32, 0 .. 1."""
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
    chosen = [pool[torch.randint(len(pool), (settings.per_task,), generator=generator)] for pool in pools]
    pictures = torch.cat(chosen)
    return augment(torch.cat([pictures, pictures]), VIEWS, generator)
