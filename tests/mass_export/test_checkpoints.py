from __future__ import annotations

import dataclasses
import os
import pickle
import sys
import warnings
import zipfile
from types import SimpleNamespace

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from mass_export.checkpoints import load_checkpoint
from mass_export.errors import (
    CheckpointFormatError,
    CheckpointKeyError,
    CheckpointShapeError,
    CheckpointValueError,
)
from mass_export.tensor_files import PickledModuleWarning


@pytest.fixture
def tower(pico_tower):
    return pico_tower(0)


class ImageEncoder(torch.nn.Module):
    """As the papers on merging pickle it."""

    def __init__(self, clip):
        super().__init__()
        self.model = clip
        self.cache_dir = None
        self.preprocess = torch.nn.functional.gelu


@pytest.fixture
def pico_clip(pico_model_config):
    torch.manual_seed(3)
    return open_clip.CLIP(**pico_model_config)


def vision_of(clip):
    return {
        name.removeprefix("visual."): tensor
        for name, tensor in clip.state_dict().items()
        if name.startswith("visual.")
    }


def prefixed(tower, prefix):
    return {prefix + name: tensor for name, tensor in tower.items()}


def same(loaded, tower):
    assert set(loaded) == set(tower)
    return all(torch.equal(loaded[name], tensor) for name, tensor in tower.items())


TEXT_TOWER = {
    "positional_embedding": torch.zeros(8, 16),
    "text_projection": torch.zeros(16, 16),
    "logit_scale": torch.zeros(()),
    "token_embedding.weight": torch.zeros(64, 16),
    "ln_final.weight": torch.zeros(16),
    "transformer.resblocks.0.attn.in_proj_weight": torch.zeros(48, 16),
    "context_length": torch.tensor(8),
}


@pytest.mark.parametrize(
    "prefix",
    [
        "",
        "visual.",
        "model.visual.",
        "module.visual.",
        "image_encoder.model.visual.",
        "encoder.model.visual.",
        "module.",
        "_orig_mod.visual.",
    ],
)
@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
def test_a_tower_is_found_under_any_prefix_in_any_format(tmp_path, pico_vision, tower, prefix, kind):
    path = tmp_path / "checkpoint"
    state = prefixed(tower, prefix)
    if kind == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "zip")
    assert same(load_checkpoint(path, pico_vision), tower)


@pytest.mark.parametrize("name", ["a.pt", "a.bin", "a.safetensors", "a"])
def test_formats_are_told_from_content_whatever_the_name(tmp_path, pico_vision, tower, name):
    torch.save(tower, tmp_path / name)
    assert same(load_checkpoint(tmp_path / name, pico_vision), tower)
    torch.save(tower, tmp_path / name, _use_new_zipfile_serialization=False)
    assert same(load_checkpoint(tmp_path / name, pico_vision), tower)
    save_file(tower, tmp_path / name)
    assert same(load_checkpoint(tmp_path / name, pico_vision), tower)


@pytest.mark.parametrize("wrapper", ["", "model.", "module."])
def test_the_text_tower_of_a_whole_clip_is_left_out(tmp_path, pico_vision, tower, wrapper):
    save_file(prefixed(tower, f"{wrapper}visual.") | prefixed(TEXT_TOWER, wrapper), tmp_path / "clip")
    assert same(load_checkpoint(tmp_path / "clip", pico_vision), tower)


@pytest.mark.parametrize("nest", [["state_dict"], ["model"], ["state_dict", "model"]])
def test_nested_state_dicts_are_opened(tmp_path, pico_vision, tower, nest):
    state = prefixed(tower, "module.visual.")
    for key in nest:
        state = {key: state, "epoch": 3, "optimizer": {"lr": 0.1}}
    torch.save(state, tmp_path / "nested.pt")
    assert same(load_checkpoint(tmp_path / "nested.pt", pico_vision), tower)


