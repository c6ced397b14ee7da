"""open_clip's vision configs: what it builds from them and saves is loaded, and gives its features."""

import json
import re

import open_clip
import pytest
import torch
import yaml
from safetensors.torch import save_file

from mass_export.artifact import write_artifact
from mass_export.checkpoints import load_checkpoint
from mass_export.errors import CheckpointKeyError, ModelConfigError
from mass_export.merge import merge
from mass_export.model_config import load_model_config, vision_spec_from_config
from mass_export.onnx_export import export_bundle
from mass_export.progress import Progress
from mass_export.recipe import load_recipe
from mass_export.vit import encode

QUIET = Progress(quiet=True)
VARIANTS = {
    "plain": {},
    "quick_gelu": {"quick_gelu": True},
    "no_ln_pre": {"no_ln_pre": True},
    "layer_scale": {"ls_init_value": 0.5},
    "odd_sizes": {"image_size": [21, 26], "patch_size": [5, 6]},
    "mlp_width": {"mlp_ratio": 1.75},
    "epsilon": {"norm_kwargs": {"eps": 1e-6}},
    "fixed_positions": {"pos_embed_type": "sin_cos_2d"},
    "training_only": {"patch_dropout": 0.5, "attn_pooler_heads": 8},
    "all": {"quick_gelu": True, "no_ln_pre": True, "ls_init_value": 1e-4, "patch_size": 7},
}


@pytest.fixture(params=VARIANTS)
def config(request, pico_model_config):
    setting = dict(VARIANTS[request.param])
    if setting.pop("quick_gelu", False):
        pico_model_config["quick_gelu"] = True
    pico_model_config["vision_cfg"] |= setting
    return pico_model_config


def clip_of(config, seed=0):
    """A random model of which no parameter has a special value."""
    torch.manual_seed(seed)
    clip = open_clip.CLIP(**config).eval()
    with torch.no_grad():
        for parameter in clip.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return clip


def test_the_checkpoint_of_every_variant_gives_open_clips_features(tmp_path, config):
    clip = clip_of(config)
    save_file(clip.state_dict(), tmp_path / "clip.safetensors")
    spec = vision_spec_from_config(config, "here")
    params = load_checkpoint(tmp_path / "clip.safetensors", spec)
    assert list(params) == list(spec.parameter_shapes())
    images = torch.randn(2, 3, *spec.image_size, dtype=torch.float64)
    with torch.no_grad():
        expected = clip.double().encode_image(images, normalize=True)
    actual = encode({name: p.double() for name, p in params.items()}, images, spec)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore::mass_export.merging.IllConditionedWarning")
def test_every_variant_is_merged_and_exported_with_equal_results(tmp_path, pico_files, config):
    path = pico_files(tasks=2)
    (path.parent / "model.json").write_text(json.dumps(config))
    recipe = yaml.safe_load(path.read_text())
    for seed, file in enumerate([recipe["base"], *(task["checkpoint"] for task in recipe["tasks"])]):
        save_file(clip_of(config, seed).state_dict(), path.parent / file)
    artifact = merge(load_recipe(path), QUIET)
    write_artifact(tmp_path / "merged.safetensors", artifact)
    bundle = export_bundle(
        artifact, tmp_path / "merged.safetensors", tmp_path / "bundle", verify=True, progress=QUIET
    )
    assert (bundle / "manifest.json").is_file()


def test_a_layer_scale_that_is_missing_somewhere_is_named(tmp_path, pico_model_config):
    pico_model_config["vision_cfg"]["ls_init_value"] = 0.1
    state = clip_of(pico_model_config).state_dict()
    del state["visual.transformer.resblocks.1.ls_2.gamma"]
    save_file(state, tmp_path / "a")
    spec = vision_spec_from_config(pico_model_config, "here")
    with pytest.raises(
        CheckpointKeyError, match=r"1 missing \(visual\.transformer\.resblocks\.1\.ls_2\.gamma\)"
    ):
        load_checkpoint(tmp_path / "a", spec)


PLAIN = [
    "ViT-B-32", "ViT-B-32-quickgelu", "ViT-B-32-256", "ViT-B-16", "ViT-B-16-quickgelu", "ViT-B-16-plus-240",
    "ViT-L-14", "ViT-L-14-quickgelu", "ViT-L-14-336", "ViT-L-14-336-quickgelu", "ViT-L-16-320", "ViT-H-14",
    "ViT-g-14", "ViT-bigG-14", "ViT-M-16-alt", "ViT-S-32-alt", "roberta-ViT-B-32", "coca_base",
]  # fmt: skip


@pytest.mark.parametrize("name", PLAIN)
def test_plain_vits_of_open_clip_are_taken_by_name(tmp_path, name):
    config, _, where = load_model_config(name, tmp_path)
    spec = vision_spec_from_config(config, where)
    assert spec.activation == ("quick_gelu" if config.get("quick_gelu") else "gelu")
    assert "quickgelu" not in name or spec.activation == "quick_gelu"
    patch = re.search(r"ViT-(?:\w+)-(\d+)", name)
    assert patch is None or spec.patch_size == (int(patch[1]),) * 2


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("RN50", "layers="),
        ("coca_ViT-B-32", "attentional_pool=True"),
        ("ViT-B-16-SigLIP", "timm_model_name="),
        ("ViT-H-14-CLIPA", "pool_type='avg'"),
        ("EVA02-L-14", "timm_model_name="),
    ],
)
def test_other_towers_of_open_clip_are_refused_by_what_is_special(tmp_path, name, setting):
    config, _, where = load_model_config(name, tmp_path)
    with pytest.raises(ModelConfigError, match=f"{name}: unsupported vision_cfg settings: .*{setting}"):
        vision_spec_from_config(config, where)
