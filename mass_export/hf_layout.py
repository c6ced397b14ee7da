"""Hugging Face's names of CLIP's tensors -> open_clip's.

`CLIPModel`, `CLIPVisionModel` and `CLIPVisionModelWithProjection` split what open_clip fuses: q, k and v have a
matrix each where open_clip stacks their rows in this order, and projections are stored transposed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mass_export.errors import CheckpointFormatError, ModelConfigError
from mass_export.spec import VisionSpec

PROJECTION = "visual.proj"

_ANCHOR = re.compile(r"(?P<outer>(?:.*?\.)??)(?P<inner>vision_model\.)?embeddings\.class_embedding")
_VISION = {
    "embeddings.class_embedding": "class_embedding",
    "embeddings.patch_embedding.weight": "conv1.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    **{f"pre_layrnorm.{part}": f"ln_pre.{part}" for part in ("weight", "bias")},  # the field's own spelling
    **{f"post_layernorm.{part}": f"ln_post.{part}" for part in ("weight", "bias")},
}
_TEXT = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    **{f"final_layer_norm.{part}": f"ln_final.{part}" for part in ("weight", "bias")},
}
_LAYER = re.compile(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")
_LAYER_PARTS = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
QKV = ("q", "k", "v")


class HuggingFaceLayout(Mapping[str, Tensor]):
    """Tensors of a Hugging Face CLIP under open_clip's names, made when they are asked for.

    The vision tower gets the prefix `visual.`, as in open_clip's CLIP. Names that mean nothing here stay.
    """

    def __init__(self, tensors: Mapping[str, Tensor], outer: str, inner: str) -> None:
        self._tensors = tensors
        self._sources: dict[str, tuple[str, ...]] = {}
        parts: dict[str, dict[str, str]] = {}
        for name in tensors:
            target = open_clip_target(name, outer, inner)
            if target is None:
                continue
            fused, part = target
            parts.setdefault(fused, {})[part] = name
        for fused, sources in parts.items():
            if set(sources) == set(QKV):
                self._sources[fused] = tuple(sources[part] for part in QKV)
            elif set(sources) == {""}:
                self._sources[fused] = (sources[""],)
            else:  # a part is missing: the fused name is too, and what is there shows as unexpected
                self._sources |= {name: (name,) for name in sources.values()}

    def __getitem__(self, name: str) -> Tensor:
        sources = self._sources[name]
        if len(sources) > 1:
            return torch.cat([self._tensors[source] for source in sources])
        tensor = self._tensors[sources[0]]
        transposed = name in (PROJECTION, "text_projection") and tensor.ndim == 2
        return tensor.T if transposed else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)


def open_clip_layout(tensors: Mapping[str, Tensor], where: str) -> Mapping[str, Tensor]:
    """The tensors under open_clip's names, if they have Hugging Face's; else as they are.

    Raises:
        CheckpointFormatError: there are several towers.
    """
    anchors = [match for match in map(_ANCHOR.fullmatch, tensors) if match]
    if not anchors:
        return tensors
    if len(anchors) > 1:
        towers = ", ".join(sorted(match.string for match in anchors))
        raise CheckpointFormatError(f"{where}: holds several vision towers ({towers}); keep one of them.")
    return HuggingFaceLayout(tensors, anchors[0]["outer"], anchors[0]["inner"] or "")


def open_clip_target(name: str, outer: str = "", inner: str = "vision_model.") -> tuple[str, str] | None:
    """open_clip's name of a tensor, and which part of it (q, k, v or all, ""); None for what is dropped."""
    if not name.startswith(outer):
        return name, ""
    bare = name[len(outer) :]
    if bare == "visual_projection.weight":
        return PROJECTION, ""
    if bare in ("text_projection.weight", "logit_scale"):
        return bare.removesuffix(".weight"), ""
    for tower, names, prefix in (("text_model.", _TEXT, ""), (inner, _VISION, "visual.")):
        if bare.startswith(tower):
            rest = bare[len(tower) :]
            if rest == "embeddings.position_ids":
                return None
            fused, part = _layer_target(rest) or (names.get(rest), "")
            return (name, "") if fused is None else (f"{prefix}{fused}", part)
    return name, ""


def _layer_target(rest: str) -> tuple[str, str] | None:
    match = _LAYER.fullmatch(rest)
    if match is None:
        return None
    layer, module, kind = match.groups()
    block = f"transformer.resblocks.{layer}"
    if module in _LAYER_PARTS:
        return f"{block}.{_LAYER_PARTS[module]}.{kind}", ""
    split = re.fullmatch(r"self_attn\.([qkv])_proj", module)
    return (f"{block}.attn.in_proj_{kind}", split[1]) if split else None


def check_config(folder: Path, vision: VisionSpec) -> None:
    """Compare the settings in a folder's config.json that change numbers but no shape with the model config.

    Raises:
        ModelConfigError: the activation, heads or epsilon differ.
    """
    path = folder / "config.json"
    if not path.is_file():
        return
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelConfigError(f"{path}: not a JSON model config ({error}).") from error
    if not isinstance(config, dict):
        return
    found: Any = config.get("vision_config", config)
    if not isinstance(found, dict) or not {"hidden_act", "num_attention_heads"} & set(found):
        return
    expected = {
        "hidden_act": vision.activation,
        "num_attention_heads": vision.heads,
        "layer_norm_eps": vision.layer_norm_eps,
    }
    wrong = [
        f"{key}: {found[key]!r}, not {value!r}"
        for key, value in expected.items()
        if found.get(key, value) != value
    ]
    if wrong:
        raise ModelConfigError(
            f"{path}: differs from the recipe's model in {'; '.join(wrong)}. Name the model that the checkpoint was "
            "trained as, such as ViT-B-32-quickgelu for OpenAI's weights."
        )
