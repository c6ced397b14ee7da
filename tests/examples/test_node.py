"""The example in Node.js reads the zoo's bundles and answers as the Python runtime does."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import warnings
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from mass_export.artifact import write_artifact
from mass_export.merge import merge
from mass_export.merging import IllConditionedWarning
from mass_export.onnx_export import export_bundle
from mass_export.progress import Progress
from mass_export.recipe import load_recipe
from runtime import Classifier
from runtime.prediction import ForwardResult, joined, predictions_from_result
from runtime.preprocess import pixel_values_from_images

ROOT = Path(__file__).parents[2]
ZOO = ROOT / "examples/zoo"
PROGRAM = ROOT / "examples/node"
IMAGES_PER_TASK = 30
BATCH = 32

# What replaces the manifest's router settings: the second is read by the runtime alone, so that it needs no export.
ROUTERS = {
    "default": ("default", {}),
    "verified": ("default", {"verify_margin": 2.0, "verify_budget": 0.25, "unknown_threshold": -9.0}),
    "paper": ("paper", {}),
    "weighted": ("paper", {"mode": "weighted", "threshold": 0.15, "head_choice": "mean"}),
}

pytestmark = pytest.mark.slow

if shutil.which("node") is None:
    pytest.skip("node is not installed", allow_module_level=True)


@pytest.fixture(scope="module", autouse=True)
def packages() -> None:
    """The program's npm packages: those that are there, or in continuous integration those of its lock file."""
    if (PROGRAM / "node_modules/onnxruntime-node").is_dir():
        return
    install = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
    if os.environ.get("CI") and shutil.which("npm"):
        subprocess.run(install, cwd=PROGRAM, check=True, capture_output=True)
    else:
        pytest.skip(f"onnxruntime-node is not installed: run `{' '.join(install[:3])}` in {PROGRAM}")


def run_node(*arguments):
    return subprocess.run(
        ["node", PROGRAM / "classify.js", *arguments], capture_output=True, text=True, check=False
    )


def answers(*arguments):
    finished = run_node(*arguments)
    assert finished.returncode == 0, finished.stderr
    return [json.loads(line) for line in finished.stdout.splitlines()]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    """The zoo's core recipe with two routers, exported without further checks."""
    directory = tmp_path_factory.mktemp("node")
    made = {}
    for router in ("default", "paper"):
        recipe = yaml.safe_load((ZOO / "core.yaml").read_text())
        recipe |= {"router": router, "model": str(ZOO / recipe["model"]), "base": str(ZOO / recipe["base"])}
        for task in recipe["tasks"]:
            task["head"]["file"] = str(ZOO / task["head"]["file"])
            task |= {key: str(ZOO / task[key]) for key in ("checkpoint", "classes")}
        (directory / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        progress = Progress(quiet=True)
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", IllConditionedWarning
            )  # at this rank the zoo's tasks share directions
            artifact = merge(load_recipe(directory / "recipe.yaml"), progress)
        file = directory / "merged"
        write_artifact(file, artifact)
        made[router] = export_bundle(artifact, file, directory / router, verify=False, progress=progress)
    return made


@pytest.fixture(params=ROUTERS)
def bundle(request, bundles, tmp_path):
    router, settings = ROUTERS[request.param]
    return with_router(bundles[router], tmp_path / request.param, settings)


def with_router(bundle, copy, settings):
    """The same bundle with other settings of its router, which no checksum covers."""
    copy.mkdir()
    for file in bundle.iterdir():
        (copy / file.name).symlink_to(file)
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["router"] |= settings
    (copy / "manifest.json").unlink()
    (copy / "manifest.json").write_text(json.dumps(manifest))
    return copy


