"""docs/formats.md names what the formats' owners define: every key, every tensor, and nothing else."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from mass_export import artifact, artifact_header, graph, router_spec, spec
from mass_export.artifact import Calibration, write_artifact
from mass_export.errors import ArtifactError
from mass_export.factor_storage import Storage
from mass_export.merge import merge
from mass_export.onnx_export import export_bundle
from mass_export.progress import Progress
from mass_export.recipe import load_recipe
from runtime import bundle, cores, engine_spec, graph_files, routing
from runtime.errors import BundleError
from runtime.manifest import manifest_from_json

PAGE = (Path(__file__).parents[2] / "docs/formats.md").read_text(encoding="utf-8")
BUNDLE, _, ARTIFACT = PAGE.partition("\n## The artifact\n")

BUNDLE_CLASSES = (
    bundle.Manifest,
    bundle.TaskSpec,
    bundle.PreprocessSpec,
    bundle.RouterSpec,
    bundle.PassSpec,
    bundle.TensorSpec,
    bundle.StoredArray,
    bundle.MatrixBases,
    bundle.FileSpec,
    bundle.OneTaskSpec,
    bundle.VectorTables,
    engine_spec.EngineSpec,
    engine_spec.EngineKey,
)
ARTIFACT_CLASSES = (
    spec.ArtifactInfo,
    spec.VisionSpec,
    spec.TaskInfo,
    spec.MergeSettings,
    router_spec.RouterSettings,
    router_spec.CalibrationInfo,
    router_spec.Tap,
)
# Where an object of a class lies, as a path of keys; 0 is the first of a list, * any key.
BUNDLE_PLACES = {
    "Manifest": (),
    "TaskSpec": ("tasks", 0),
    "PreprocessSpec": ("preprocess",),
    "RouterSpec": ("router",),
    "PassSpec": ("passes", "first_pass"),
    "TensorSpec": ("passes", "first_pass", "inputs", 0),
    "StoredArray": ("matrices", 0, "u_t"),
    "MatrixBases": ("matrices", 0),
    "FileSpec": ("files", "weights.bin"),
    "OneTaskSpec": ("one_task",),
    "VectorTables": ("one_task", "tables"),
    "EngineSpec": ("engines", 0),
    "EngineKey": ("engines", 0, "key"),
}
ARTIFACT_PLACES = {
    "ArtifactInfo": (),
    "VisionSpec": ("vision",),
    "TaskInfo": ("tasks", 0),
    "MergeSettings": ("merge",),
    "RouterSettings": ("router",),
    "CalibrationInfo": ("calibration",),
    "Tap": ("calibration", "discriminant", 0),
}


def tables(text):
    """Heading -> key -> type, of the first table below each heading of the third level."""
    found = {}
    for section in re.split(r"^### ", text, flags=re.MULTILINE)[1:]:
        heading, _, body = section.partition("\n")
        table = re.search(
            r"^\|.*?(?=^(?!\|))", re.split(r"^## ", body, flags=re.MULTILINE)[0], re.DOTALL | re.MULTILINE
        )
        assert table is not None, heading
        found[heading.partition(":")[0]] = dict(
            re.findall(r"^\| `([^`]+)` \| ([^|]*) \|", table[0], re.MULTILINE)
        )
    return found


def keys_of(kind):
    return {field.name for field in dataclasses.fields(kind)}


BUNDLE_TABLES, ARTIFACT_TABLES = tables(BUNDLE), tables(ARTIFACT)


@pytest.mark.parametrize("kind", BUNDLE_CLASSES, ids=lambda kind: kind.__name__)
def test_the_keys_of_the_manifest_are_those_of_its_owner(kind):
    assert set(BUNDLE_TABLES[kind.__name__]) == keys_of(kind)


@pytest.mark.parametrize("kind", ARTIFACT_CLASSES, ids=lambda kind: kind.__name__)
def test_the_keys_of_the_header_are_those_of_its_owner(kind):
    assert set(ARTIFACT_TABLES[kind.__name__]) == keys_of(kind)


def test_no_table_describes_an_unknown_object():
    described = set(BUNDLE_TABLES) | set(ARTIFACT_TABLES)
    known = {kind.__name__ for kind in (*BUNDLE_CLASSES, *ARTIFACT_CLASSES)}
    assert described == known | {"Model", "Metadata", "Tensors"}


def test_every_dataclass_of_the_bundle_is_described():
    local = {
        value.__name__
        for module in (bundle, engine_spec)
        for value in vars(module).values()
        if dataclasses.is_dataclass(value)
    }
    assert local == {kind.__name__ for kind in BUNDLE_CLASSES}


def test_versions_names_and_limits_are_those_of_the_code():
    for text in (
        f"| `format` | text | `{bundle.FORMAT}` |",
        f"| `schema_version` | integer | {bundle.SCHEMA_VERSION} |",
        f"at most {bundle.MAX_MANIFEST_BYTES >> 20} MiB",
        f"opset {graph.OPSET}, IR version {graph.IR_VERSION}; at most {graph_files.MAX_GRAPH_BYTES >> 20} MiB",
        f"greater than {cores.RELATIVE_CUTOFF**2:.0e} of the largest".replace("e-0", "e-"),
        f"std(r) + {routing.STD_EPSILON:.0e}".replace("e-0", "e-"),
    ):
        assert text in BUNDLE
    for text in (
        f"| `format` | text | `{artifact_header.FORMAT}` |",
        f"| `schema_version` | text | `{artifact_header.SCHEMA_VERSION}` |",
    ):
        assert text in ARTIFACT
    stored = re.search(r"\| `dtype` \| (`int8`.*?) \|", BUNDLE)
    assert stored is not None
    assert tuple(re.findall(r"`(\w+)`", stored[1])) == bundle.STORED_DTYPES


@pytest.fixture
def merged(pico_files):
    return merge(load_recipe(pico_files(router={"layers": [0, 1], "mode": "top1"})), Progress(quiet=True))


@pytest.fixture
def manifest(merged, tmp_path):
    """A manifest with everything in it, as JSON."""
    write_artifact(tmp_path / "merged", merged)
    made = export_bundle(
        merged, tmp_path / "merged", tmp_path / "bundle", verify=False, progress=Progress(quiet=True)
    )
    data = json.loads((made / "manifest.json").read_text())
    data["files"]["first.engine"] = {"bytes": 1, "sha256": "0" * 64}
    key = {"graph_sha256": "0", "flavour": "tensorrt", "version": "10", "compute_capability": ["8.6"]}
    key |= {"precision": "fp16", "profiles": [{"B": [1, 8, 32]}], "options": []}
    data["engines"] = [{"pass_name": "first_pass", "file": "first.engine", "key": key}]
    manifest_from_json(json.dumps(data))
    return data


@pytest.fixture
def calibrated(merged):
    """An artifact with every tensor that there can be."""
    tap, width, tasks = router_spec.Tap, merged.info.vision.width, len(merged.info.tasks)
    info = router_spec.CalibrationInfo(
        level="task_images",
        images={"task0": 20},
        discriminant=(tap(0, "mlp"), tap(1, "mlp")),
        unknown=tap(1, "mlp"),
        unknown_threshold=1.0,
        router=merged.info.router,
        stops=(0,),
    )
    tensors = Calibration(
        offset=torch.zeros(2, tasks),
        scale=torch.ones(2, tasks),
        weight=torch.zeros(tasks, 2 * width),
        bias=torch.zeros(tasks),
        whiten=torch.eye(width),
        centres=torch.zeros(2, width),
        stop_weight=torch.zeros(1, tasks, 2 * width),
        stop_bias=torch.zeros(1, tasks),
        stop_whiten=torch.eye(width)[None],
        stop_centres=torch.zeros(1, 2, width),
        nothing=torch.zeros(3, width),
        stop_nothing=torch.zeros(1, 3, width),
    )
    return dataclasses.replace(
        merged, info=dataclasses.replace(merged.info, calibration=info), calibration=tensors
    )


def at(data, place):
    for key in place:
        data = data[key]
    return data


def keys_at(data, places):
    return [(name, key) for name, place in places.items() for key in at(data, place)]


def test_exactly_the_optional_keys_of_the_manifest_may_be_left_out(manifest):
    for name, key in keys_at(manifest, BUNDLE_PLACES):
        cut = copy.deepcopy(manifest)
        del at(cut, BUNDLE_PLACES[name])[key]
        optional = True
        try:
            manifest_from_json(json.dumps(cut))
        except BundleError:
            optional = False
        assert optional == BUNDLE_TABLES[name][key].endswith("optional"), (name, key)


def test_the_description_of_the_model_is_complete(manifest):
    assert set(BUNDLE_TABLES["Model"]) == set(manifest["model"])


def test_inputs_and_outputs_of_the_graphs_are_those_in_the_table(manifest):
    rows = re.findall(r"^\| (first|second) \| (->)? ?`([^`]+)` \| \[([^]]+)\] (\w+) \|", BUNDLE, re.MULTILINE)
    documented = {
        (name, kind, what.replace("<parameter>", "proj")): (shape.replace("\\", ""), dtype)
        for name, kind, what, shape, dtype in rows
    }
    tasks = len(manifest["tasks"])
    letters = {"T": tasks, "H": 16, "W": 16, "sum C": manifest["tasks"][-1]["stop"]}
    rank = next(m for m in manifest["matrices"] if m["name"] == "proj")["s"]["shape"][1]
    found = set()
    for (name, kind, what), (shape, dtype) in documented.items():
        tensors = manifest["passes"][f"{name}_pass"]["outputs" if kind else "inputs"]
        (tensor,) = [t for t in tensors if t["name"] == what]
        sizes = [letters.get(size, size) for size in shape.replace("K*R", f"K*{rank}").split(", ")]
        assert [str(size) for size in tensor["shape"]] == [str(size) for size in sizes]
        assert tensor["dtype"] == dtype
        found.add((name, what))
    graphs = manifest["passes"].items()
    all_names = {
        (name.removesuffix("_pass"), t["name"]) for name, p in graphs for t in (*p["inputs"], *p["outputs"])
    }
    of_cores = {key for key in all_names if key[1].startswith("cores.")}
    assert found == (all_names - of_cores) | {("second", "cores.proj")}


def test_exactly_the_optional_keys_of_the_header_may_be_left_out(calibrated):
    metadata = artifact_header.metadata_from_info(calibrated.info)
    for name, key in keys_at(json.loads(metadata["info"]), ARTIFACT_PLACES):
        cut = json.loads(metadata["info"])
        del at(cut, ARTIFACT_PLACES[name])[key]
        optional = True
        try:
            artifact_header.info_from_metadata(metadata | {"info": json.dumps(cut)}, "file")
        except (ArtifactError, TypeError):
            optional = False
        assert optional == ARTIFACT_TABLES[name][key].endswith("optional"), (name, key)


def test_every_tensor_and_every_metadata_key_of_a_file_is_named(calibrated, pico_files, tmp_path):
    patterns = {
        text: re.compile(re.escape(text).replace("<task>", "task[0-9]").replace("<parameter>", "[a-z_0-9.]+"))
        for text in ARTIFACT_TABLES["Tensors"]
    }
    whole = merge(load_recipe(pico_files(base_merge="tsvm")), Progress(quiet=True))
    seen, keys = set(), set()
    for number, (made, storage) in enumerate(
        [
            (calibrated, Storage()),
            (whole, Storage()),
            (whole, Storage("int8", "low_rank")),
            (whole, Storage("float16")),
        ]
    ):
        file = tmp_path / f"{number}.safetensors"
        write_artifact(file, dataclasses.replace(made, storage=storage))
        with safe_open(file, framework="pt") as opened:
            keys |= set(opened.metadata())
            for name in opened.keys():  # noqa: SIM118
                # The most specific description is the longest that fits.
                fitting = [text for text, pattern in patterns.items() if pattern.fullmatch(name)]
                assert fitting, name
                seen.add(max(fitting, key=len))
    assert seen == set(patterns)
    assert keys == set(ARTIFACT_TABLES["Metadata"])


def test_the_optional_tensors_of_a_calibration_are_those_of_the_code():
    named = {name.partition(".")[2] for name in ARTIFACT_TABLES["Tensors"] if name.startswith("calibration.")}
    assert named == {"offset", "scale", *artifact.CALIBRATION_OPTIONAL}
