"""Labelled images for pico models, and a bundle that was merged and exported from them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

WRONG_EVERY = 4


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Pico models are too small for several threads, which only wait for each other on a busy machine."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture
def pico_data(tmp_path: Path, pico_files: Callable[..., Path]) -> Callable[..., tuple[Path, Path]]:
    """`pico_data(tasks=3, splits={"val": 12, "test": 12}, **keys)`: recipe and data directory.

    Each task's labels are what its own fine-tuned model says, but every fourth is moved on by one, so that the
    fine-tuned accuracy is exactly 3/4. `keys` go into the recipe.
    """
    import torch

    from mass_export.checkpoints import load_checkpoint
    from mass_export.heads import load_head
    from mass_export.recipe import load_recipe
    from mass_export.vit import encode
    from runtime.preprocess import pixel_values_from_images

    def make(tasks=3, splits=None, seed=0, directory=tmp_path, **keys):
        path = pico_files(tasks=tasks, seed=seed, directory=directory, **keys)
        recipe = load_recipe(path)
        rng = np.random.default_rng(seed)
        for task in recipe.tasks:
            params = load_checkpoint(task.checkpoint, recipe.vision)
            head = load_head(task.head, task.name, task.classes, recipe.vision.embed_dim)
            for split, count in (splits or {"val": 12, "test": 12}).items():
                images = rng.integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
                pixel_values = torch.from_numpy(pixel_values_from_images(list(images), recipe.preprocess))
                logits = encode(params, pixel_values, recipe.vision) @ head.weight.T
                if head.bias is not None:
                    logits = logits + head.bias
                labels = logits.argmax(dim=1).numpy()
                labels[::WRONG_EVERY] = (labels[::WRONG_EVERY] + 1) % len(task.classes)
                file = directory / "data" / task.name / f"{split}.npz"
                file.parent.mkdir(parents=True, exist_ok=True)
                np.savez_compressed(file, images=images, labels=labels)
        return path, directory

    return make


@pytest.fixture
def pico_bundle(
    tmp_path: Path, pico_data: Callable[..., tuple[Path, Path]]
) -> Callable[..., tuple[Path, Path, Path]]:
    """`pico_bundle(**)`: recipe, data directory and exported bundle; arguments as for `pico_data`."""
    from mass_export.artifact import read_artifact, write_artifact
    from mass_export.merge import merge
    from mass_export.onnx_export import export_bundle
    from mass_export.progress import Progress
    from mass_export.recipe import load_recipe

    def make(**keys):
        recipe, data = pico_data(**keys)
        progress = Progress(quiet=True)
        write_artifact(tmp_path / "merged.safetensors", merge(load_recipe(recipe), progress))
        artifact, bundle = read_artifact(tmp_path / "merged.safetensors"), tmp_path / "bundle"
        export_bundle(artifact, tmp_path / "merged.safetensors", bundle, verify=False, progress=progress)
        return recipe, data, bundle

    return make
