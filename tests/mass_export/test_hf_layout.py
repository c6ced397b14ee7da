"""Hugging Face's layout of CLIP, in files, folders and shards; and the same weights in all layouts."""

import json

import open_clip
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from mass_export.artifact import read_artifact
from mass_export.checkpoint_folder import sha256_of_checkpoint
from mass_export.checkpoints import load_checkpoint
from mass_export.errors import CheckpointFormatError, CheckpointKeyError, ModelConfigError
from mass_export.hf_layout import open_clip_layout
from mass_export.merge_to_file import MergeOptions, merge_to_file
from mass_export.progress import Progress
from mass_export.vit import encode


def split_qkv(name, tensor):
    rest = name.rpartition("in_proj_")[2]
    return {f"self_attn.{part}_proj.{rest}": t for part, t in zip("qkv", tensor.chunk(3), strict=True)}


def layer_tensors(prefix, tensors):
    """One open_clip block as a layer of Hugging Face."""
    parts = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    parts["attn.out_proj"] = "self_attn.out_proj"
    layer = {}
    for name, tensor in tensors.items():
        if "in_proj" in name:
            layer |= split_qkv(name, tensor)
        else:
            stem, _, kind = name.rpartition(".")
            layer[f"{parts[stem]}.{kind}"] = tensor
    return {f"{prefix}.{name}": tensor.contiguous() for name, tensor in layer.items()}


def blocks(tensors, prefix):
    grouped = {}
    for name, tensor in tensors.items():
        if name.startswith("transformer.resblocks."):
            index, _, rest = name.removeprefix("transformer.resblocks.").partition(".")
            grouped.setdefault(index, {})[rest] = tensor
    layers = {}
    for index, block in grouped.items():
        layers |= layer_tensors(f"{prefix}.encoder.layers.{index}", block)
    return layers


def huggingface_vision(tower):
    """A vision tower of open_clip under the names that Hugging Face documents for CLIPVisionModelWithProjection."""
    hf = {
        "vision_model.embeddings.class_embedding": tower["class_embedding"],
        "vision_model.embeddings.patch_embedding.weight": tower["conv1.weight"],
        "vision_model.embeddings.position_embedding.weight": tower["positional_embedding"],
        "vision_model.embeddings.position_ids": torch.arange(len(tower["positional_embedding"]))[None],
        "visual_projection.weight": tower["proj"].T.contiguous(),
    }
    for kind in ("weight", "bias"):
        hf[f"vision_model.pre_layrnorm.{kind}"] = tower[f"ln_pre.{kind}"]
        hf[f"vision_model.post_layernorm.{kind}"] = tower[f"ln_post.{kind}"]
    return hf | blocks(tower, "vision_model")


def huggingface_clip(clip):
    """open_clip's CLIP as Hugging Face's CLIPModel."""
    state = clip.state_dict()
    text = {name: tensor for name, tensor in state.items() if not name.startswith("visual.")}
    hf = {
        "logit_scale": text["logit_scale"],
        "text_projection.weight": text["text_projection"].T.contiguous(),
        "text_model.embeddings.token_embedding.weight": text["token_embedding.weight"],
        "text_model.embeddings.position_embedding.weight": text["positional_embedding"],
        "text_model.embeddings.position_ids": torch.arange(8)[None],
        "text_model.final_layer_norm.weight": text["ln_final.weight"],
        "text_model.final_layer_norm.bias": text["ln_final.bias"],
    }
    vision = {n.removeprefix("visual."): t for n, t in state.items() if n.startswith("visual.")}
    return hf | blocks(text, "text_model") | huggingface_vision(vision)


@pytest.fixture
def clip(pico_model_config):
    torch.manual_seed(5)
    return open_clip.CLIP(**pico_model_config).eval()


@pytest.fixture
def tower(clip):
    return {n.removeprefix("visual."): t for n, t in clip.state_dict().items() if n.startswith("visual.")}


def equal(loaded, tower):
    assert set(loaded) == set(tower)
    return all(torch.equal(loaded[name], tensor) for name, tensor in tower.items())


def without(tensors, part):
    return {name: tensor for name, tensor in tensors.items() if part not in name}


