"""How artifacts lie in their files: fewer bits, factors of conv1, and back."""

import dataclasses

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mass_export.artifact import read_artifact, write_artifact
from mass_export.errors import ArtifactError, RecipeError
from mass_export.factor_storage import Storage, decode, encode, storage_of
from mass_export.low_rank import factorize, orthonormal_rows
from mass_export.merge import merge
from mass_export.model import MassModel
from mass_export.onnx_export import export_bundle
from mass_export.progress import Progress
from mass_export.recipe import load_recipe
from mass_export.verify import sample_images
from runtime.classifier import Classifier

DTYPES = ["float32", "float16", "bfloat16", "int8"]
ERROR = {"float32": 0, "float16": 2**-11, "bfloat16": 2**-8, "int8": 1 / 127}  # of the largest entry


@pytest.fixture
def artifact(pico_files):
    return merge(load_recipe(pico_files(tasks=3)), Progress(quiet=True))


def stored(artifact, path, factor_dtype="float32", patch_embed="full"):
    write_artifact(path, dataclasses.replace(artifact, storage=Storage(factor_dtype, patch_embed)))
    return read_artifact(path)


def close(got, wanted, dtype):
    torch.testing.assert_close(got, wanted, rtol=0, atol=2 * ERROR[dtype] * float(wanted.abs().max()) + 1e-7)


@pytest.mark.parametrize("dtype", DTYPES)
def test_factors_come_back_within_the_types_rounding(artifact, tmp_path, dtype):
    loaded = stored(artifact, tmp_path / "a", dtype)
    for mine, given in zip(loaded.tasks, artifact.tasks, strict=True):
        for name, matrix in given.matrices.items():
            close(mine.matrices[name].u, matrix.u, dtype)
            close(mine.matrices[name].vh, matrix.vh, dtype)
            assert torch.equal(mine.matrices[name].s, matrix.s)
        for name, delta in given.vectors.items():
            close(mine.vectors[name], delta, "float16" if dtype == "int8" else dtype)
    for name, parameter in artifact.base.items():
        assert torch.equal(loaded.base[name], parameter)
    for name, parameter in artifact.merged.items():
        delta = parameter - artifact.base[name]
        close(loaded.merged[name] - loaded.base[name], delta, dtype)
    assert loaded.storage == Storage(dtype, "full")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("patch_embed", ["full", "low_rank"])
def test_an_artifact_that_is_read_and_written_again_keeps_its_storage_and_factors(
    artifact, tmp_path, dtype, patch_embed
):
    once = stored(artifact, tmp_path / "a", dtype, patch_embed)
    write_artifact(tmp_path / "b", once)
    twice = read_artifact(tmp_path / "b")
    assert twice.storage == once.storage == Storage(dtype, patch_embed)
    a, b = load_file(tmp_path / "a"), load_file(tmp_path / "b")
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        exact = name.startswith(("tasks.", "router.", "base.", "heads.")) and ".conv1." not in name
        assert not exact or torch.equal(tensor, b[name]), name
    for mine, given in zip(twice.tasks, once.tasks, strict=True):
        close(
            mine.vectors["conv1.weight"],
            given.vectors["conv1.weight"],
            "float16" if dtype == "int8" else dtype,
        )
    for name, parameter in once.merged.items():
        delta = parameter - artifact.base[name]
        close(twice.merged[name] - artifact.base[name], delta, dtype)


def test_narrower_types_make_smaller_files(artifact, tmp_path):
    sizes = []
    for dtype in ("float32", "float16", "int8"):
        stored(artifact, tmp_path / dtype, dtype)
        tensors = load_file(tmp_path / dtype)
        sizes.append(
            sum(t.numel() * t.element_size() for n, t in tensors.items() if n.endswith((".u", ".vh")))
        )
    assert sizes[1] == sizes[0] / 2
    assert sizes[2] < sizes[1]


def test_conv1_as_factors_is_the_best_approximation_of_twice_the_tasks_largest_rank(artifact, tmp_path):
    loaded = stored(artifact, tmp_path / "a", patch_embed="low_rank")
    rank = 2 * max(matrix.rank for matrix in artifact.tasks[0].matrices.values())
    delta = artifact.tasks[0].vectors["conv1.weight"]
    best = factorize(delta.double().flatten(1), rank).delta().reshape(delta.shape)
    torch.testing.assert_close(loaded.tasks[0].vectors["conv1.weight"], best.float(), rtol=0, atol=1e-6)
    assert "tasks.task0.conv1.weight.delta" not in load_file(tmp_path / "a")


