from __future__ import annotations

import dataclasses
import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mass_export.artifact import Artifact, TaskFactors, check_destination, read_artifact, write_artifact
from mass_export.errors import ArtifactError
from mass_export.heads import Head
from mass_export.low_rank import LowRank
from mass_export.model_config import preprocess_spec_from_config
from mass_export.router_spec import RouterSettings
from mass_export.safetensors_writer import has_its_checksum
from mass_export.spec import ArtifactInfo, MergeSettings, TaskInfo

TAP = "transformer.resblocks.1.mlp.c_fc.weight"


@pytest.fixture
def artifact(pico_vision, pico_tower, pico_model_config):
    """Two tasks of ranks 3 and 4, the first with a bias in its head."""
    shapes = pico_vision.parameter_shapes()
    matrices = pico_vision.matrix_names()
    generator = torch.Generator().manual_seed(0)

    def factors(rank):
        def random(*shape):
            return torch.randn(shape, generator=generator)

        return TaskFactors(
            {
                n: LowRank(random(shapes[n][0], rank), random(rank).abs(), random(rank, shapes[n][1]))
                for n in matrices
            },
            {name: random(*shape) for name, shape in shapes.items() if name not in matrices},
        )

    info = ArtifactInfo(
        vision=pico_vision,
        preprocess=preprocess_spec_from_config({"std": [1, 2, 3]}, pico_vision.image_size, "test"),
        tasks=(TaskInfo("pets", ("cat", "dog", "Δ owl")), TaskInfo("cars", ("suv", "van"))),
        merge=MergeSettings(),
        router=RouterSettings(layer=1, threshold=0.3),
        rank_ratios=(0.1, None),
        ranks=(None, 4),
        provenance={"base": {"file": "base.safetensors", "sha256": "0" * 64}},
        model_config=pico_model_config,
    )
    return Artifact(
        info=info,
        base=pico_tower(0),
        merged=pico_tower(1),
        tasks=(factors(3), factors(4)),
        router_bases=tuple({"transformer.resblocks.1.mlp.c_fc.weight": torch.ones(r, 32)} for r in (3, 2)),
        heads=(Head(torch.ones(3, 16), torch.zeros(3)), Head(torch.ones(2, 16))),
    )


@pytest.fixture
def written(artifact, tmp_path):
    write_artifact(tmp_path / "merged.safetensors", artifact)
    return tmp_path / "merged.safetensors"


def flat(artifact):
    """Every tensor of an artifact by a unique name."""
    rows = {("base", name): tensor for name, tensor in artifact.base.items()}
    rows |= {("merged", name): tensor for name, tensor in artifact.merged.items()}
    for index, task in enumerate(artifact.tasks):
        for name, matrix in task.matrices.items():
            rows |= {(index, name, part): getattr(matrix, part) for part in ("u", "s", "vh")}
        rows |= {(index, name): delta for name, delta in task.vectors.items()}
        rows |= {(index, "router", name): vh for name, vh in artifact.router_bases[index].items()}
        rows[index, "weight"] = artifact.heads[index].weight
        rows[index, "bias"] = artifact.heads[index].bias
    return rows


def assert_equal(left, right):
    left, right = flat(left), flat(right)
    assert list(left) == list(right)
    for name, tensor in left.items():
        assert (tensor is None and right[name] is None) or torch.equal(tensor, right[name]), name


def rewrite(path, change_tensors=None, **metadata):
    """Write the file again with the safetensors package, with changes."""
    with safe_open(path, framework="pt") as file:
        header = file.metadata() | metadata
    tensors = load_file(path)
    if change_tensors:
        change_tensors(tensors)
    save_file(tensors, path, {name: value for name, value in header.items() if value is not None})


def change_info(path, change):
    with safe_open(path, framework="pt") as file:
        info = json.loads(file.metadata()["info"])
    change(info)
    rewrite(path, info=json.dumps(info))


def test_an_artifact_survives_the_file(artifact, written):
    loaded = read_artifact(written)
    assert loaded.info == artifact.info
    assert_equal(loaded, artifact)
    assert list(written.parent.iterdir()) == [written]


def test_equal_artifacts_give_equal_bytes(artifact, written, tmp_path):
    shuffled = dataclasses.replace(artifact, base=dict(reversed(artifact.base.items())))
    write_artifact(tmp_path / "again", shuffled)
    assert (tmp_path / "again").read_bytes() == written.read_bytes()


def test_the_safetensors_package_reads_the_file(artifact, written):
    tensors = load_file(written)
    assert torch.equal(tensors["base.proj"], artifact.base["proj"])
    assert torch.equal(tensors["tasks.cars.proj.u"], artifact.tasks[1].matrices["proj"].u)
    with safe_open(written, framework="pt") as file:
        metadata = file.metadata()
    assert (metadata["format"], metadata["schema_version"]) == ("mass-artifact", "1")
    assert json.loads(metadata["info"])["tasks"][0] == {"name": "pets", "classes": ["cat", "dog", "Δ owl"]}