def test_a_whole_model_becomes_open_clips_tensor_by_tensor(clip):
    converted = open_clip_layout(huggingface_clip(clip), "here")
    state = {name: tensor for name, tensor in clip.state_dict().items() if name != "attn_mask"}
    assert set(converted) == set(state)
    assert all(torch.equal(converted[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("model", ["CLIPModel", "CLIPVisionModelWithProjection", "bare tower"])
@pytest.mark.parametrize("prefix", ["", "module.", "model.clip."])
def test_features_equal_open_clips(tmp_path, pico_vision, clip, tower, model, prefix):
    state = huggingface_clip(clip) if model == "CLIPModel" else huggingface_vision(tower)
    if model == "bare tower":
        state = {name.removeprefix("vision_model."): tensor for name, tensor in state.items()}
    save_file({prefix + name: tensor for name, tensor in state.items()}, tmp_path / "weights")
    loaded = load_checkpoint(tmp_path / "weights", pico_vision)
    assert equal(loaded, tower)
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = clip.encode_image(images, normalize=True)
        torch.testing.assert_close(encode(loaded, images, pico_vision), expected, rtol=0, atol=1e-5)


def test_a_vision_model_without_projection_takes_that_of_the_base(tmp_path, pico_vision, tower):
    save_file(without(huggingface_vision(tower), "visual_projection"), tmp_path / "a")
    with pytest.raises(
        CheckpointFormatError, match=r"without its projection .*CLIPVisionModelWithProjection"
    ):
        load_checkpoint(tmp_path / "a", pico_vision)
    base = {"proj": torch.full((32, 16), 0.5)}
    assert equal(load_checkpoint(tmp_path / "a", pico_vision, base=base), tower | base)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "anything.safetensors"])
def test_a_folder_is_opened_by_its_weights(tmp_path, pico_vision, tower, name):
    state = huggingface_vision(tower)
    if name.endswith("bin"):
        torch.save(state, tmp_path / name)
    else:
        save_file(state, tmp_path / name)
    assert equal(load_checkpoint(tmp_path, pico_vision), tower)


def write_shards(folder, state, kind):
    names = sorted(state)
    shards = {f"part-{i}.{kind}": {n: state[n] for n in names[i::3]} for i in range(3)}
    for file, tensors in shards.items():
        (save_file if kind == "safetensors" else torch.save)(tensors, folder / file)
    index = {"metadata": {}, "weight_map": {n: file for file, tensors in shards.items() for n in tensors}}
    name = "model.safetensors.index.json" if kind == "safetensors" else "pytorch_model.bin.index.json"
    (folder / name).write_text(json.dumps(index))
    return folder / name


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_shards_are_read_as_one_checkpoint(tmp_path, pico_vision, tower, kind):
    index = write_shards(tmp_path, huggingface_vision(tower), kind)
    assert equal(load_checkpoint(tmp_path, pico_vision), tower)
    assert equal(load_checkpoint(index, pico_vision), tower)
    before = sha256_of_checkpoint(tmp_path)
    save_file({"visual_projection.weight": torch.zeros(16, 32)}, tmp_path / f"part-0.{kind}")
    assert sha256_of_checkpoint(tmp_path) != before


def test_broken_indexes_are_refused(tmp_path, pico_vision, tower):
    index = write_shards(tmp_path, huggingface_vision(tower), "safetensors")
    (tmp_path / "part-1.safetensors").unlink()
    with pytest.raises(CheckpointFormatError, match=r"part-1\.safetensors: no such file"):
        load_checkpoint(tmp_path, pico_vision)
    save_file({"x": torch.zeros(1)}, tmp_path / "part-1.safetensors")
    with pytest.raises(CheckpointFormatError, match=r"tensor\(s\) are not in the shards"):
        load_checkpoint(tmp_path, pico_vision)
    for content in ({"weight_map": {"a": "../secret"}}, {"weight_map": {}}, {"a": 1}):
        index.write_text(json.dumps(content))
        with pytest.raises(CheckpointFormatError, match="no index of shards"):
            load_checkpoint(tmp_path, pico_vision)
    index.write_text("{")
    with pytest.raises(CheckpointFormatError, match="not an index of shards"):
        load_checkpoint(tmp_path, pico_vision)


def test_a_missing_part_is_named_by_both_names(tmp_path, pico_vision, tower):
    save_file(without(huggingface_vision(tower), "layers.1.self_attn.k_proj.weight"), tmp_path / "a")
    with pytest.raises(CheckpointKeyError) as caught:
        load_checkpoint(tmp_path / "a", pico_vision)
    assert "missing (visual.transformer.resblocks.1.attn.in_proj_weight)" in str(caught.value)
    assert "vision_model.encoder.layers.1.self_attn.q_proj.weight" in str(caught.value)


def test_several_towers_and_unknown_tensors_are_named(tmp_path, pico_vision, tower):
    state = huggingface_vision(tower)
    save_file(state | {f"other.{n}": t.clone() for n, t in state.items()}, tmp_path / "a")
    with pytest.raises(CheckpointFormatError, match="several vision towers"):
        load_checkpoint(tmp_path / "a", pico_vision)
    save_file(state | {"vision_model.encoder.layers.0.layer_scale": torch.ones(1)}, tmp_path / "a")
    with pytest.raises(CheckpointKeyError, match=r"1 unexpected \(vision_model\.encoder.*layer_scale\)"):
        load_checkpoint(tmp_path / "a", pico_vision)


def test_a_config_that_contradicts_the_model_is_refused(tmp_path, pico_vision, tower):
    save_file(huggingface_vision(tower), tmp_path / "model.safetensors")
    config = {"vision_config": {"hidden_act": "gelu", "num_attention_heads": 2, "layer_norm_eps": 1e-5}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert equal(load_checkpoint(tmp_path, pico_vision), tower)
    config["vision_config"]["hidden_act"] = "quick_gelu"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelConfigError, match=r"hidden_act: 'quick_gelu', not 'gelu'.*quickgelu"):
        load_checkpoint(tmp_path, pico_vision)
    (tmp_path / "config.json").write_text("not JSON")
    with pytest.raises(ModelConfigError, match="not a JSON model config"):
        load_checkpoint(tmp_path, pico_vision)


def as_folder(clip, folder):
    folder.mkdir()
    save_file(huggingface_clip(clip), folder / "model.safetensors")
    act = {"hidden_act": "gelu", "num_attention_heads": 2}
    (folder / "config.json").write_text(json.dumps({"vision_config": act}))


def as_shards(clip, folder):
    folder.mkdir()
    write_shards(folder, huggingface_clip(clip), "bin")


def towers_state(clip):
    return {n: t for n, t in clip.state_dict().items() if n.startswith("visual.")}


LAYOUTS = {
    "open_clip": lambda clip, path: torch.save(clip.state_dict(), path),
    "tower": lambda clip, path: save_file(towers_state(clip), path),
    "bare tower": lambda clip, path: save_file({n[7:]: t for n, t in towers_state(clip).items()}, path),
    "nested": lambda clip, path: torch.save(
        {"state_dict": {f"module.{n}": t for n, t in clip.state_dict().items()}, "epoch": 3}, path
    ),
    "float64": lambda clip, path: save_file({n: t.double() for n, t in towers_state(clip).items()}, path),
    "folder": as_folder,
    "shards": as_shards,
}


@pytest.fixture
def merged_as(tmp_path, pico_files, pico_model_config):
    """`merged_as(write)`: the artifact of three models, each written by `write(clip, path)`."""

    def make(write, name):
        path = pico_files(directory=tmp_path / name)
        recipe = yaml.safe_load(path.read_text())
        for seed, entry in enumerate([recipe, *recipe["tasks"]]):
            torch.manual_seed(seed // 2)
            clip = open_clip.CLIP(**pico_model_config)
            torch.manual_seed(seed)
            with torch.no_grad():
                for parameter in clip.parameters():
                    parameter.add_(0.02 * torch.randn_like(parameter))
            entry["base" if "base" in entry else "checkpoint"] = f"model{seed}"
            write(clip, path.parent / f"model{seed}")
        path.write_text(yaml.safe_dump(recipe))
        out = path.parent / "merged.safetensors"
        merge_to_file(path, out, MergeOptions(None, Progress(quiet=True)))
        return out

    return make


@pytest.mark.filterwarnings("ignore::mass_export.merging.IllConditionedWarning")
def test_the_same_weights_in_any_layout_give_the_same_bytes(merged_as):
    expected = load_file(merged_as(LAYOUTS["open_clip"], "open_clip"))
    for layout, write in LAYOUTS.items():
        tensors = load_file(merged_as(write, f"as {layout}"))
        assert tensors.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(tensors[name], tensor), (layout, name)


@pytest.mark.filterwarnings("ignore::mass_export.merging.IllConditionedWarning")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gives_the_same_factors_within_its_rounding(merged_as, dtype):
    def half(clip, path):
        save_file({n: t.to(dtype) for n, t in towers_state(clip).items()}, path)

    full = read_artifact(merged_as(LAYOUTS["tower"], "full"))
    rounded = read_artifact(merged_as(half, "half"))
    step = torch.finfo(dtype).eps
    for mine, given in zip(rounded.tasks, full.tasks, strict=True):
        for name, matrix in given.matrices.items():
            largest = 2 * step * float(full.base[name].abs().max()) * max(full.base[name].shape)
            assert abs(float(mine.matrices[name].s[0] - matrix.s[0])) < largest
        for name, delta in given.vectors.items():
            atol = 2 * step * float(full.base[name].abs().max() + delta.abs().max())
            torch.testing.assert_close(mine.vectors[name], delta, rtol=0, atol=atol)