def test_parameters_and_transposed_tensors_are_plain_contiguous_copies(tmp_path, pico_vision, tower):
    state = {name: torch.nn.Parameter(tensor) for name, tensor in tower.items()}
    state["proj"] = torch.nn.Parameter(tower["proj"].T.contiguous()).T
    torch.save(state, tmp_path / "a.pt")
    loaded = load_checkpoint(tmp_path / "a.pt", pico_vision)
    assert same(loaded, tower)
    assert all(tensor.is_contiguous() and not tensor.requires_grad for tensor in loaded.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_types_become_float32(tmp_path, pico_vision, tower, dtype):
    save_file({name: tensor.to(dtype) for name, tensor in tower.items()}, tmp_path / "a")
    loaded = load_checkpoint(tmp_path / "a", pico_vision)
    assert same(loaded, {name: tensor.to(dtype).float() for name, tensor in tower.items()})
    assert {tensor.dtype for tensor in loaded.values()} == {torch.float32}


def test_all_missing_and_unexpected_tensors_are_named_at_once(tmp_path, pico_vision, tower):
    state = prefixed(tower, "visual.")
    del state["visual.proj"], state["visual.ln_post.bias"]
    state |= {"visual.extra": torch.zeros(1), "adapter.weight": torch.zeros(1)}
    save_file(state, tmp_path / "a")
    with pytest.raises(CheckpointKeyError) as caught:
        load_checkpoint(tmp_path / "a", pico_vision)
    message = str(caught.value)
    assert "2 missing (visual.ln_post.bias, visual.proj)" in message
    assert "2 unexpected (adapter.weight, visual.extra)" in message
    assert str(tmp_path / "a") in message


def test_a_block_too_many_is_unexpected_even_without_a_prefix(tmp_path, pico_vision, tower):
    save_file(tower | {"transformer.resblocks.3.ln_1.bias": torch.zeros(32)}, tmp_path / "a")
    with pytest.raises(CheckpointKeyError, match=r"1 unexpected \(transformer\.resblocks\.3\.ln_1\.bias\)"):
        load_checkpoint(tmp_path / "a", pico_vision)


def test_a_text_only_checkpoint_misses_the_whole_tower(tmp_path, pico_vision):
    save_file(TEXT_TOWER, tmp_path / "a")
    with pytest.raises(CheckpointKeyError, match=r"missing \(class_embedding"):
        load_checkpoint(tmp_path / "a", pico_vision)


def test_two_towers_in_one_file_are_ambiguous(tmp_path, pico_vision, tower):
    torch.save(prefixed(tower, "visual.") | prefixed(tower, "model.visual."), tmp_path / "a")
    with pytest.raises(
        CheckpointFormatError, match=r"several vision towers \(model\.visual\.\*, visual\.\*\)"
    ):
        load_checkpoint(tmp_path / "a", pico_vision)


def test_wrong_shapes_are_named_with_both_shapes(tmp_path, pico_vision, tower):
    wrong = {"proj": torch.zeros(16, 32), "ln_pre.bias": torch.zeros(1)}
    save_file(tower | wrong, tmp_path / "a")
    with pytest.raises(CheckpointShapeError) as caught:
        load_checkpoint(tmp_path / "a", pico_vision)
    assert "2 tensor(s)" in str(caught.value)
    assert "proj: expected [32, 16], got [16, 32]" in str(caught.value)
    assert "ln_pre.bias: expected [32], got [1]" in str(caught.value)


def test_a_huge_expanded_tensor_is_refused_by_its_shape(tmp_path, pico_vision, tower):
    torch.save(tower | {"proj": torch.zeros(1).expand(1 << 40)}, tmp_path / "a")
    with pytest.raises(CheckpointShapeError, match=r"got \[1099511627776\]"):
        load_checkpoint(tmp_path / "a", pico_vision)


def test_unusable_values_are_named_at_once(tmp_path, pico_vision, tower):
    state = dict(tower)
    state["proj"] = tower["proj"].clone()
    state["proj"][0, :2] = torch.tensor([float("nan"), float("inf")])
    state["ln_pre.bias"] = torch.zeros(32, dtype=torch.int64)
    state["ln_pre.weight"] = torch.full((32,), 1e300, dtype=torch.float64)
    save_file(state, tmp_path / "a")
    with pytest.raises(CheckpointValueError) as caught:
        load_checkpoint(tmp_path / "a", pico_vision)
    assert "3 unusable tensor(s)" in str(caught.value)
    assert "proj holds 2 NaN or infinite value(s)" in str(caught.value)
    assert "ln_pre.bias is strided int64, not dense floating point" in str(caught.value)
    assert "ln_pre.weight holds 32" in str(caught.value)


def test_a_checkpoint_of_another_architecture_is_refused_with_what_differs(tmp_path, pico_vision, pico_tower):
    wide = dataclasses.replace(pico_vision, width=48, mlp_width=96, patch_size=(4, 4))
    save_file(pico_tower(0, wide), tmp_path / "wide")
    with pytest.raises(CheckpointShapeError) as caught:
        load_checkpoint(tmp_path / "wide", pico_vision)
    message = str(caught.value)
    assert "positional_embedding: expected [5, 32], got [17, 48]" in message
    assert "conv1.weight: expected [32, 3, 8, 8], got [48, 3, 4, 4]" in message
    assert "same architecture" in message
    deep = dataclasses.replace(pico_vision, layers=4, ln_pre=False)
    save_file(pico_tower(0, deep), tmp_path / "deep")
    with pytest.raises(CheckpointKeyError) as caught:
        load_checkpoint(tmp_path / "deep", pico_vision)
    assert "2 missing (ln_pre.bias, ln_pre.weight)" in str(caught.value)
    assert "12 unexpected (transformer.resblocks.3." in str(caught.value)
    save_file(
        {"layer1.0.conv1.weight": torch.zeros(4, 3, 1, 1), "fc.weight": torch.zeros(2, 4)},
        tmp_path / "resnet",
    )
    with pytest.raises(CheckpointKeyError, match=r"missing .*unexpected \(fc\.weight, layer1"):
        load_checkpoint(tmp_path / "resnet", pico_vision)


def test_a_header_that_promises_terabytes_is_refused_without_reserving_them(tmp_path, pico_vision):
    huge = b'{"proj":{"dtype":"F32","shape":[1099511627776,4],"data_offsets":[0,17592186044416]}}'
    (tmp_path / "a").write_bytes(safetensors_bytes(huge, b"\0" * 64))
    with pytest.raises(CheckpointFormatError, match="damaged safetensors"):
        load_checkpoint(tmp_path / "a", pico_vision)
    overflow = b'{"proj":{"dtype":"F32","shape":[4611686018427387904,8],"data_offsets":[0,64]}}'
    (tmp_path / "b").write_bytes(safetensors_bytes(overflow, b"\0" * 64))
    with pytest.raises(CheckpointFormatError, match="damaged safetensors"):
        load_checkpoint(tmp_path / "b", pico_vision)


@pytest.mark.parametrize("allow_pickle", [False, True])
def test_an_archive_that_promises_terabytes_is_refused_without_reserving_them(
    tmp_path, pico_vision, tower, allow_pickle
):
    torch.save(tower, tmp_path / "small.pt")
    with zipfile.ZipFile(tmp_path / "small.pt") as given, zipfile.ZipFile(tmp_path / "huge.pt", "w") as huge:
        for member in given.infolist():
            data = given.read(member)
            if member.filename.endswith("data.pkl"):  # every count and size of 32 becomes 2^31 - 1
                data = data.replace(b"K\x20", b"J\xff\xff\xff\x7f")
            huge.writestr(member.filename, data)
    with pytest.raises((CheckpointFormatError, CheckpointShapeError)):
        load_checkpoint(tmp_path / "huge.pt", pico_vision, allow_pickle=allow_pickle)


class Hostile:
    def __reduce__(self):
        return os.mkdir, (os.environ["HOSTILE_MARK"],)


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle"])
def test_a_pickle_that_runs_code_is_refused_and_not_run(tmp_path, pico_vision, monkeypatch, kind):
    mark = tmp_path / "mark"
    monkeypatch.setenv("HOSTILE_MARK", str(mark))
    path = tmp_path / "hostile.pt"
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Hostile()))
    else:
        torch.save({"visual.proj": Hostile()}, path, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(CheckpointFormatError, match="was not executed, because a pickle can run any code"):
        load_checkpoint(path, pico_vision)
    assert not mark.exists()


def write_module(module, path, kind):
    if kind in ("zip", "legacy"):
        torch.save(module, path, _use_new_zipfile_serialization=kind == "zip")
    elif kind == "nested":
        torch.save({"state_dict": module, "epoch": 3}, path)
    else:
        path.write_bytes(pickle.dumps(module, protocol=int(kind[-1])))


MODULE_KINDS = ["zip", "legacy", "nested", "pickle 2", "pickle 4", "pickle 5"]


@pytest.mark.parametrize("kind", MODULE_KINDS)
def test_a_pickled_module_is_refused_with_the_option_that_takes_it(tmp_path, pico_vision, pico_clip, kind):
    write_module(pico_clip, tmp_path / "module.pt", kind)
    with pytest.raises(
        CheckpointFormatError, match=r"whole module.*not executed.*state_dict\(\).*--allow-pickle"
    ):
        load_checkpoint(tmp_path / "module.pt", pico_vision)


@pytest.mark.parametrize("kind", MODULE_KINDS)
def test_with_allow_pickle_a_modules_parameters_are_taken_with_a_warning(
    tmp_path, pico_vision, pico_clip, kind
):
    write_module(ImageEncoder(pico_clip), tmp_path / "module.pt", kind)
    with pytest.warns(PickledModuleWarning, match="no code of them ran"):
        loaded = load_checkpoint(tmp_path / "module.pt", pico_vision, allow_pickle=True)
    assert same(loaded, vision_of(pico_clip))


def test_a_pickled_module_needs_no_code_to_be_read(tmp_path, pico_vision, pico_clip, monkeypatch):
    module = ImageEncoder(pico_clip)
    monkeypatch.setattr(ImageEncoder, "__module__", "src.modeling")
    for name in ("src", "src.modeling"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(ImageEncoder=ImageEncoder))
    torch.save(module, tmp_path / "module.pt")
    monkeypatch.delitem(sys.modules, "src.modeling")
    monkeypatch.delitem(sys.modules, "src")
    with pytest.warns(PickledModuleWarning):
        loaded = load_checkpoint(tmp_path / "module.pt", pico_vision, allow_pickle=True)
    assert same(loaded, vision_of(pico_clip))


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle 4"])
def test_not_even_allow_pickle_runs_what_a_pickle_asks_for(tmp_path, pico_vision, tower, monkeypatch, kind):
    mark = tmp_path / "mark"
    monkeypatch.setenv("HOSTILE_MARK", str(mark))
    write_module({**tower, "hostile": Hostile()}, tmp_path / "hostile.pt", kind)
    with pytest.warns(PickledModuleWarning):
        assert same(load_checkpoint(tmp_path / "hostile.pt", pico_vision, allow_pickle=True), tower)
    assert not mark.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02" + b"ctorch._utils\n_rebuild_tensor_v2\n" + b"(K\x01K\x02tR.",
        b"\x80\x02}q\x00(X\x01\x00\x00\x00acbuiltins\nlist\nN}u\x86b.",
        b"\x80\x02r\xff\xff\xff\x7f.",  # a memo index that would reserve gigabytes
        b"\x80\x02(" * 100,
    ],
)
def test_malformed_pickles_are_refused_even_with_allow_pickle(tmp_path, pico_vision, content):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(CheckpointFormatError, match=r"damaged torch file|no named tensors"):
        load_checkpoint(tmp_path / "a", pico_vision, allow_pickle=True)