def zoo_images(tasks):
    images = []
    for task in tasks:
        with np.load(ZOO / f"data/{task}/test.npz") as arrays:
            images += list(arrays["images"][:: len(arrays["images"]) // IMAGES_PER_TASK][:IMAGES_PER_TASK])
    return images


def python_answers(classifier, pixel_values) -> tuple[ForwardResult, list]:
    starts = range(0, len(pixel_values), BATCH)
    result = joined([classifier.forward(pixel_values[start : start + BATCH]) for start in starts])
    return result, predictions_from_result(result, classifier.manifest.tasks, 5, router=classifier.router)


def test_node_answers_as_python_does_on_images_of_every_task(bundle, tmp_path):
    with Classifier(bundle) as classifier:
        pixel_values = pixel_values_from_images(zoo_images(classifier.tasks), classifier.manifest.preprocess)
        result, expected = python_answers(classifier, pixel_values)
        selected = [{classifier.tasks[i] for i in np.flatnonzero(row)} for row in result.selected]
    np.save(tmp_path / "pixel_values.npy", pixel_values)
    found = answers(bundle, tmp_path / "pixel_values.npy")

    assert len(found) == len(expected) >= 200
    for key in ("task", "label", "is_unknown"):
        assert [answer[key] for answer in found] == [getattr(p, key) for p in expected]
    assert [set(answer["selected"]) for answer in found] == selected
    assert [answer["verified"] for answer in found] == result.verified.tolist()
    for key in ("gates", "residuals"):
        theirs = np.array([list(answer[key].values()) for answer in found])
        ours = np.array([list(getattr(p, key).values()) for p in expected])
        np.testing.assert_allclose(theirs, ours, rtol=1e-4, atol=1e-5)
    for key in ("score", "unknown"):
        theirs, ours = [answer[key] for answer in found], [getattr(p, key) for p in expected]
        np.testing.assert_allclose(theirs, ours, rtol=1e-4, atol=1e-4)
    for answer, prediction in zip(found, expected, strict=True):
        assert [a["label"] for a in answer["alternatives"][:2]] == [a[1] for a in prediction.alternatives[:2]]
    # What this test is about does occur: sets of several tasks, or verified routes.
    sizes = {len(tasks) for tasks in selected}
    assert sizes == {1} if bundle.name in ("default", "verified") else max(sizes) > 2
    assert result.verified.any() == (bundle.name == "verified")


def test_node_gives_a_known_task_without_a_first_pass(bundles, tmp_path):
    with Classifier(bundles["paper"]) as classifier:
        pixel_values = pixel_values_from_images(zoo_images(["cards"]), classifier.manifest.preprocess)
        result = classifier.forward(pixel_values, ["flags"])
        expected = predictions_from_result(result, classifier.manifest.tasks, 5)
    np.save(tmp_path / "pixel_values.npy", pixel_values)
    found = answers(bundles["paper"], "--task", "flags", tmp_path / "pixel_values.npy")
    assert [(a["task"], a["label"], a["residuals"]) for a in found] == [
        ("flags", p.label, None) for p in expected
    ]


def test_only_allowed_tasks_compete_in_node_too(bundles, tmp_path):
    allowed = ["cards", "flags", "icons"]
    with Classifier(bundles["paper"]) as classifier:
        pixel_values = pixel_values_from_images(zoo_images(["animals"]), classifier.manifest.preprocess)
        result = classifier.forward(pixel_values, allowed)
    np.save(tmp_path / "pixel_values.npy", pixel_values)
    words = [word for name in allowed for word in ("--task", name)]
    found = answers(bundles["paper"], *words, tmp_path / "pixel_values.npy")
    theirs = np.array([list(answer["gates"].values()) for answer in found])
    np.testing.assert_allclose(theirs, result.gates, atol=1e-5)


TOPK = {"layer": 1, "mode": "topk", "threshold": 0.05, "max_tasks": 3}


@pytest.mark.parametrize(
    ("keys", "tasks", "twice"),
    [
        ({"compose": "sum", "sum_weights": "gates"}, 4, False),
        ({"compose": "sum", "vectors": "base"}, 4, False),
        ({"base_merge": "zeroshot", "head_choice": "mean"}, 4, False),
        ({"rank": 5}, 4, True),
        ({}, 1, False),
    ],
    ids=[
        "sum by gates",
        "sum, vectors of the base",
        "zeroshot, mean heads",
        "the same task twice",
        "one task",
    ],
)
def test_node_agrees_on_small_bundles_of_other_kinds(pico_files, tmp_path, keys, tasks, twice):
    path = pico_files(tasks=tasks, router=TOPK, **keys)
    if twice:  # then the stacked bases of both are rank-deficient
        recipe = yaml.safe_load(path.read_text())
        recipe["tasks"][2]["checkpoint"] = recipe["tasks"][1]["checkpoint"]
        path.write_text(yaml.safe_dump(recipe))
    progress = Progress(quiet=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", IllConditionedWarning)
        artifact = merge(load_recipe(path), progress)
    write_artifact(tmp_path / "merged", artifact)
    bundle = export_bundle(
        artifact, tmp_path / "merged", tmp_path / "bundle", verify=False, progress=progress
    )
    pixel_values = np.random.default_rng(0).standard_normal((40, 3, 16, 16), np.float32)
    with Classifier(bundle) as classifier:
        result, expected = python_answers(classifier, pixel_values)
    np.save(tmp_path / "pixel_values.npy", pixel_values)
    found = answers(bundle, tmp_path / "pixel_values.npy")
    assert result.selected.sum(axis=1).max() > 1 or tasks == 1
    assert [(a["task"], a["label"]) for a in found] == [(p.task, p.label) for p in expected]
    assert [set(a["residuals"]) for a in found] == [set(p.residuals) for p in expected]
    np.testing.assert_allclose([a["score"] for a in found], [p.score for p in expected], rtol=1e-3, atol=1e-4)


def test_png_files_give_the_pixel_values_that_pillow_gives(bundles, tmp_path):
    files = []
    for mode in ("RGB", "L", "P", "RGBA", "1"):
        for task in ("sprites", "flags"):
            image = Image.fromarray(np.asarray(zoo_images([task])[3])).convert("RGB").convert(mode)
            files.append(tmp_path / f"{task}-{mode}.png")
            image.save(files[-1])
    with Classifier(bundles["default"]) as classifier:
        expected = classifier.predict(files)
    found = answers(bundles["default"], *files)
    assert [(a["task"], a["label"]) for a in found] == [(p.task, p.label) for p in expected]
    np.testing.assert_allclose([a["score"] for a in found], [p.score for p in expected], atol=1e-5)


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_node_runs_bundles_of_fewer_bits(bundles, tmp_path, precision):
    from mass_export.artifact import read_artifact

    file = bundles["paper"].parent / "merged"  # that of the paper's router, which was written last
    bundle = export_bundle(
        read_artifact(file),
        file,
        tmp_path / precision,
        verify=False,
        progress=Progress(quiet=True),
        precision=precision,
    )
    with Classifier(bundle) as classifier:
        pixel_values = pixel_values_from_images(
            zoo_images(["sprites", "icons"]), classifier.manifest.preprocess
        )
        _, expected = python_answers(classifier, pixel_values)
    np.save(tmp_path / "pixel_values.npy", pixel_values)
    found = answers(bundle, tmp_path / "pixel_values.npy")
    assert [(a["task"], a["label"]) for a in found] == [(p.task, p.label) for p in expected]
    # In int8 the runtime's graphs for one task round the patches, too; the second pass that Node runs does not.
    tolerance = {"fp16": 0.03, "int8": 0.06}[precision]
    np.testing.assert_allclose([a["score"] for a in found], [p.score for p in expected], atol=tolerance)


def refusal(*arguments):
    finished = run_node(*arguments)
    assert finished.returncode == 1
    assert finished.stdout == ""
    assert finished.stderr.count("\n") == 1
    return finished.stderr


def test_node_refuses_a_changed_file_and_another_schema_version(bundles, tmp_path):
    copy = with_router(bundles["default"], tmp_path / "copy", {})
    weights = bytearray((copy / "weights.bin").read_bytes())
    weights[5000] ^= 1
    (copy / "weights.bin").unlink()
    (copy / "weights.bin").write_bytes(weights)
    (copy / "second_pass.onnx").unlink()
    message = refusal(copy, "image.png")
    assert "weights.bin was changed" in message
    assert "second_pass.onnx is missing" in message
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(manifest | {"schema_version": 4}))
    assert "schema version 4, this program reads 3" in refusal(copy, "image.png")
    takes_bytes = manifest | {"preprocess": manifest["preprocess"] | {"dtype": "uint8"}}
    (copy / "manifest.json").write_text(json.dumps(takes_bytes))
    assert "export it with --input float32" in refusal(copy, "image.png")
    manifest["files"]["../weights.bin"] = manifest["files"]["weights.bin"]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    assert 'unsafe file name "../weights.bin"' in refusal(copy, "image.png")


def test_node_names_what_it_cannot_use(bundles, tmp_path):
    bundle = bundles["default"]
    Image.new("RGB", (40, 32)).save(tmp_path / "wide.png")
    assert "40 x 32 pixels, expected 32 x 32" in refusal(bundle, tmp_path / "wide.png")
    (tmp_path / "text.png").write_text("no picture")
    assert "not a PNG file" in refusal(bundle, tmp_path / "text.png")
    np.save(tmp_path / "double.npy", np.zeros((1, 3, 32, 32)))
    assert "float32" in refusal(bundle, tmp_path / "double.npy")
    np.save(tmp_path / "small.npy", np.zeros((1, 3, 16, 16), np.float32))
    assert "expected shape [B, 3, 32, 32], got [1, 3, 16, 16]" in refusal(bundle, tmp_path / "small.npy")
    np.save(tmp_path / "nan.npy", np.full((1, 3, 32, 32), np.nan, np.float32))
    assert "NaN" in refusal(bundle, tmp_path / "nan.npy")
    np.save(tmp_path / "one.npy", np.zeros((1, 3, 32, 32), np.float32))
    assert "unknown or repeated: cats" in refusal(bundle, "--task", "cats", tmp_path / "one.npy")
    assert run_node(bundle).returncode == 2
