"""Sound files of every kind that `fuzz.py` starts from."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import yaml

ZOO = Path(__file__).parents[1] / "examples" / "zoo"


def write_seeds(target: str, corpus: Path, place: Path) -> None:
    """Sound files to start from."""
    if target == "image":
        for name, data in images().items():
            (corpus / name).write_bytes(data)
    elif target == "recipe":
        short = (ZOO / "core.yaml").read_text().split("- name: fashion", maxsplit=1)[0]
        (corpus / "short.yaml").write_text(short)
        (corpus / "keys.yaml").write_text(
            f"{short}sum_weights: gates\nvectors: base\npatch_embed: low_rank\n"
        )
    else:
        _write_merged_seeds(target, corpus, place)


def _write_merged_seeds(target: str, corpus: Path, place: Path) -> None:
    from mass_export.artifact import read_artifact, write_artifact  # noqa: PLC0415
    from mass_export.artifact_header import metadata_from_info  # noqa: PLC0415
    from mass_export.merge import merge  # noqa: PLC0415
    from mass_export.onnx_export import write_bundle  # noqa: PLC0415
    from mass_export.progress import Progress  # noqa: PLC0415
    from mass_export.recipe import load_recipe  # noqa: PLC0415

    recipe = _tiny_recipe(place)
    quiet, path = Progress(quiet=True), place / "seed.safetensors"
    artifact = merge(load_recipe(recipe), quiet)
    write_artifact(path, artifact)
    if target == "artifact_header":
        (corpus / "info").write_text(metadata_from_info(read_artifact(path).info)["info"])
    elif target == "artifact_file":
        (corpus / "artifact").write_bytes(path.read_bytes())
    else:
        bundle = place / "bundle"
        bundle.mkdir()
        write_bundle(artifact, path, bundle, quiet)
        if target == "graph":
            for file in bundle.glob("*.onnx"):
                (corpus / file.name).write_bytes(file.read_bytes())
            return
        manifest = json.loads((bundle / "manifest.json").read_text())
        manifest["matrices"] = manifest["matrices"][:2]
        for spec in manifest["passes"].values():
            spec["inputs"] = spec["inputs"][:5]
        (corpus / "manifest").write_text(json.dumps(manifest))


def _tiny_recipe(place: Path) -> Path:
    """Two tasks of a tower so small that its artifact is a handy input."""
    import torch  # noqa: PLC0415
    from safetensors.torch import save_file  # noqa: PLC0415

    from mass_export.model_config import vision_spec_from_config  # noqa: PLC0415

    vision = {"image_size": 8, "patch_size": 8, "width": 8, "layers": 1, "head_width": 8, "mlp_ratio": 1.0}
    text = {"context_length": 8, "vocab_size": 8, "width": 8, "heads": 1, "layers": 1}
    config = {"embed_dim": 8, "vision_cfg": vision, "text_cfg": text}
    (place / "model.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    shapes = vision_spec_from_config(config, "model.json").parameter_shapes()
    for name in ("base", "a", "b"):
        tower = {f"visual.{key}": torch.randn(shape) for key, shape in shapes.items()}
        save_file(tower, place / f"{name}.safetensors")
    save_file({"a": torch.randn(2, 8), "b": torch.randn(3, 8)}, place / "heads.safetensors")
    tasks = [
        {"name": name, "checkpoint": f"{name}.safetensors", "classes": [f"{name}{i}" for i in range(count)]}
        | {"head": {"file": "heads.safetensors", "tensor": name}}
        for name, count in {"a": 2, "b": 3}.items()
    ]
    recipe = {"model": "model.json", "base": "base.safetensors", "rank": 1, "tasks": tasks}
    (place / "two.yaml").write_text(yaml.safe_dump(recipe))
    return place / "two.yaml"


def images() -> dict[str, bytes]:
    """Small pictures in many formats and modes, animations among them."""
    from PIL import Image  # noqa: PLC0415

    made = {}
    rng = np.random.default_rng(0)
    for mode in ("RGB", "L", "P", "RGBA", "LA", "1", "CMYK", "I;16", "I", "F"):
        picture = Image.fromarray(rng.integers(0, 256, (9, 7, 3), dtype=np.uint8)).convert("RGB")
        picture = (
            picture.convert("L").convert(mode) if mode in ("I", "F", "I;16", "LA") else picture.convert(mode)
        )
        for kind in (
            "PNG",
            "JPEG",
            "GIF",
            "WEBP",
            "TIFF",
            "BMP",
            "PPM",
            "TGA",
            "ICO",
            "PCX",
            "JPEG2000",
            "DDS",
            "SGI",
        ):
            file = io.BytesIO()
            try:
                picture.save(file, kind)
            except (OSError, ValueError, KeyError):  # not every format has every mode
                continue
            made[f"{mode.replace(';', '')}.{kind}"] = file.getvalue()
    frames = [Image.fromarray(rng.integers(0, 256, (9, 7, 3), dtype=np.uint8)) for _ in range(3)]
    for kind in ("GIF", "PNG", "WEBP", "TIFF"):
        file = io.BytesIO()
        frames[0].save(file, kind, save_all=True, append_images=frames[1:])
        made[f"frames.{kind}"] = file.getvalue()
    return made