def test_a_zeroshot_first_pass_needs_no_merged_tower(artifact, tmp_path):
    info = dataclasses.replace(artifact.info, merge=MergeSettings(base_merge="zeroshot"))
    zeroshot = dataclasses.replace(artifact, info=info, merged={})
    write_artifact(tmp_path / "a", zeroshot)
    assert_equal(read_artifact(tmp_path / "a"), zeroshot)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_width_storage_is_read_as_float32(artifact, tmp_path, dtype):
    half = dataclasses.replace(artifact, base={name: t.to(dtype) for name, t in artifact.base.items()})
    write_artifact(tmp_path / "a", half)
    loaded = read_artifact(tmp_path / "a")
    assert loaded.base["proj"].dtype == torch.float32
    assert torch.equal(loaded.base["proj"], half.base["proj"].float())
    assert torch.equal(loaded.merged["proj"], artifact.merged["proj"])


def test_non_contiguous_tensors_are_stored_by_value(artifact, tmp_path):
    base = artifact.base | {"proj": artifact.base["proj"].T.contiguous().T}
    write_artifact(tmp_path / "a", dataclasses.replace(artifact, base=base))
    assert_equal(read_artifact(tmp_path / "a"), artifact)


def test_every_missing_and_unexpected_tensor_is_named_at_once(written):
    def change(tensors):
        del tensors["base.proj"], tensors["tasks.pets.proj.u"], tensors[f"router.cars.{TAP}.vh"]
        tensors["base.extra"] = torch.zeros(1)

    rewrite(written, change)
    with pytest.raises(ArtifactError) as caught:
        read_artifact(written)
    for problem in (
        "base.proj is missing",
        "tasks.pets.proj.u is missing",
        f"router.cars.{TAP}.vh is missing",
        "base.extra is unexpected",
        str(written),
    ):
        assert problem in str(caught.value)


@pytest.mark.parametrize(
    ("name", "tensor", "pattern"),
    [
        ("base.proj", torch.zeros(16, 32), r"base\.proj: expected shape \[32, 16\], got \[16, 32\]"),
        ("tasks.pets.proj.u", torch.zeros(31, 3), r"proj\.u: expected shape \[32, R\], got \[31, 3\]"),
        (
            "tasks.pets.proj.u",
            torch.zeros(32, 2),
            r"tasks\.pets\.proj: u, s and vh have the ranks 2, 3 and 3",
        ),
        ("tasks.pets.proj.s", torch.zeros(3, 1), r"proj\.s: expected shape \[R\], got \[3, 1\]"),
        (f"router.cars.{TAP}.vh", torch.zeros(2, 33), r"c_fc\.weight\.vh: expected shape \[R, 32\]"),
        ("heads.cars.weight", torch.zeros(3, 16), r"heads\.cars\.weight: expected shape \[2, 16\]"),
        ("heads.pets.bias", torch.zeros(2), r"heads\.pets\.bias: expected shape \[3\]"),
        ("base.ln_pre.bias", torch.zeros(32, dtype=torch.int32), r"ln_pre\.bias: expected float32, .*int32"),
        ("merged.ln_pre.bias", torch.full((32,), float("nan")), r"NaN or infinite values in merged\.ln_pre"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(written, name, tensor, pattern):
    rewrite(written, lambda tensors: tensors.update({name: tensor}))
    with pytest.raises(ArtifactError, match=pattern):
        read_artifact(written)


@pytest.mark.parametrize(
    ("metadata", "pattern"),
    [
        ({"format": "pt"}, "not a MASS artifact"),
        ({"format": None}, "not a MASS artifact"),
        ({"schema_version": "2"}, "schema version '2', this version reads 1; install a newer"),
        ({"schema_version": "0"}, "schema version '0'.*merge again"),
        ({"schema_version": "x"}, "schema version 'x'.*merge again"),
        ({"info": "{"}, "invalid header: not JSON"),
        ({"info": "[" * 100_000}, "invalid header"),
        ({"info": "[]"}, "info: expected a mapping"),
        ({"info": "{}"}, r"info: missing key\(s\) vision"),
    ],
)
def test_a_foreign_header_is_refused(written, metadata, pattern):
    rewrite(written, **metadata)
    with pytest.raises(ArtifactError, match=rf"merged\.safetensors: .*{pattern}"):
        read_artifact(written)


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        (lambda info: info["vision"].pop("width"), "vision: missing key.* width"),
        (lambda info: info["vision"].update(width="32"), "width: expected an integer"),
        (lambda info: info["vision"].update(extra=1), "vision: unknown key"),
        (lambda info: info["router"].update(layer=3), "expected layers 0 to 2, got 3"),
        (lambda info: info["router"].update(mode="all"), "router.mode: expected one of"),
        (lambda info: info["merge"].update(compose="x"), "compose: expected one of"),
        (lambda info: info["tasks"].pop(), "rank_ratios: expected one per task"),
        (lambda info: info["tasks"][0].update(name="a.b"), "task name"),
        (lambda info: info["tasks"][0].update(name="cars"), "distinct names"),
        (lambda info: info["tasks"][0].update(classes=[1]), "classes: expected text"),
        (lambda info: info["tasks"][0].update(classes="ab"), "classes: expected a list"),
        (lambda info: info["preprocess"].update(mean=[1]), "mean and std"),
        (lambda info: info["preprocess"].update(image_size=[0, 1]), "image_size"),
        (lambda info: info.update(rank_ratios=["x", None]), "rank_ratios"),
        (lambda info: info.update(ranks=[1.5, None]), "ranks"),
        (lambda info: info.update(provenance=[1]), "provenance: expected an object"),
        (lambda info: info.update(more=1), "unknown key"),
    ],
)
def test_an_invalid_header_is_refused_by_key(written, change, pattern):
    change_info(written, change)
    with pytest.raises(ArtifactError, match=f"invalid header: .*{pattern}"):
        read_artifact(written)


@pytest.mark.parametrize("share", [0, 0.001, 0.1, 0.5, 0.9999])
def test_a_truncated_file_is_refused(written, share):
    data = written.read_bytes()
    written.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ArtifactError, match="not a complete safetensors file"):
        read_artifact(written)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(ArtifactError, match="none: no such file"):
        read_artifact(tmp_path / "none")
    with pytest.raises(ArtifactError, match="no such file"):
        read_artifact(tmp_path)