@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.999])
def test_a_truncated_file_is_refused(tmp_path, pico_vision, tower, kind, share):
    path = tmp_path / "a"
    if kind == "safetensors":
        save_file(tower, path)
    else:
        torch.save(tower, path, _use_new_zipfile_serialization=kind == "zip")
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(CheckpointFormatError, match=r"damaged .*fetch it again"):
        load_checkpoint(path, pico_vision)


def safetensors_bytes(header, data=b""):
    return len(header).to_bytes(8, "little") + header + data


@pytest.mark.parametrize(
    ("content", "pattern"),
    [
        (b"", "neither safetensors nor a torch state dict"),
        (b"not a checkpoint at all", "neither safetensors"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        ((1 << 62).to_bytes(8, "little") + b"{}", "neither safetensors"),
        ((1 << 20).to_bytes(8, "little") + b"{}", "damaged safetensors"),
        (safetensors_bytes(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,9999]}}'), "damaged"),
        (
            safetensors_bytes(
                b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
                b'"b":{"dtype":"F32","shape":[1],"data_offsets":[2,6]}}',
                b"\0" * 6,
            ),
            "damaged",
        ),
        (b"\x80\x02garbage", "pickle|damaged torch file"),
        (b"PK\x03\x04garbage", "damaged torch file"),
    ],
)
def test_garbage_is_refused(tmp_path, pico_vision, content, pattern):
    path = tmp_path / "a"
    path.write_bytes(content)
    with pytest.raises(CheckpointFormatError, match=pattern):
        load_checkpoint(path, pico_vision)


