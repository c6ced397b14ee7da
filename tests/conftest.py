"""Pico models, built in code: a ViT tower of width 32, its fine-tuned tasks, and a recipe for them.

Imports of torch and of the builder stay inside the fixtures, so that the runtime's tests run without either.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    import torch

    from mass_export.spec import VisionSpec

    Tower = dict[str, torch.Tensor]

PICO_MODEL_CONFIG: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {
        "image_size": 16,
        "patch_size": 8,
        "width": 32,
        "layers": 3,
        "head_width": 16,
        "mlp_ratio": 2.0,
    },
    "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1},
}
PICO_RANK = 4


@pytest.fixture
def pico_model_config() -> dict[str, Any]:
    """The pico model in open_clip's plain config form."""
    return json.loads(json.dumps(PICO_MODEL_CONFIG))


@pytest.fixture
def pico_vision() -> VisionSpec:
    """Image 16x16, patch 8 (N = 5 tokens), D = 32, 3 blocks, 2 heads, MLP 64, embedding 16."""
    from mass_export.spec import VisionSpec

    return VisionSpec(
        image_size=(16, 16),
        patch_size=(8, 8),
        width=32,
        layers=3,
        heads=2,
        mlp_width=64,
        embed_dim=16,
    )


@pytest.fixture
def pico_tower(pico_vision: VisionSpec) -> Callable[..., Tower]:
    """`pico_tower(seed)`: a random float32 tower, names without `visual.`, activations of order one."""
    import torch

    def make(seed: int = 0, vision: VisionSpec = pico_vision) -> Tower:
        generator = torch.Generator().manual_seed(seed)
        tower = {}
        for name, shape in vision.parameter_shapes().items():
            noise = torch.randn(shape, generator=generator)
            if name.endswith((".bias", "_bias")):
                tower[name] = 0.05 * noise
            elif len(shape) == 1 and name != "class_embedding":
                tower[name] = 1 + 0.1 * noise  # LayerNorm scales
            elif name in ("class_embedding", "positional_embedding"):
                tower[name] = 0.3 * noise
            elif name == "proj":
                tower[name] = noise / shape[0] ** 0.5
            else:
                tower[name] = noise / noise[0].numel() ** 0.5
        return tower

    return make


@pytest.fixture
def pico_finetuned() -> Callable[..., Tower]:
    """`pico_finetuned(base, seed)`: base plus a delta of rank 4 and a little noise, distinct per seed."""
    import torch

    def make(base: Tower, seed: int, scale: float = 0.3) -> Tower:
        generator = torch.Generator().manual_seed(1000 + seed)
        tower = {}
        for name, parameter in base.items():
            delta = 0.3 * torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 2:
                left = torch.randn(parameter.shape[0], PICO_RANK, generator=generator)
                right = torch.randn(PICO_RANK, parameter.shape[1], generator=generator)
                delta = delta + left @ right / PICO_RANK**0.5
            tower[name] = parameter + scale * delta * parameter.abs().mean()
        return tower

    return make


@pytest.fixture
def pico_files(
    tmp_path: Path, pico_tower: Callable[..., Tower], pico_finetuned: Callable[..., Tower]
) -> Callable[..., Path]:
    """`pico_files(tasks=3, **keys)`: write base, tasks, heads, config and recipe; the recipe's path.

    Tasks are named task0, task1, .. with 3, 4, 5, 3, .. classes; even ones have a bias in their head. `keys`
    are further top-level keys of the recipe, such as `router={"layer": 1}`; the router is the paper's unless given,
    and left out if None. `directory` defaults to tmp_path.
    """
    import torch
    import yaml
    from safetensors.torch import save_file

    def write(tasks: int = 3, directory: Path = tmp_path, seed: int = 0, **keys: Any) -> Path:
        directory.mkdir(parents=True, exist_ok=True)
        base = pico_tower(seed)
        save_file({f"visual.{name}": tensor for name, tensor in base.items()}, directory / "base.safetensors")
        (directory / "model.json").write_text(json.dumps(PICO_MODEL_CONFIG))
        heads: Tower = {}
        entries = []
        generator = torch.Generator().manual_seed(2000 + seed)
        for index in range(tasks):
            name, count = f"task{index}", 3 + index % 3
            tower = pico_finetuned(base, seed * 100 + index)
            file = f"{name}.safetensors"
            save_file({f"visual.{key}": tensor for key, tensor in tower.items()}, directory / file)
            weight = torch.randn(count, PICO_MODEL_CONFIG["embed_dim"], generator=generator)
            heads[f"{name}.weight"] = 10 * weight / weight.norm(dim=-1, keepdim=True)
            head = {"file": "heads.safetensors", "tensor": f"{name}.weight"}
            if index % 2 == 0:
                heads[f"{name}.bias"] = torch.randn(count, generator=generator)
                head["bias"] = f"{name}.bias"
            classes = [f"{name}-class{label}" for label in range(count)]
            entries.append({"name": name, "checkpoint": file, "head": head, "classes": classes})
        save_file(heads, directory / "heads.safetensors")
        recipe = {
            "model": "model.json",
            "base": "base.safetensors",
            "tasks": entries,
            "router": "paper",
            **keys,
        }
        path = directory / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe, sort_keys=False))
        return path

    return write


@pytest.fixture(scope="session")
def changed_anywhere() -> Callable[..., Any]:
    """`changed_anywhere(value, data, values)`: parsed JSON with something else at one or two places.

    `data` is hypothesis' `st.data()`, `values` a strategy for what stands there instead.
    """
    from hypothesis import strategies as st

    def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
        yield path
        items = (
            value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        )
        for key, item in items:
            yield from places(item, (*path, key))

    def replaced(value: Any, path: tuple[Any, ...], by: Any) -> Any:
        if not path:
            return by
        copy = value.copy()
        copy[path[0]] = replaced(value[path[0]], path[1:], by)
        return copy

    def change(value: Any, data: Any, values: Any) -> Any:
        for _ in range(data.draw(st.integers(1, 2))):
            value = replaced(value, data.draw(st.sampled_from(list(places(value)))), data.draw(values))
        return value

    return change
