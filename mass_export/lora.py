"""LoRA adapters of PEFT for CLIP's vision tower -> the factors of their deltas, which are never multiplied out.

An adapted module adds `scale * B A` to its weight, with `scale = alpha / r`, or `alpha / sqrt(r)` for rank-stabilised
adapters (Hu et al., arXiv 2106.09685, section 4.1; Kalajdzievski, arXiv 2312.03732, section 3).
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mass_export.checkpoints import float32_parameters
from mass_export.checks import is_int, is_real
from mass_export.errors import CheckpointFormatError, CheckpointKeyError, CheckpointShapeError
from mass_export.hf_layout import PROJECTION, QKV, open_clip_target
from mass_export.spec import VisionSpec
from mass_export.tensor_files import open_tensors
from runtime.checksums import sha256_of_file

CONFIG_FILE = "adapter_config.json"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_TENSOR = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight")
_TEXT = re.compile(r"(?:^|\.)(?:text_model\.|text_projection$)")
# Settings that change what an adapter means, and their values for a plain one.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),  # the others change the base as well
    "layer_replication": (None, []),
    "lora_bias": (False,),
    "megatron_config": (None,),
    "modules_to_save": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None,),
    "use_dora": (False,),
    "use_bdlora": (None, False),
    "use_qalora": (False,),
}


@dataclass(frozen=True)
class Product:
    """A delta as `left @ right`.

    Attributes:
        left: [D_out, K] float64
        right: [K, D_in] float64
    """

    left: Tensor
    right: Tensor


def adapter_files(path: Path) -> tuple[Path, Path]:
    """Config and weights in an adapter's folder.

    Raises:
        CheckpointFormatError: one of them is missing.
    """
    weights = [path / name for name in _WEIGHTS if (path / name).is_file()]
    if not (path / CONFIG_FILE).is_file() or not weights:
        raise CheckpointFormatError(
            f"{path}: not a PEFT adapter: needs {CONFIG_FILE} and {' or '.join(_WEIGHTS)} in this folder."
        )
    return path / CONFIG_FILE, weights[0]


def sha256_of_adapter(path: Path) -> str:
    """Hash of config and weights together."""
    text = "".join(f"{file.name} {sha256_of_file(file)}\n" for file in adapter_files(path))
    return hashlib.sha256(text.encode()).hexdigest()


def load_adapter(path: Path, vision: VisionSpec) -> dict[str, Product]:
    """Load a PEFT LoRA adapter of a Hugging Face CLIP; parts for the text tower are left out.

    Args:
        path: folder with adapter_config.json and adapter_model.safetensors (or .bin).
        vision: the tower that it adapts.

    Returns:
        deltas of the adapted matrices, by open_clip's names. Those of q, k and v form one, of in_proj_weight.

    Raises:
        CheckpointFormatError: not an adapter, or one of another kind than plain LoRA.
        CheckpointKeyError: it adapts something else than the vision tower's matrices, or a half is missing.
        CheckpointShapeError: it belongs to a model of another size.
        CheckpointValueError: tensors are not floating point, or hold NaN or infinity.
    """
    config_path, weights_path = adapter_files(path)
    config = _read_config(config_path)
    tensors = open_tensors(weights_path)
    modules = {match["module"] for match in map(_TENSOR.fullmatch, tensors) if match}
    inner = "vision_model." if any("vision_model." in name for name in modules) else ""
    halves: dict[tuple[str, str], dict[str, str]] = {}
    scales: dict[tuple[str, str], float] = {}
    unexpected = []
    shapes = vision.parameter_shapes()
    for name in tensors:
        match = _TENSOR.fullmatch(name)
        if match is not None and _TEXT.search(match["module"]):
            continue
        target = None if match is None else _matrix_of(match["module"], inner)
        if match is None or target is None or len(shapes.get(target[0], ())) != 2:  # not conv1, not biases
            unexpected.append(name)
            continue
        halves.setdefault(target, {})[match["side"]] = name
        if match["side"] == "A":
            scales[target] = _scale(config, match["module"], tensors[name].shape[0], config_path)
    missing = [
        f"{m}{f' ({part})' if part else ''}: lora_A or lora_B"
        for (m, part), h in halves.items()
        if len(h) < 2
    ]
    if missing or unexpected:
        raise CheckpointKeyError(str(weights_path), missing, unexpected)
    if not halves:
        raise CheckpointFormatError(f"{weights_path}: adapts nothing of the vision tower.")
    factors = {
        target: Product(*_sides(tensors, half, scales[target], str(weights_path)))
        for target, half in halves.items()
    }
    _check_shapes(factors, vision, str(weights_path))
    return _assembled(factors, vision)


def adapted_tower(adapter: Mapping[str, Product], base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters that the adapter makes of the base, dense, in float32: for those who run the model itself."""
    deltas = {name: product.left @ product.right for name, product in adapter.items()}
    return {
        name: (parameter.double() + deltas[name]).float() if name in deltas else parameter
        for name, parameter in base.items()
    }


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointFormatError(f"{path}: not a JSON adapter config ({error}).") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise CheckpointFormatError(f"{path}: expected an adapter with peft_type LORA, got {kind!r}.")
    special = {key: config[key] for key in _PLAIN if config.get(key, _PLAIN[key][0]) not in _PLAIN[key]}
    if special:
        named = ", ".join(f"{key}={value!r}" for key, value in special.items())
        raise CheckpointFormatError(
            f"{path}: unsupported settings of the adapter: {named}. Merge it into its model "
            "(merge_and_unload) and give the result as `checkpoint:`."
        )
    return config


