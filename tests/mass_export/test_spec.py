from __future__ import annotations

import dataclasses
import json

import pytest

from mass_export.errors import ModelConfigError, RecipeError
from mass_export.model_config import load_model_config, preprocess_spec_from_config, vision_spec_from_config
from mass_export.router_spec import RouterSettings, default_routing_layer
from mass_export.spec import MergeSettings, TaskInfo, VisionSpec, rank_of


@pytest.mark.parametrize(("layers", "layer"), [(12, 9), (24, 20), (3, 2), (4, 3), (32, 24)])
def test_routing_layer_defaults_to_three_quarters_of_the_depth(layers, layer):
    assert default_routing_layer(layers) == layer


@pytest.mark.parametrize(
    ("shape", "ratio", "rank", "kept"),
    [
        ((96, 32), 0.25, None, 8),
        ((96, 32), 0.01, None, 1),
        ((5, 32), 1.0, None, 5),
        ((96, 32), None, 7, 7),
        ((5, 32), None, 7, 5),
    ],
)
def test_kept_rank_is_a_share_of_the_smaller_side_or_the_fixed_rank(shape, ratio, rank, kept):
    assert rank_of(shape, ratio, rank) == kept


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("layer", -1),
        ("layer", True),
        ("layer", 1.5),
        ("site", "mlp2"),
        ("token", "eos"),
        ("norm", "l3"),
        ("mode", "top2"),
        ("threshold", 1.0),
        ("threshold", float("nan")),
        ("temperature", 0),
        ("temperature", "1"),
        ("max_tasks", 0),
        ("rank", 0),
    ],
)
def test_an_invalid_router_setting_is_named(key, value):
    with pytest.raises(RecipeError, match=rf"router\.{key}: expected"):
        RouterSettings(**{key: value})


@pytest.mark.parametrize("key", ["base_merge", "compose", "sum_weights", "vectors", "head_choice"])
def test_an_invalid_merge_setting_is_named_with_the_choices(key):
    with pytest.raises(RecipeError, match=f"{key}: expected one of .*got 'other'"):
        MergeSettings(**{key: "other"})


@pytest.mark.parametrize("name", ["", "a.b", "a b", "-a", "a/b", "x" * 65, 3])
def test_task_names_are_plain_words(name):
    with pytest.raises(RecipeError, match="task name"):
        TaskInfo(name, ("a", "b"))


def test_classes_must_be_given_once_each():
    with pytest.raises(RecipeError, match="class names repeat: 'a'"):
        TaskInfo("t", ("a", "b", "a"))
    with pytest.raises(RecipeError, match="empty"):
        TaskInfo("t", ())


def test_parameter_shapes_equal_open_clips_vision_tower(pico_vision, pico_model_config):
    from open_clip.model import CLIP

    names = ("embed_dim", "vision_cfg", "text_cfg")
    state = CLIP(**{name: pico_model_config[name] for name in names}).visual.state_dict()
    assert pico_vision.parameter_shapes() == {name: tuple(tensor.shape) for name, tensor in state.items()}
    assert vision_spec_from_config(pico_model_config, "x") == pico_vision


def test_vision_spec_survives_json(pico_vision):
    assert VisionSpec.from_json(json.loads(json.dumps(dataclasses.asdict(pico_vision)))) == pico_vision
    with pytest.raises(ModelConfigError, match="depth"):
        VisionSpec.from_json({"depth": 3})


@pytest.mark.parametrize(
    "change", [{"width": 0}, {"heads": 3}, {"image_size": (16,)}, {"patch_size": (32, 8)}, {"ln_pre": 1}]
)
def test_impossible_towers_are_refused(pico_vision, change):
    with pytest.raises(ModelConfigError):
        dataclasses.replace(pico_vision, **change)