def test_zero_bases_stay_zero_in_int8(artifact, tmp_path):
    name = "transformer.resblocks.0.mlp.c_fc.weight"
    matrix = artifact.tasks[0].matrices[name]
    zero = dataclasses.replace(matrix, u=matrix.u * 0, s=matrix.s * 0, vh=matrix.vh * 0)
    artifact.tasks[0].matrices[name] = zero
    loaded = stored(artifact, tmp_path / "a", "int8").tasks[0].matrices[name]
    assert not any(part.any() for part in (loaded.u, loaded.s, loaded.vh))


def test_values_beyond_float16_are_refused_with_the_type_that_holds_them(artifact, tmp_path):
    artifact.tasks[1].vectors["ln_post.bias"][0] = 1e6
    with pytest.raises(ArtifactError, match=r"task1\.ln_post\.bias.*do not fit float16; use bfloat16"):
        stored(artifact, tmp_path / "a", "float16")
    assert not (tmp_path / "a").exists()
    assert stored(artifact, tmp_path / "a", "bfloat16").tasks[1].vectors["ln_post.bias"][0] > 9e5


@pytest.mark.parametrize(
    ("part", "tensor"),
    [
        ("tasks.task0.conv1.weight.delta.u", None),
        ("tasks.task0.proj.u.scale", torch.ones(3, 3)),
        ("merged.proj.scale", None),
        ("tasks.task0.proj.vh", torch.zeros(4, 16)),
    ],
)
def test_parts_that_do_not_fit_each_other_are_refused(artifact, tmp_path, part, tensor):
    stored(artifact, tmp_path / "a", "int8", "low_rank")
    tensors = load_file(tmp_path / "a")
    part = "merged.proj.delta" if part == "merged.proj.scale" else part
    tensors.pop(part)
    if tensor is not None:
        tensors[part] = tensor
    with pytest.raises(ArtifactError, match="do not fit each other"):
        decode(tensors, "a")


def test_plain_tensors_are_left_alone():
    tensors = {"base.proj": torch.ones(2, 2), "tasks.a.proj.u": torch.ones(2, 1)}
    assert all(encode(tensors, Storage())[name] is tensor for name, tensor in tensors.items())
    assert storage_of(tensors) == Storage()
    with pytest.raises(RecipeError, match="factor_dtype: expected one of float32"):
        Storage("int4")


def test_the_recipe_says_how_conv1_is_stored(pico_files):
    assert load_recipe(pico_files()).patch_embed == "full"
    path = pico_files(patch_embed="low_rank")
    assert merge(load_recipe(path), Progress(quiet=True), factor_dtype="int8").storage == Storage(
        "int8", "low_rank"
    )
    with pytest.raises(RecipeError, match="patch_embed: expected one of full, low_rank"):
        load_recipe(pico_files(patch_embed="half"))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_graphs_of_rounded_router_bases_equal_the_eager_model(pico_files, tmp_path, dtype):
    router = {"layers": [0, 1, 2], "standardize": "tasks", "mode": "top1"}
    merged = merge(
        load_recipe(pico_files(tasks=3, base_merge="zeroshot", router=router)), Progress(quiet=True)
    )
    rounded = stored(merged, tmp_path / "a", dtype)
    vh = rounded.router_bases[0]["transformer.resblocks.0.mlp.c_fc.weight"]
    off = vh.double() @ vh.double().T - torch.eye(len(vh), dtype=torch.float64)
    assert off.abs().max() > 1e-5  # else this tests nothing
    export_bundle(rounded, tmp_path / "a", tmp_path / "bundle", verify=False, progress=Progress(quiet=True))
    images = torch.from_numpy(sample_images(rounded))
    expected = MassModel(rounded).residuals(images).numpy()
    with Classifier(tmp_path / "bundle") as classifier:
        got = classifier.forward(images.numpy()).residuals
    np.testing.assert_allclose(got, expected, rtol=0, atol=3e-5 * abs(expected).max())


def test_rows_are_made_orthonormal_only_where_rounding_shows():
    generator = torch.Generator().manual_seed(0)
    exact = torch.linalg.qr(torch.randn(32, 6, generator=generator)).Q.T.contiguous()
    assert orthonormal_rows(exact) is exact
    rounded = exact.to(torch.bfloat16).float()
    rounded[4] = 0
    mended = orthonormal_rows(rounded)
    used = [0, 1, 2, 3, 5]
    torch.testing.assert_close(mended[used] @ mended[used].T, torch.eye(5), rtol=0, atol=1e-6)
    torch.testing.assert_close(mended[used], exact[used], rtol=0, atol=5e-3)
    assert not mended[4].any()
