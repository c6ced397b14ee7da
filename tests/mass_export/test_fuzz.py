"""Whatever an artifact's header or a recipe holds, it is read or refused with one of the project's errors."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mass_export.artifact import read_artifact, write_artifact
from mass_export.artifact_header import FORMAT, info_from_metadata, metadata_from_info
from mass_export.errors import ArtifactError, MassExportError
from mass_export.image_pool import load_pool
from mass_export.merge import merge
from mass_export.model_config import preprocess_spec_from_config
from mass_export.progress import Progress
from mass_export.recipe import load_recipe

SLOW = {"max_examples": 300, "deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**400), 10**400) | st.floats() | st.text(max_size=6)
    | st.sampled_from(["..", "/etc/passwd", "hf:a/b", "default", "paper", "all", "."]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


@given(st.data())
@settings(**SLOW)
def test_a_header_with_anything_anywhere_is_read_or_refused(
    pico_files, tmp_path, changed_anywhere, data
) -> None:
    path = tmp_path / "seed.json"
    if not path.exists():
        artifact = merge(load_recipe(pico_files(2, router="default")), Progress(quiet=True))
        path.write_text(metadata_from_info(artifact.info)["info"])
    info = json.loads(path.read_text())
    info = changed_anywhere(info, data, VALUES)
    metadata = {"format": FORMAT, "schema_version": "1", "info": json.dumps(info)}
    try:
        info_from_metadata(metadata, "here")
    except ArtifactError as error:
        assert str(error).startswith("here: ")  # noqa: PT017 - other exceptions are the failure


@given(st.data())
@settings(**SLOW)
def test_a_recipe_with_anything_anywhere_is_read_or_refused(
    pico_files, tmp_path, monkeypatch, changed_anywhere, data
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    seed, path = tmp_path / "recipe.yaml", tmp_path / "changed.yaml"
    if not seed.exists():
        pico_files(2, router={"layer": 1}, rank=3)
    recipe = yaml.safe_load(seed.read_text())
    recipe = changed_anywhere(recipe, data, VALUES)
    try:
        path.write_text(yaml.safe_dump(recipe))
    except (yaml.YAMLError, UnicodeEncodeError):
        return
    try:
        load_recipe(path)
    except MassExportError as error:
        assert str(error)  # noqa: PT017 - as above


@pytest.mark.parametrize("key", ["model", "base", "checkpoint"])
def test_a_path_that_is_too_long_for_the_system_is_no_file(pico_files, key) -> None:
    path = pico_files(2, router="default")
    recipe = yaml.safe_load(path.read_text())
    (recipe["tasks"][0] if key == "checkpoint" else recipe)[key] = "a" * 5000
    path.write_text(yaml.safe_dump(recipe))
    with pytest.raises(MassExportError, match=r"no such file|neither a file"):
        load_recipe(path)


@given(st.data())
@settings(**SLOW)
def test_a_damaged_artifact_is_never_taken_for_the_whole_one(pico_files, tmp_path, data) -> None:
    path = tmp_path / "merged.safetensors"
    if not path.exists():
        write_artifact(path, merge(load_recipe(pico_files(2, router="default")), Progress(quiet=True)))
    content = path.read_bytes()
    changed = bytearray(content)
    for _ in range(data.draw(st.integers(0, 3))):
        changed[data.draw(st.integers(0, len(changed) - 1))] ^= data.draw(st.integers(1, 255))
    del changed[data.draw(st.integers(1, len(changed))) :]
    damaged = Path(tmp_path / "damaged.safetensors")
    damaged.write_bytes(changed)
    if bytes(changed) == content:
        read_artifact(damaged)
        return
    with pytest.raises(ArtifactError):
        read_artifact(damaged)


@given(st.data())
@settings(**SLOW)
def test_a_damaged_array_file_is_read_or_refused(pico_vision, tmp_path, data) -> None:
    path, spec = tmp_path / "pool.npz", preprocess_spec_from_config({}, pico_vision.image_size, "here")
    file = io.BytesIO()
    save = np.savez_compressed if data.draw(st.booleans()) else np.savez
    save(file, images=np.random.default_rng(0).integers(0, 256, (2, 5, 5, 3), dtype=np.uint8))
    changed = bytearray(file.getvalue())
    for _ in range(data.draw(st.integers(1, 4))):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(changed)
    try:
        assert np.isfinite(load_pool(path, spec)).all()
    except MassExportError as error:
        assert str(path) in str(error)  # noqa: PT017 - other exceptions are the failure