def _scale(config: Mapping[str, Any], module: str, rank: int, where: Path) -> float:
    alpha = config.get("lora_alpha", 8)
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if module == pattern or module.endswith(f".{pattern}") or _matches(pattern, module):
            alpha = value
            break
    if not is_real(alpha) or not is_int(rank) or rank < 1:
        raise CheckpointFormatError(f"{where}: {module}: lora_alpha {alpha!r} with rank {rank!r}.")
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _matches(pattern: str, module: str) -> bool:
    try:
        return re.fullmatch(rf"(?:.*\.)?(?:{pattern})", module) is not None
    except re.error:
        return False


def _matrix_of(module: str, inner: str) -> tuple[str, str] | None:
    """open_clip's matrix that a module's weight is (a part of), and the part (q, k, v or "")."""
    start = module.find(inner) if inner in module else 0
    name = module[start:] if not module.endswith("visual_projection") else "visual_projection"
    target = open_clip_target(f"{name}.weight", "", inner)
    if target is None or not target[0].startswith("visual."):
        return None
    return target[0].removeprefix("visual."), target[1]


def _sides(
    tensors: Mapping[str, Tensor], names: Mapping[str, str], scale: float, where: str
) -> tuple[Tensor, Tensor]:
    loaded = float32_parameters({names[side]: tensors[names[side]] for side in "BA"}, where)
    return scale * loaded[names["B"]].double(), loaded[names["A"]].double()


def _check_shapes(factors: Mapping[tuple[str, str], Product], vision: VisionSpec, where: str) -> None:
    shapes, wrong = vision.parameter_shapes(), []
    for (name, part), product in factors.items():
        rows, columns = shapes[name]
        if part:
            rows //= len(QKV)
        if f"visual.{name}" == PROJECTION:
            rows, columns = columns, rows
        rank = product.right.shape[0] if product.right.ndim == 2 else 0
        for side, tensor, expected in (
            ("B", product.left, (rows, rank)),
            ("A", product.right, (rank, columns)),
        ):
            if tuple(tensor.shape) != expected:
                wrong.append(
                    (f"{name}{f' ({part})' if part else ''} lora_{side}", expected, tuple(tensor.shape))
                )
    if wrong:
        raise CheckpointShapeError(where, wrong)


def _assembled(factors: Mapping[tuple[str, str], Product], vision: VisionSpec) -> dict[str, Product]:
    """One product for each matrix: q, k and v become blocks of rows, a part without an adapter one of zeros."""
    products: dict[str, Product] = {}
    for name, shape in vision.parameter_shapes().items():
        parts = {part: product for (matrix, part), product in factors.items() if matrix == name}
        if "" in parts:
            whole = parts[""]
            transposed = f"visual.{name}" == PROJECTION
            products[name] = Product(whole.right.T, whole.left.T) if transposed else whole
        elif parts:
            height = shape[0] // len(QKV)
            present = [part for part in QKV if part in parts]
            left = torch.zeros(
                shape[0], sum(parts[part].left.shape[1] for part in present), dtype=torch.float64
            )
            column = 0
            for part in present:
                block, row = parts[part].left, QKV.index(part) * height
                left[row : row + height, column : column + block.shape[1]] = block
                column += block.shape[1]
            products[name] = Product(left, torch.cat([parts[part].right for part in present]))
    return products
