"""Class names -> a zero-shot head, with the text tower of the base and open_clip's tokenizer."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mass_export.checkpoint_folder import open_checkpoint
from mass_export.checkpoints import float32_parameters
from mass_export.errors import CheckpointError, HeadError, shortened
from mass_export.hf_layout import open_clip_layout
from mass_export.recipe_sources import Prompts

BATCH = 256
_EMBEDDING = "token_embedding.weight"
# Settings of text_cfg that name other tokenizers or towers than CLIP's own.
_OTHER_TEXT = ("hf_model_name", "hf_tokenizer_name", "tokenizer_kwargs")


class _TextTower:
    """CLIP's text tower with its tokenizer."""

    def __init__(self, module: Any, tokenizer: Any, logit_scale: float) -> None:
        self._module = module
        self._tokenizer = tokenizer
        self.logit_scale = logit_scale

    @torch.inference_mode()
    def features(self, texts: Sequence[str]) -> Tensor:
        """L2-normalised. [B, E] float32"""
        parts = [
            self._module(self._tokenizer(list(texts[start : start + BATCH])))
            for start in range(0, len(texts), BATCH)
        ]
        return F.normalize(torch.cat(parts), dim=-1)


def zero_shot_weight(file: Path, prompts: Prompts, where: str, *, allow_pickle: bool = False) -> Tensor:
    """CLIP's zero-shot classifier (Radford et al., arXiv 2103.00020, section 3.1.4).

    A class is the mean of its prompts' normalised features, normalised again; all are scaled by exp(logit_scale).

    Args:
        file: checkpoint of a whole CLIP.
        prompts: class names, templates and the model's config.
        where: for messages.
        allow_pickle: whether the file may hold a pickled module.

    Returns:
        [C, E] float32

    Raises:
        HeadError: there is no text tower, or another than CLIP's own.
    """
    tower = _text_tower(file, file.stat().st_mtime_ns, json.dumps(prompts.model_config), where, allow_pickle)
    templates = _openai_templates() if prompts.templates is None else prompts.templates
    rows = []
    for name in prompts.classes:
        texts = [template.replace("{}", name) for template in templates]
        rows.append(F.normalize(tower.features(texts).mean(dim=0), dim=0))
    return torch.stack(rows) * tower.logit_scale


def _openai_templates() -> tuple[str, ...]:
    from open_clip import OPENAI_IMAGENET_TEMPLATES  # noqa: PLC0415 - imports much

    return tuple(template("{}") for template in OPENAI_IMAGENET_TEMPLATES)


@functools.lru_cache(maxsize=1)  # all tasks of a recipe share it
def _text_tower(
    file: Path,
    _modified_ns: int,
    config_json: str,
    where: str,
    allow_pickle: bool,  # noqa: FBT001 - the cache tells keywords and positions apart
) -> _TextTower:
    from open_clip.model import CLIPTextCfg, _build_text_tower  # noqa: PLC0415 - imports much
    from open_clip.tokenizer import SimpleTokenizer  # noqa: PLC0415

    config = json.loads(config_json)
    text_cfg = config.get("text_cfg")
    if not isinstance(text_cfg, dict) or any(text_cfg.get(key) for key in _OTHER_TEXT):
        raise HeadError(
            f"{where}: zero-shot heads need CLIP's own text tower, which this model config has not; give the head "
            "as a file."
        )
    tensors = _text_tensors(file, where, allow_pickle=allow_pickle)
    logit_scale = tensors.pop("logit_scale", None)
    module = _build_text_tower(config["embed_dim"], CLIPTextCfg(**text_cfg), bool(config.get("quick_gelu")))
    expected = module.state_dict()
    problems = [f"{name} is missing" for name in expected if name not in tensors]
    problems += [
        f"{name} has shape {list(tensors[name].shape)}, not {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in tensors and tensors[name].shape != tensor.shape
    ]
    if logit_scale is None or logit_scale.numel() != 1:
        problems.append("logit_scale is missing")
    if problems or logit_scale is None:
        raise HeadError(
            f"{where}: no text tower that fits the model config: {shortened(problems, separator='; ')}. Zero-shot "
            "heads need a base checkpoint of the whole CLIP; or give the head as a file."
        )
    tokenizer = SimpleTokenizer(context_length=module.context_length)
    if tokenizer.vocab_size > expected[_EMBEDDING].shape[0]:
        raise HeadError(
            f"{where}: the text tower knows {expected[_EMBEDDING].shape[0]} tokens and CLIP's tokenizer "
            f"{tokenizer.vocab_size}; give the head as a file."
        )
    module.load_state_dict({name: tensors[name] for name in expected})
    return _TextTower(module.eval(), tokenizer, float(logit_scale.exp()))


def _text_tensors(file: Path, where: str, *, allow_pickle: bool) -> dict[str, Tensor]:
    """The text tower's tensors under open_clip's names, and logit_scale. float32"""
    try:
        tensors = open_clip_layout(open_checkpoint(file, allow_pickle=allow_pickle), where)
        prefixes = [name.removesuffix(_EMBEDDING) for name in tensors if name.endswith(_EMBEDDING)]
        prefix = min(prefixes, key=len) if prefixes else ""
        outer = prefix.removesuffix("text.")
        found: Mapping[str, Tensor] = {
            name.removeprefix(prefix): tensors[name]
            for name in tensors
            if name.startswith(prefix)
            and not name.startswith(f"{outer}visual.")
            and tensors[name].is_floating_point()
        }
        if f"{outer}logit_scale" in tensors:
            found = {**found, "logit_scale": tensors[f"{outer}logit_scale"]}
        return float32_parameters({name: t for name, t in found.items() if name != "attn_mask"}, where)
    except CheckpointError as error:
        raise HeadError(str(error)) from error
