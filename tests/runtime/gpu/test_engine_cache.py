"""A bundle without engines for this GPU builds them once; the builds are doubles that the GPU's double can run."""

import logging
from pathlib import Path

import numpy as np
import pytest

from runtime import BackendError, Classifier, engine_cache
from runtime.engine_monitor import terminal_bar
from runtime.manifest import read_manifest


@pytest.fixture
def builds(monkeypatch, gpu):
    """The list takes the graphs that were built, with their largest batch."""
    built = []

    def build(onnx_file, spec, profiles, **_settings):
        plan = f"plan {len(built)}".encode()
        gpu.plans[plan] = (onnx_file, spec)
        built.append((onnx_file.stem, profiles[0]["B"][2]))
        return plan

    monkeypatch.setattr(engine_cache, "build_engine", build)
    return built


@pytest.fixture
def engines(tmp_path):
    return lambda suffix=".engine": sorted((tmp_path / "cache/engines").glob(f"*{suffix}"))


@pytest.mark.parametrize("provider", ["auto", "tensorrt"])
def test_engines_are_built_on_first_use_and_found_afterwards(toy_bundle, toy, builds, engines, provider):
    pixel_values = toy.pixel_values(9)
    with Classifier(toy_bundle(), "cpu") as classifier:
        expected = classifier.forward(pixel_values)
    before = {path: path.read_bytes() for path in toy_bundle().iterdir()}
    for _ in range(2):
        with Classifier(toy_bundle(), provider, batch_size=16) as classifier:
            assert classifier.provider == "tensorrt"
            assert np.allclose(classifier.forward(pixel_values).logits, expected.logits, atol=1e-5)
    assert builds == [("first_pass", 16), ("second_pass", 16)]
    assert len(engines()) == 2
    assert {path: path.read_bytes() for path in toy_bundle().iterdir()} == before


def test_another_batch_size_gpu_or_version_gets_engines_of_its_own(
    toy_bundle, builds, engines, gpu, monkeypatch
):
    import tensorrt

    Classifier(toy_bundle(), "tensorrt").close()
    Classifier(toy_bundle(), "tensorrt", batch_size=4).close()
    gpu.capability = (9, 0)
    Classifier(toy_bundle(), "tensorrt").close()
    monkeypatch.setattr(tensorrt, "__version__", "1.8.0")
    Classifier(toy_bundle(), "tensorrt").close()
    assert len(builds) == len(engines()) == 8


@pytest.mark.parametrize("damage", ["engine", "sha256"])
def test_a_damaged_engine_is_built_again(toy_bundle, builds, engines, damage):
    Classifier(toy_bundle(), "tensorrt").close()
    first = engines(f".{damage}")[0]
    first.write_bytes(b"?") if damage == "engine" else first.unlink()
    Classifier(toy_bundle(), "tensorrt").close()
    assert [name for name, _ in builds] == ["first_pass", "second_pass", "first_pass"]
    Classifier(toy_bundle(), "tensorrt").close()
    assert len(builds) == 3


def test_a_stale_engine_of_the_bundle_is_replaced_with_a_message(engine_bundle, builds, caplog):
    directory = engine_bundle(version="1.6.0")
    with caplog.at_level(logging.WARNING), Classifier(directory, "tensorrt") as classifier:
        assert classifier.provider == "tensorrt"
    assert "its engines: tensorrt_rtx 1.6.0 for Ampere and later" in caplog.text
    assert "building the engine of first_pass for this GPU, once" in caplog.text
    assert len(builds) == 2
    assert {engine.key.version for engine in read_manifest(directory).engines} == {"1.6.0"}


def test_building_can_be_forbidden(toy_bundle, builds):
    with pytest.raises(BackendError, match=r"no engines for compute capability 8\.6.*mass build-engines"):
        Classifier(toy_bundle(), "tensorrt", build_engines=False)
    with Classifier(toy_bundle(), "auto", build_engines=False) as classifier:
        assert classifier.provider == "cpu"
    assert not builds


@pytest.mark.usefixtures("builds")
def test_a_cache_that_cannot_be_written_is_an_error_that_names_the_variable(
    toy_bundle, tmp_path, monkeypatch
):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MASS_CACHE", str(tmp_path / "file"))
    with pytest.raises(BackendError, match="set MASS_CACHE"):
        Classifier(toy_bundle(), "tensorrt")


def test_engines_are_built_for_the_routers_settings_in_use(toy_bundle, builds):
    Classifier(toy_bundle(), "tensorrt").close()
    Classifier(toy_bundle(), "tensorrt", mode="top1").close()  # other set sizes: another second pass
    assert [name for name, _ in builds] == ["first_pass", "second_pass", "second_pass"]


def test_the_bar_is_for_terminals_alone(capsys, monkeypatch):
    with terminal_bar("Building first_pass") as show:
        show("tactics", 1, 2)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with terminal_bar("Building first_pass") as show:
        show("tactics", 1, 2)
    assert "Building first_pass [###############...............] 0 s  tactics" in capsys.readouterr().err


def test_the_cache_is_the_variables_or_the_users(monkeypatch):
    monkeypatch.setenv("MASS_CACHE", "/a")
    assert engine_cache.cache_directory() == Path("/a")
    monkeypatch.delenv("MASS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert engine_cache.cache_directory() == Path("/b/mass-export")
