"""Full-size material without downloads: a random base of a true open_clip config, and fine-tuned tasks of it.

Every task is the base plus a low-rank delta with a decaying spectrum and a little noise, as fine-tuning leaves
it. The numbers classify nothing; sizes, times and parity are those of real models.

    python scripts/make_synthetic_tasks.py --model ViT-B-32 --tasks 8 --out build/b32x8
    mass merge build/b32x8/recipe.yaml --out build/b32x8/merged.safetensors
"""

from __future__ import annotations

import json
from pathlib import Path

import click
import torch
import yaml
from rich.progress import track
from safetensors.torch import save_file

from mass_export.model_config import load_model_config, vision_spec_from_config
from mass_export.spec import VisionSpec

DTYPES = {"float16": torch.float16, "float32": torch.float32, "bfloat16": torch.bfloat16}


def random_base(spec: VisionSpec, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Weights at the scales of open_clip's initialisation."""
    tower = {}
    for name, shape in spec.parameter_shapes().items():
        if name.endswith((".bias", "_bias")):
            tower[name] = torch.zeros(shape)
        elif "ln_" in name:
            tower[name] = torch.ones(shape)
        else:
            fan_in = shape[0] if name == "proj" or len(shape) == 1 else torch.Size(shape[1:]).numel()
            tower[name] = torch.randn(shape, generator=generator) * (fan_in**-0.5)
    return tower


def finetuned(
    base: dict[str, torch.Tensor], rank: int, scale: float, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """Base plus, for every parameter, a delta of about `scale` times its spread."""
    tower = {}
    for name, parameter in base.items():
        spread = scale * (parameter.std().item() or 0.02)
        delta = 0.1 * spread * torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 2:
            r = min(rank, *parameter.shape)
            decay = torch.arange(1, r + 1).float().rsqrt()
            left = torch.randn(parameter.shape[0], r, generator=generator) * decay
            right = torch.randn(r, parameter.shape[1], generator=generator)
            delta += spread * (left @ right) / decay.square().sum().sqrt()
        else:
            delta += spread * torch.randn(parameter.shape, generator=generator)
        tower[name] = parameter + delta
    return tower


@click.command(help=__doc__)
@click.option("--model", required=True, help="open_clip model name, such as ViT-B-32, or a path to its JSON.")
@click.option("--tasks", "task_count", default=8, show_default=True, type=click.IntRange(1))
@click.option("--out", required=True, type=click.Path(path_type=Path, file_okay=False))
@click.option("--rank", default=64, show_default=True, help="Rank of the deltas' low-rank part.")
@click.option("--scale", default=0.3, show_default=True, help="Size of the deltas relative to the weights.")
@click.option("--dtype", default="float16", show_default=True, type=click.Choice(list(DTYPES)))
@click.option("--seed", default=0, show_default=True)
def main(model: str, task_count: int, out: Path, rank: int, scale: float, dtype: str, seed: int) -> None:
    """Write base, tasks, heads, model config and recipe."""
    config, _, where = load_model_config(model, Path.cwd())
    spec = vision_spec_from_config(config, where)
    generator = torch.Generator().manual_seed(seed)
    out.mkdir(parents=True, exist_ok=True)
    (out / "model_config.json").write_text(json.dumps(config, indent=1))

    def save(tower: dict[str, torch.Tensor], name: str) -> None:
        tensors = {f"visual.{key}": t.to(DTYPES[dtype]) for key, t in tower.items()}
        save_file(tensors, out / name)

    base = random_base(spec, generator)
    save(base, "base.safetensors")
    heads, entries = {}, []
    for index in track(range(task_count), "Writing tasks"):
        name = f"task{index:02d}"
        save(finetuned(base, rank, scale, generator), f"{name}.safetensors")
        classes = 10 + 7 * (index % 5)
        weight = torch.nn.functional.normalize(
            torch.randn(classes, spec.embed_dim, generator=generator), dim=-1
        )
        heads[f"{name}.weight"] = 100 * weight
        entries.append(
            {
                "name": name,
                "checkpoint": f"{name}.safetensors",
                "head": {"file": "heads.safetensors", "tensor": f"{name}.weight"},
                "classes": [f"{name}-{label}" for label in range(classes)],
            }
        )
    save_file(heads, out / "heads.safetensors")
    recipe = {"model": "model_config.json", "base": "base.safetensors", "tasks": entries}
    (out / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    click.echo(f"Wrote {task_count} tasks of {model} to {out}")


if __name__ == "__main__":
    main()
