"""open_clip's model configs -> `VisionSpec` and `PreprocessSpec`; all but plain ViTs are refused by name."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mass_export.checks import is_int, is_real, is_there
from mass_export.errors import ModelConfigError
from mass_export.spec import VisionSpec
from runtime.bundle import PreprocessSpec

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
MAX_CONFIG_BYTES = 1 << 20

# Settings of vision_cfg that are fine at these values and refused at any other.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "act_kwargs": (None, {}),
    "attentional_pool": (False,),
    "block_type": (None, "default"),
    "final_ln_after_pool": (False,),
    "input_patchnorm": (False,),
    "pool_type": ("tok",),
    "pos_embed_type": ("learnable", "sin_cos_2d"),  # a table in the checkpoint, either way
    "qk_norm": (False,),
    "scale_attn": (False,),
    "scale_attn_inner": (False,),
    "scale_fc": (False,),
    "scale_heads": (False,),
    "scaled_cosine_attn": (False,),
    "timm_model_name": (None,),
}
_READ = {"image_size", "patch_size", "width", "layers", "head_width", "mlp_ratio", "no_ln_pre", "norm_kwargs"}
_WITHOUT_EFFECT = {  # only training, a further output, the checkpoint, or only towers that _NEUTRAL refuses
    "attn_pooler_heads",
    "attn_pooler_queries",
    "ls_init_value",
    "output_tokens",
    "patch_dropout",
    "timm_drop",
    "timm_drop_path",
    "timm_model_pretrained",
    "timm_pool",
    "timm_proj",
    "timm_proj_bias",
}


def load_model_config(model: str, directory: Path) -> tuple[dict[str, Any], dict[str, Any] | None, str]:
    """Find a model config by file or by open_clip's name.

    Args:
        model: path to a JSON file relative to `directory`, in open_clip's plain form or the hub's (with the
            keys `model_cfg` and `preprocess_cfg`); or the name of a model, such as ViT-B-32-quickgelu.
        directory: where relative paths start.

    Returns:
        the model config, the preprocess config if there is one, and where they come from, for messages.

    Raises:
        ModelConfigError: no such file or name, or not a JSON object.
    """
    path = directory / model
    if not is_there(path, file=True):
        if path.suffix == ".json":
            raise ModelConfigError(f"{path}: no such file; give open_clip's JSON config, or a model's name.")
        return _config_by_name(model), None, f"open_clip model {model}"
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ModelConfigError(f"{path}: larger than {MAX_CONFIG_BYTES} bytes; not a model config.")
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, ModelConfigError):
            raise
        raise ModelConfigError(f"{path}: not a JSON model config ({error}).") from error
    preprocess = None
    if isinstance(data, dict) and "model_cfg" in data:
        data, preprocess = data["model_cfg"], data.get("preprocess_cfg")
    if not isinstance(data, dict) or not isinstance(preprocess, dict | None):
        raise ModelConfigError(f"{path}: expected a JSON object with embed_dim and vision_cfg.")
    return data, preprocess, str(path)


def _config_by_name(name: str) -> dict[str, Any]:
    import open_clip  # noqa: PLC0415 - imports torch, which takes seconds

    wanted = name.replace("/", "-")  # OpenAI writes ViT-B/32
    config = open_clip.get_model_config(wanted)
    if config is None:
        known = {known.lower(): known for known in open_clip.list_models()}
        close = [known[match] for match in difflib.get_close_matches(wanted.lower(), known, n=5, cutoff=0.5)]
        hint = f"did you mean {', '.join(close)}?" if close else "see open_clip.list_models()."
        raise ModelConfigError(f"model {name!r}: neither a file nor an open_clip model; {hint}")
    return dict(config)


def vision_spec_from_config(config: Mapping[str, Any], where: str) -> VisionSpec:
    """Read open_clip's model config (`embed_dim`, `vision_cfg`, `quick_gelu`, ..).

    Raises:
        ModelConfigError: something is missing, or a setting is not that of a plain ViT; it is named.
    """
    vision = config.get("vision_cfg")
    if not isinstance(vision, Mapping) or not is_int(config.get("embed_dim")):
        raise ModelConfigError(f"{where}: not an open_clip model config (needs embed_dim and vision_cfg).")
    _refuse_unsupported(vision, where)
    norm = vision.get("norm_kwargs") or {}
    try:
        width, head_width = int(vision.get("width", 768)), int(vision.get("head_width", 64))
        return VisionSpec(
            image_size=_pair(vision.get("image_size", 224)),
            patch_size=_pair(vision.get("patch_size", 16)),
            width=width,
            layers=int(vision.get("layers", 12)),
            heads=width // head_width,
            mlp_width=int(width * float(vision.get("mlp_ratio", 4.0))),
            embed_dim=int(config["embed_dim"]),
            activation="quick_gelu" if config.get("quick_gelu") else "gelu",
            layer_norm_eps=float(norm.get("eps", 1e-5)),
            ln_pre=not vision.get("no_ln_pre", False),
        )
    except (ModelConfigError, TypeError, ValueError, ArithmeticError) as error:
        raise ModelConfigError(f"{where}: vision_cfg: {error}") from error


def _refuse_unsupported(vision: Mapping[str, Any], where: str) -> None:
    refused = {key: value for key, value in vision.items() if key in _NEUTRAL and value not in _NEUTRAL[key]}
    refused |= {key: vision[key] for key in vision if key not in _READ | _WITHOUT_EFFECT | set(_NEUTRAL)}
    if isinstance(vision.get("layers"), list | tuple):  # a ResNet
        refused["layers"] = vision["layers"]
    norm = vision.get("norm_kwargs")
    if norm and (not isinstance(norm, Mapping) or set(norm) != {"eps"}):
        refused["norm_kwargs"] = norm
    if refused:
        named = ", ".join(f"{key}={value!r}" for key, value in sorted(refused.items()))
        raise ModelConfigError(
            f"{where}: unsupported vision_cfg settings: {named}. "
            "Plain ViT towers with a CLS token and a projection are supported."
        )


def preprocess_spec_from_config(
    config: Mapping[str, Any] | None, image_size: tuple[int, int], where: str
) -> PreprocessSpec:
    """Read open_clip's `preprocess_cfg`; absent keys take open_clip's defaults (OpenAI's mean and std).

    Raises:
        ModelConfigError: an unknown or unsupported setting; it is named.
    """
    config = dict(config or {})
    mean, std = config.pop("mean", OPENAI_MEAN), config.pop("std", OPENAI_STD)
    interpolation = config.pop("interpolation", "bicubic")
    resize_mode = config.pop("resize_mode", "shortest")
    for ignored in ("size", "mode", "fill_color"):  # the size is the tower's; mode is RGB; fill only pads
        config.pop(ignored, None)
    if config or interpolation not in ("bicubic", "bilinear") or resize_mode not in ("shortest", "squash"):
        others = f", other keys {sorted(config)}" if config else ""
        raise ModelConfigError(
            f"{where}: unsupported preprocess_cfg: interpolation {interpolation!r} (bicubic, bilinear), "
            f"resize_mode {resize_mode!r} (shortest, squash){others}."
        )
    triples = [value for value in (mean, std) if isinstance(value, list | tuple) and len(value) == 3]
    if (
        len(triples) != 2
        or not all(is_real(number) for triple in triples for number in triple)
        or min(std) <= 0
    ):
        raise ModelConfigError(f"{where}: preprocess_cfg: mean and std must be three numbers each, std > 0.")
    return PreprocessSpec(
        image_size=image_size,
        mean=_triple(mean),
        std=_triple(std),
        interpolation=interpolation,
        resize_mode=resize_mode,
    )


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, list | tuple):
        high, wide = value
        return int(high), int(wide)
    return int(value), int(value)


def _triple(value: Any) -> tuple[float, float, float]:
    first, second, third = value
    return float(first), float(second), float(third)
