"""Repositories of the hub, read from a local folder in the layout of the hub's cache."""

import pytest
import torch
import yaml
from huggingface_hub import constants
from safetensors.torch import save_file

from mass_export.checkpoints import load_checkpoint
from mass_export.errors import HubError
from mass_export.hub import fetch, source_name
from mass_export.merge import merge
from mass_export.progress import Progress
from mass_export.recipe import load_recipe

COMMIT, OLDER = "a" * 40, "b" * 40


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and no network."""
    folder = tmp_path / "hub"
    folder.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return folder


@pytest.fixture
def put(cache):
    """`put("org/name", write, commit=.., ref=..)`: a repository whose snapshot `write(folder)` fills."""

    def make(repo, write, commit=COMMIT, ref="main"):
        root = cache / f"models--{repo.replace('/', '--')}"
        snapshot = root / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (root / "refs").mkdir(exist_ok=True)
        (root / "refs" / ref).write_text(commit)
        write(snapshot)
        return snapshot

    return make


def safetensors_of(tower):
    return lambda folder: save_file(tower, folder / "model.safetensors")


def test_a_repository_is_its_snapshot_in_the_cache(put, pico_tower, pico_vision):
    snapshot = put("org/clip-tiny", safetensors_of(pico_tower(0)))
    path = fetch("hf:org/clip-tiny", "base")
    assert path == snapshot
    assert torch.equal(load_checkpoint(path, pico_vision)["proj"], pico_tower(0)["proj"])


def test_a_revision_may_be_a_branch_or_a_commit(put, pico_tower):
    newer = put("org/clip", safetensors_of(pico_tower(0)))
    older = put("org/clip", safetensors_of(pico_tower(1)), commit=OLDER, ref="v1.0")
    assert fetch("hf:org/clip", "base") == newer
    assert fetch("hf:org/clip@v1.0", "base") == older
    assert fetch(f"hf:org/clip@{OLDER}", "base") == older


def test_repositories_with_torch_files_alone_are_taken_as_well(put, pico_tower, pico_vision):
    put("org/old", lambda folder: torch.save(pico_tower(2), folder / "pytorch_model.bin"))
    loaded = load_checkpoint(fetch("hf:org/old", "base"), pico_vision)
    assert torch.equal(loaded["proj"], pico_tower(2)["proj"])


def test_a_recipe_of_hub_names_merges_like_one_of_files_and_records_the_revisions(put, pico_files):
    path = pico_files(tasks=2)
    local = merge(load_recipe(path), Progress(quiet=True))
    recipe = yaml.safe_load(path.read_text())
    for entry in [recipe, *recipe["tasks"]]:
        key = "base" if "base" in entry else "checkpoint"
        content = (path.parent / entry[key]).read_bytes()
        repo = f"org/clip_{entry[key].partition('.')[0]}"
        put(repo, lambda folder, content=content: (folder / "model.safetensors").write_bytes(content))
        entry[key] = f"hf:{repo}"
    path.write_text(yaml.safe_dump(recipe))
    merged = merge(load_recipe(path), Progress(quiet=True))
    assert all(torch.equal(merged.merged[name], tensor) for name, tensor in local.merged.items())
    recorded = merged.info.provenance["tasks"]["task1"]["checkpoint"]
    assert recorded["file"] == f"hf:org/clip_task1@{COMMIT}"
    assert recorded["sha256"] == local.info.provenance["tasks"]["task1"]["checkpoint"]["sha256"]


@pytest.mark.usefixtures("cache")
def test_what_is_not_cached_is_named_with_what_to_do():
    with pytest.raises(
        HubError, match=r"tasks\[1\]\.checkpoint: hf:org/none: not in the hub's cache.*hf download"
    ):
        fetch("hf:org/none", "tasks[1].checkpoint")


@pytest.mark.usefixtures("cache")
def test_no_network_is_one_clear_error(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        HubError, match=r"base: hf:org/none: not in the hub's cache, and it cannot be fetched"
    ):
        fetch("hf:org/none", "base")


@pytest.mark.parametrize(
    "name", ["hf:", "hf:clip", "hf:org/name/file", "hf:org/name@", "hf:org name/x", "hf:../x y"]
)
@pytest.mark.usefixtures("cache")
def test_other_names_are_refused(name):
    with pytest.raises(HubError, match=r"expected hf:org/name or hf:org/name@revision"):
        fetch(name, "base")


def test_local_paths_are_recorded_by_their_name(tmp_path):
    assert source_name(tmp_path / "base.safetensors") == "base.safetensors"