def test_compressed_archives_are_refused_before_they_are_unpacked(tmp_path, pico_vision):
    with zipfile.ZipFile(tmp_path / "a", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 1_000_000)
    with pytest.raises(CheckpointFormatError, match=r"torch\.save did not write"):
        load_checkpoint(tmp_path / "a", pico_vision)


def test_the_parameters_of_a_torchscript_archive_are_read_and_its_code_is_not_run(
    tmp_path, pico_vision, pico_clip
):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is on its way out
        inputs = {"encode_image": torch.zeros(1, 3, 16, 16)}
        torch.jit.save(torch.jit.trace_module(pico_clip, inputs), tmp_path / "clip.pt")
    with zipfile.ZipFile(tmp_path / "clip.pt") as archive, zipfile.ZipFile(tmp_path / "b.pt", "w") as copy:
        for member in archive.infolist():  # whatever its code says
            copy.writestr(member.filename, b"!" if "/code/" in member.filename else archive.read(member))
    assert same(load_checkpoint(tmp_path / "clip.pt", pico_vision), vision_of(pico_clip))
    assert same(load_checkpoint(tmp_path / "b.pt", pico_vision), vision_of(pico_clip))


def test_a_damaged_torchscript_archive_is_refused(tmp_path, pico_vision):
    with zipfile.ZipFile(tmp_path / "a", "w") as archive:
        archive.writestr("archive/data.pkl", b"")
        archive.writestr("archive/constants.pkl", b"")
    with pytest.raises(CheckpointFormatError, match="damaged torch file"):
        load_checkpoint(tmp_path / "a", pico_vision)


@pytest.mark.parametrize("data", [[1, 2], {"epoch": 3}, {"state_dict": {}}, {"model": {"model": {"lr": 1}}}])
def test_files_without_named_tensors_are_refused(tmp_path, pico_vision, data):
    torch.save(data, tmp_path / "a")
    with pytest.raises(CheckpointFormatError, match="no named tensors"):
        load_checkpoint(tmp_path / "a", pico_vision)


def test_missing_files_and_directories_are_named(tmp_path, pico_vision):
    with pytest.raises(CheckpointFormatError, match=r"none\.pt: no such file"):
        load_checkpoint(tmp_path / "none.pt", pico_vision)
    with pytest.raises(
        CheckpointFormatError, match=r"a folder without model\.safetensors, .*name the weights"
    ):
        load_checkpoint(tmp_path, pico_vision)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(CheckpointFormatError, match="cannot be read"):
        load_checkpoint(tmp_path / "loop", pico_vision)
