"""Heads from class names, against open_clip's own zero-shot classifier."""

import json

import open_clip
import pytest
import torch
import yaml
from safetensors.torch import save_file

from mass_export.errors import HeadError, RecipeError
from mass_export.heads import load_head
from mass_export.merge import merge
from mass_export.progress import Progress
from mass_export.recipe import load_recipe

NAMES = ["tabby cat", "golden retriever", "sports car"]
TEMPLATES = ["a photo of a {}.", "a drawing of the {}!", "{}"]


@pytest.fixture
def clip_config(pico_model_config):
    pico_model_config["text_cfg"] |= {"context_length": 16, "vocab_size": 49408}
    return pico_model_config


@pytest.fixture
def clip(clip_config):
    torch.manual_seed(7)
    return open_clip.CLIP(**clip_config).eval()


@pytest.fixture
def zero_shot(pico_files, clip_config, clip):
    """`zero_shot(head, classes=.., state=..)`: a recipe whose first task has this head, and a whole CLIP as base."""

    def make(head, classes=None, state=None, config=clip_config):
        path = pico_files(tasks=2)
        (path.parent / "model.json").write_text(json.dumps(config))
        save_file(clip.state_dict() if state is None else state, path.parent / "base.safetensors")
        recipe = yaml.safe_load(path.read_text())
        recipe["tasks"][0].pop("classes")
        if classes is not None:
            recipe["tasks"][0]["classes"] = classes
        recipe["tasks"][0]["head"] = head
        path.write_text(yaml.safe_dump(recipe))
        return path

    return make


def head_of(path):
    recipe = load_recipe(path)
    task = recipe.tasks[0]
    return load_head(task.head, task.name, task.classes, recipe.vision.embed_dim)


def expected(clip, names, templates):
    tokenizer = open_clip.tokenizer.SimpleTokenizer(context_length=16)
    with torch.no_grad():
        weight = open_clip.build_zero_shot_classifier(
            clip, tokenizer, names, templates, num_classes_per_batch=None
        )
        return weight.T * clip.logit_scale.exp()


def assert_close(weight, wanted):
    torch.testing.assert_close(weight, wanted, rtol=1e-4, atol=1e-4)


def test_the_head_is_open_clips_ensemble_of_the_templates(zero_shot, clip):
    path = zero_shot({"classes": NAMES, "templates": TEMPLATES})
    templates = [lambda name, text=text: text.format(name) for text in TEMPLATES]
    assert_close(head_of(path).weight, expected(clip, NAMES, templates))
    assert load_recipe(path).tasks[0].classes == tuple(NAMES)


@pytest.mark.parametrize("head", [{"classes": NAMES}, {"classes": NAMES, "templates": "openai"}])
def test_openais_templates_are_the_default(zero_shot, clip, head):
    assert_close(head_of(zero_shot(head)).weight, expected(clip, NAMES, open_clip.OPENAI_IMAGENET_TEMPLATES))


def test_names_and_templates_may_lie_in_text_files(zero_shot, tmp_path):
    (tmp_path / "names.txt").write_text("\n".join(NAMES))
    (tmp_path / "templates.txt").write_text("\n".join(TEMPLATES))
    listed = head_of(zero_shot({"classes": NAMES, "templates": TEMPLATES}))
    filed = head_of(zero_shot({"classes": "names.txt", "templates": "templates.txt"}))
    assert torch.equal(listed.weight, filed.weight)


def test_labels_and_the_names_in_prompts_may_differ(zero_shot):
    path = zero_shot({"classes": NAMES, "templates": TEMPLATES}, classes=["n01", "n02", "n03"])
    assert load_recipe(path).tasks[0].classes == ("n01", "n02", "n03")
    assert head_of(path).weight.shape == (3, 16)
    with pytest.raises(RecipeError, match=r"head\.classes: 3 prompts for the task's 2 classes"):
        load_recipe(zero_shot({"classes": NAMES}, classes=["n01", "n02"]))


@pytest.mark.parametrize("prefix", ["model.", "module."])
def test_prefixes_and_other_layouts_give_the_same_head(zero_shot, clip, prefix):
    plain = head_of(zero_shot({"classes": NAMES, "templates": TEMPLATES}))
    state = {prefix + name: tensor for name, tensor in clip.state_dict().items()}
    wrapped = head_of(zero_shot({"classes": NAMES, "templates": TEMPLATES}, state=state))
    assert torch.equal(plain.weight, wrapped.weight)


def test_a_base_without_text_tower_is_an_error_that_says_so(zero_shot, clip):
    state = {name: tensor for name, tensor in clip.state_dict().items() if name.startswith("visual.")}
    with pytest.raises(
        HeadError, match=r"task0: head: .*no text tower.*token_embedding.*base checkpoint of the whole"
    ):
        head_of(zero_shot({"classes": NAMES}, state=state))


def test_a_text_tower_of_another_size_is_an_error(zero_shot, clip_config):
    clip_config["text_cfg"]["layers"] = 2
    with pytest.raises(HeadError, match=r"resblocks\.1\..* is missing"):
        head_of(zero_shot({"classes": NAMES}, config=clip_config))


def test_a_vocabulary_that_is_not_clips_is_an_error(zero_shot, clip_config):
    clip_config["text_cfg"]["vocab_size"] = 64
    state = open_clip.CLIP(**clip_config).state_dict()
    with pytest.raises(HeadError, match="64 tokens and CLIP's tokenizer 49408"):
        head_of(zero_shot({"classes": NAMES}, state=state, config=clip_config))


@pytest.mark.parametrize(
    ("key", "value"),
    [("hf_model_name", "roberta-base"), ("hf_tokenizer_name", "xlm"), ("tokenizer_kwargs", {"a": 1})],
)
def test_other_tokenizers_are_refused(zero_shot, clip_config, key, value):
    clip_config["text_cfg"][key] = value
    with pytest.raises(HeadError, match="CLIP's own text tower"):
        head_of(zero_shot({"classes": NAMES}, config=clip_config))


@pytest.mark.parametrize(
    ("head", "pattern"),
    [
        ({}, r"head: missing key\(s\) file, tensor; or classes or templates"),
        ({"classes": NAMES, "template": "openai"}, r"unknown key\(s\) template"),
        ({"classes": NAMES, "templates": ["a photo"]}, "'a photo' does not hold {} exactly once"),
        ({"classes": NAMES, "templates": "none.txt"}, r"no such file: .*none\.txt"),
        ({"templates": "openai"}, r"missing key\(s\) classes"),
        ({"classes": ["cat", "cat"]}, "class names repeat: 'cat'"),
    ],
)
def test_mistakes_in_the_recipe_are_named(zero_shot, head, pattern):
    with pytest.raises(RecipeError, match=pattern):
        load_recipe(zero_shot(head, classes=None if "classes" in head or "templates" in head else NAMES))


@pytest.mark.filterwarnings("ignore::mass_export.merging.IllConditionedWarning")
def test_a_zero_shot_head_goes_into_the_artifact(zero_shot):
    path = zero_shot({"classes": NAMES, "templates": TEMPLATES})
    artifact = merge(load_recipe(path), Progress(quiet=True))
    assert torch.equal(artifact.heads[0].weight, head_of(path).weight)
    assert artifact.info.tasks[0].classes == tuple(NAMES)