def test_config_variants_are_read(pico_model_config):
    pico_model_config["quick_gelu"] = True
    pico_model_config["vision_cfg"] |= {
        "image_size": [16, 24],
        "no_ln_pre": True,
        "norm_kwargs": {"eps": 1e-6},
    }
    spec = vision_spec_from_config(pico_model_config, "x")
    assert (spec.activation, spec.ln_pre, spec.layer_norm_eps) == ("quick_gelu", False, 1e-6)
    assert (spec.grid, spec.tokens) == ((2, 3), 7)
    assert "ln_pre.weight" not in spec.parameter_shapes()


@pytest.mark.parametrize(
    "setting",
    [
        {"attentional_pool": True},
        {"timm_model_name": "vit"},
        {"pool_type": "avg"},
        {"layers": [3, 4, 6, 3]},
        {"new_setting": 1},
        {"norm_kwargs": {"bias": False}},
    ],
)
def test_unsupported_towers_are_refused_by_setting(pico_model_config, setting):
    pico_model_config["vision_cfg"] |= setting
    with pytest.raises(ModelConfigError, match=next(iter(setting))):
        vision_spec_from_config(pico_model_config, "x")


@pytest.mark.parametrize(
    "config",
    [{}, {"embed_dim": 16}, {"embed_dim": "16", "vision_cfg": {}}, {"embed_dim": 16, "vision_cfg": 3}],
)
def test_what_is_no_model_config_is_refused(config):
    with pytest.raises(ModelConfigError, match="embed_dim and vision_cfg"):
        vision_spec_from_config(config, "x")


@pytest.mark.parametrize("value", ["abc", None, [1, 2, 3], 0])
def test_unreadable_sizes_are_refused(pico_model_config, value):
    pico_model_config["vision_cfg"]["patch_size"] = value
    with pytest.raises(ModelConfigError, match="vision_cfg"):
        vision_spec_from_config(pico_model_config, "x")


def test_preprocessing_defaults_to_openais_numbers():
    spec = preprocess_spec_from_config(None, (16, 16), "x")
    assert spec.mean == (0.48145466, 0.4578275, 0.40821073)
    assert (spec.interpolation, spec.resize_mode, spec.image_size) == ("bicubic", "shortest", (16, 16))


@pytest.mark.parametrize(
    "config",
    [
        {"interpolation": "random"},
        {"resize_mode": "longest"},
        {"crop": 3},
        {"mean": [1, 2]},
        {"mean": 0.5},
        {"std": [0, 1, 1]},
    ],
)
def test_unsupported_preprocessing_is_refused(config):
    with pytest.raises(ModelConfigError, match="preprocess_cfg"):
        preprocess_spec_from_config(config, (16, 16), "x")


def test_hub_configs_hold_model_and_preprocessing(tmp_path, pico_model_config):
    hub = {"model_cfg": pico_model_config, "preprocess_cfg": {"mean": [0, 0, 0], "std": [1, 1, 1]}}
    (tmp_path / "hub.json").write_text(json.dumps(hub))
    config, preprocess, _ = load_model_config("hub.json", tmp_path)
    assert (config, preprocess) == (hub["model_cfg"], hub["preprocess_cfg"])


def test_a_model_is_found_by_open_clips_name(tmp_path):
    config, preprocess, where = load_model_config("ViT-B/32-quickgelu", tmp_path)
    spec = vision_spec_from_config(config, where)
    assert (spec.width, spec.layers, spec.tokens, spec.activation) == (768, 12, 50, "quick_gelu")
    assert preprocess is None


def test_an_unknown_model_name_gets_suggestions(tmp_path):
    with pytest.raises(ModelConfigError, match=r"did you mean .*ViT-B-32"):
        load_model_config("vit-b32", tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "3", '{"model_cfg": 3}', "\xff", "[" * 100_000])
def test_files_that_hold_no_config_are_refused(tmp_path, text):
    (tmp_path / "model.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ModelConfigError, match=r"model\.json"):
        load_model_config("model.json", tmp_path)


def test_a_missing_config_file_is_named(tmp_path):
    with pytest.raises(ModelConfigError, match=r"other\.json: no such file"):
        load_model_config("other.json", tmp_path)
