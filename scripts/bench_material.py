"""A full-size bundle for timing in seconds, without checkpoints and decompositions.

The artifact is drawn at random with the shapes, ranks and stored numbers that merging real tasks gives: orthonormal
factors, whole deltas of the vector parameters, heads. Times, sizes and parity are those of a real bundle; what it
answers means nothing. For material that goes through the merge itself use `make_synthetic_tasks.py`.

    python scripts/bench_material.py --model ViT-B-32 --tasks 20 --out build/t20
"""

from __future__ import annotations

import math
from pathlib import Path

import click
import torch
from make_synthetic_tasks import random_base

from mass_export.artifact import Artifact, TaskFactors, write_artifact
from mass_export.factor_storage import Storage, patch_rank
from mass_export.heads import Head
from mass_export.low_rank import LowRank
from mass_export.model_config import load_model_config, preprocess_spec_from_config, vision_spec_from_config
from mass_export.onnx_export import export_bundle
from mass_export.progress import Progress
from mass_export.router_spec import RouterSettings
from mass_export.spec import ArtifactInfo, MergeSettings, PatchEmbed, TaskInfo, VisionSpec, rank_of
from runtime.bundle import ImageDtype, PreprocessSpec
from runtime.engine_spec import Precision


def orthonormal(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    """Random orthonormal columns. [rows, columns]"""
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator)).Q


def random_factors(
    spec: VisionSpec, base: dict[str, torch.Tensor], ratio: float, seed: int, patch_embed: PatchEmbed
) -> TaskFactors:
    """One task: deltas of about a third of the weights' spread."""
    generator = torch.Generator().manual_seed(seed)
    matrices, vectors = {}, {}
    for name, shape in spec.parameter_shapes().items():
        scale = 0.3 * (base[name].std().item() or 0.02)
        if len(shape) == 2:
            rank = rank_of(shape, ratio, None)
            s = torch.arange(1, rank + 1).float().rsqrt()
            s *= scale * (shape[0] * shape[1] / s.square().sum()).sqrt()
            u, v = (orthonormal(side, rank, generator) for side in shape)
            matrices[name] = LowRank(u, s, v.T.contiguous())
        else:
            vectors[name] = scale * torch.randn(shape, generator=generator)
    if patch_embed == "low_rank":
        shape, rank = spec.parameter_shapes()["conv1.weight"], patch_rank(f.rank for f in matrices.values())
        u, v = (orthonormal(side, rank, generator) for side in (shape[0], math.prod(shape[1:])))
        vectors["conv1.weight"] = (base["conv1.weight"].std() * (u @ v.T)).reshape(shape)
    return TaskFactors(matrices, vectors)


def random_artifact(
    spec: VisionSpec,
    preprocess: PreprocessSpec,
    task_count: int,
    *,
    router: RouterSettings,
    merge: MergeSettings,
    ratio: float | None = None,
    patch_embed: PatchEmbed = "full",
) -> Artifact:
    """An artifact of random tasks, `ratio` of each matrix' rank (1/T by default)."""
    generator = torch.Generator().manual_seed(0)
    base = random_base(spec, generator)
    ratio = 1 / task_count if ratio is None else ratio
    tasks = tuple(random_factors(spec, base, ratio, 1 + i, patch_embed) for i in range(task_count))
    infos = tuple(
        TaskInfo(f"task{i:02d}", tuple(f"label{j}" for j in range(10 + 7 * (i % 5))))
        for i in range(task_count)
    )
    merged = {}
    if merge.base_merge != "zeroshot":
        merged = {
            name: p + 0.1 * (p.std().item() or 0.02) * torch.randn(p.shape, generator=generator)
            for name, p in base.items()
        }
    heads = tuple(
        Head(
            100
            * torch.nn.functional.normalize(
                torch.randn(len(info.classes), spec.embed_dim, generator=generator), dim=-1
            )
        )
        for info in infos
    )
    info = ArtifactInfo(
        vision=spec,
        preprocess=preprocess,
        tasks=infos,
        merge=merge,
        router=router,
        rank_ratios=(ratio,) * task_count,
    )
    bases = tuple({tap.parameter: task.matrices[tap.parameter].vh for tap in info.taps()} for task in tasks)
    return Artifact(info, base, merged, tasks, bases, heads, storage=Storage(patch_embed=patch_embed))


def artifact_of(
    model: str,
    task_count: int,
    *,
    base_merge: str = "zeroshot",
    layer: int | None = None,
    patch_embed: PatchEmbed = "full",
) -> Artifact:
    """Random tasks of a named model; arguments as of `make_bundle`."""
    config, preprocess_config, where = load_model_config(model, Path.cwd())
    spec = vision_spec_from_config(config, where)
    return random_artifact(
        spec,
        preprocess_spec_from_config(preprocess_config, spec.image_size, where),
        task_count,
        router=RouterSettings(layer=layer, mode="top1"),
        merge=MergeSettings(base_merge=base_merge),  # type: ignore[arg-type]  # one of the two
        patch_embed=patch_embed,
    )


def make_bundle(
    model: str,
    task_count: int,
    artifact_file: Path,
    bundle: Path,
    *,
    base_merge: str = "zeroshot",
    layer: int | None = None,
    precision: Precision = "fp32",
    patch_embed: PatchEmbed = "full",
    router_precision: Precision | None = None,
    image_dtype: ImageDtype = "float32",
) -> None:
    """Write an artifact of random tasks and its bundle.

    Args:
        model: open_clip model name, or a path to its JSON.
        task_count: T.
        artifact_file: where to.
        bundle: where to.
        base_merge: of the first pass, `zeroshot` or `tsvm`.
        layer: routing layer; None takes 3/4 of the depth.
        precision: of the graphs.
        patch_embed: `low_rank` for tasks that change the patch convolution in few directions.
        router_precision: of the first pass, if that has another; see `export_bundle`.
        image_dtype: of what the graphs take.
    """
    artifact = artifact_of(model, task_count, base_merge=base_merge, layer=layer, patch_embed=patch_embed)
    write_artifact(artifact_file, artifact)
    export_bundle(
        artifact,
        artifact_file,
        bundle,
        verify=False,
        progress=Progress(quiet=True),
        precision=precision,
        router_precision=router_precision,
        image_dtype=image_dtype,
    )


@click.command(help=__doc__)
@click.option("--model", required=True, help="open_clip model name, such as ViT-B-32, or a path to its JSON.")
@click.option("--tasks", "task_count", default=8, show_default=True, type=click.IntRange(1))
@click.option("--out", required=True, type=click.Path(path_type=Path, file_okay=False))
@click.option("--base-merge", default="zeroshot", show_default=True, type=click.Choice(["zeroshot", "tsvm"]))
@click.option("--layer", type=int, help="Routing layer; 3/4 of the depth by default.")
@click.option("--patch-embed", default="full", show_default=True, type=click.Choice(["full", "low_rank"]))
def main(
    model: str, task_count: int, out: Path, base_merge: str, layer: int | None, patch_embed: PatchEmbed
) -> None:
    """Write OUT/merged.safetensors and the bundle OUT/bundle."""
    out.mkdir(parents=True, exist_ok=True)
    artifact_file = out / "merged.safetensors"
    make_bundle(
        model,
        task_count,
        artifact_file,
        out / "bundle",
        base_merge=base_merge,
        layer=layer,
        patch_embed=patch_embed,
    )
    click.echo(f"Wrote {out}: {task_count} random tasks of {model}")


if __name__ == "__main__":
    main()