def test_an_artifact_that_does_not_fit_its_header_is_not_written(artifact, tmp_path):
    broken = [
        dataclasses.replace(artifact, base={}),
        dataclasses.replace(artifact, heads=()),
        dataclasses.replace(artifact, merged=artifact.merged | {"proj": torch.full((32, 16), float("inf"))}),
        dataclasses.replace(artifact, base={name: t.double() for name, t in artifact.base.items()}),
    ]
    for wrong in broken:
        with pytest.raises(ArtifactError):
            write_artifact(tmp_path / "a", wrong)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_file_and_nothing_else(artifact, written, monkeypatch):
    before = written.read_bytes()

    def full(_handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ArtifactError, match=r"cannot be written \(No space left"):
        write_artifact(written, artifact)
    assert list(written.parent.iterdir()) == [written]
    assert written.read_bytes() == before


def test_the_destination_is_checked_before_the_work(tmp_path):
    given = tmp_path / "base.safetensors"
    given.touch()
    check_destination(tmp_path / "new.safetensors", [given])
    with pytest.raises(ArtifactError, match="is an input of the merge"):
        check_destination(tmp_path / ".." / tmp_path.name / "base.safetensors", [given])
    with pytest.raises(ArtifactError, match="is a directory"):
        check_destination(tmp_path, [given])
    with pytest.raises(ArtifactError, match="does not exist"):
        check_destination(tmp_path / "none" / "a", [given])


def test_any_changed_byte_is_noticed(artifact, tmp_path):
    path = tmp_path / "a.safetensors"
    write_artifact(path, artifact)
    assert has_its_checksum(path)
    data = path.read_bytes()
    header = int.from_bytes(data[:8], "little")
    digits = data.index(b'"sha256":"') + 12
    for place in (digits, data.index(b"pets"), header + 8, header + 8 + 4 * 100 + 1, len(data) - 1):
        changed = bytearray(data)
        changed[place] ^= 1
        path.write_bytes(changed)
        assert has_its_checksum(path) is False
        with pytest.raises(ArtifactError):
            read_artifact(path)


def test_a_changed_weight_that_still_looks_like_one_is_named_by_its_checksum(artifact, tmp_path):
    path = tmp_path / "a.safetensors"
    write_artifact(path, artifact)
    data = bytearray(path.read_bytes())
    data[-4] ^= 1  # the lowest bit of the last number
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match="was changed since it was written"):
        read_artifact(path)


def test_artifacts_without_a_checksum_are_still_read(artifact, tmp_path):
    path = tmp_path / "a.safetensors"
    write_artifact(path, artifact)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    del metadata["sha256"]
    save_file(load_file(path), path, metadata)
    assert has_its_checksum(path) is None
    assert read_artifact(path).info == artifact.info
