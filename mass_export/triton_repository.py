"""A bundle as a model repository of NVIDIA Triton: an ensemble of first pass, routing, second pass and naming.

The graphs run in Triton's ONNX Runtime backend, the two steps between them (`runtime.serving.triton`) in its Python
backend, which needs `pip install mass-export` in Triton's image. Clients send `pixel_values`, as
`runtime.preprocess.pixel_values_from_images` makes them.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from mass_export.errors import ExportError
from runtime.bundle import FIRST_PASS, MANIFEST_FILE, SECOND_PASS, Manifest, PassSpec
from runtime.manifest import read_manifest
from runtime.serving.triton import slots_per_sample

ENSEMBLE = "mass"
MAX_BATCH = 32
_TYPES = {"float32": "TYPE_FP32", "int64": "TYPE_INT64", "bytes": "TYPE_STRING", "bool": "TYPE_BOOL"}
_PYTHON = '''"""{text}"""

from pathlib import Path

import triton_python_backend_utils as pb_utils

from runtime.serving.triton import {step}


class TritonPythonModel:
    def initialize(self, args):
        self.step = {step}(Path(args["model_repository"]) / args["model_version"] / "bundle")

    def execute(self, requests):
        return [self.respond(request) for request in requests]

    def respond(self, request):
        inputs = [pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in {inputs}]
        try:
            outputs = self.step(*inputs)
        except Exception as error:
            return pb_utils.InferenceResponse([], pb_utils.TritonError(str(error)))
        return pb_utils.InferenceResponse([pb_utils.Tensor(name, array) for name, array in outputs.items()])
'''

Tensor = tuple[str, str, list[int]]
_SCALARS = frozenset(
    {"unknown"}
)  # [B] in the graph; in an ensemble a tensor has a dimension beside the batch's


def write_triton_repository(bundle: Path, repository: Path) -> Path:
    """Write the repository; nothing is left behind if that fails.

    Args:
        bundle: what `mass export` wrote.
        repository: directory to make; an empty one may be there.

    Raises:
        ExportError: the repository is not empty, or the bundle's router verifies routes, which an ensemble cannot.
        BundleError: no bundle.
    """
    manifest = read_manifest(bundle)
    if manifest.router.verify_margin > 0:
        raise ExportError(
            f"{bundle}: its router verifies unsure routes (verify_margin {manifest.router.verify_margin:g}) with a "
            "second pass each, which an ensemble cannot; merge with verify_margin 0, or use `mass serve`."
        )
    kinds = {t.dtype for spec in manifest.passes.values() for t in (*spec.inputs, *spec.outputs)}
    if manifest.preprocess.dtype == "uint8":
        raise ExportError(f"{bundle}: takes bytes; Triton's ensemble needs it exported with --input float32.")
    if not kinds <= set(_TYPES):
        raise ExportError(
            f"{bundle}: tensors of {', '.join(sorted(kinds))}; export it with --precision fp32."
        )
    if repository.exists() and (not repository.is_dir() or any(repository.iterdir())):
        raise ExportError(f"{repository}: expected an empty or a new directory.")
    repository.parent.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(prefix=f".{repository.name}-", dir=repository.parent))
    try:
        _write(manifest, bundle, staged)
        if repository.exists():
            repository.rmdir()
        staged.rename(repository)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise
    return repository


def _write(manifest: Manifest, bundle: Path, out: Path) -> None:
    width = slots_per_sample(manifest)
    tasks, classes = len(manifest.tasks), manifest.tasks[-1].stop
    pixel_values: Tensor = ("pixel_values", "float32", [3, *manifest.preprocess.image_size])
    residuals: Tensor = ("residuals", "float32", [tasks])
    gates: Tensor = ("gates", "float32", [tasks])
    logits: Tensor = ("logits", "float32", [classes])
    routed: list[Tensor] = [("slots", "int64", [width]), ("weights", "float32", [width])]
    if manifest.compose == "tsvm":
        sides = [(matrix.core, width * matrix.s.shape[1]) for matrix in manifest.matrices]
        routed += [(name, "float32", [side, side]) for name, side in sides]
    named: list[Tensor] = [("task", "bytes", [1]), ("label", "bytes", [1]), ("score", "float32", [1])]
    seen: list[Tensor] = [residuals]  # by the first pass
    if any(tensor.name == "unknown" for tensor in manifest.passes[FIRST_PASS].outputs):
        seen.append(("unknown", "float32", [1]))
        if manifest.router.unknown_threshold is not None:
            named.append(("is_unknown", "bool", [1]))
    judged: list[Tensor] = [residuals, logits, *seen[1:]]

    _model(out, "first_pass", "onnxruntime", [pixel_values], seen)
    _graph(manifest.passes[FIRST_PASS], manifest, bundle, out / f"{ENSEMBLE}_first_pass/1")
    _model(out, "routing", "python", [residuals], [gates, *routed])
    _python(manifest, bundle, out / f"{ENSEMBLE}_routing/1", "Routing", ["residuals"], "Routes become sets.")
    _model(out, "second_pass", "onnxruntime", [pixel_values, *routed], [logits])
    _graph(manifest.passes[SECOND_PASS], manifest, bundle, out / f"{ENSEMBLE}_second_pass/1")
    _model(out, "answer", "python", judged, named)
    _python(
        manifest,
        bundle,
        out / f"{ENSEMBLE}_answer/1",
        "Answers",
        [name for name, *_ in judged],
        "Names of the answers.",
    )

    steps = [
        _step("first_pass", [pixel_values], seen),
        _step("routing", [residuals], [gates, *routed]),
        _step("second_pass", [pixel_values, *routed], [logits]),
        _step("answer", judged, named),
    ]
    ensemble = _config(ENSEMBLE, 'platform: "ensemble"', [pixel_values], [*named, gates, *seen])
    scheduling = "ensemble_scheduling {\n  step [\n" + ",\n".join(steps) + "\n  ]\n}\n"
    (out / ENSEMBLE / "1").mkdir(parents=True)
    (out / ENSEMBLE / "1" / "README").write_text("An ensemble has no file of its own.\n")
    (out / ENSEMBLE / "config.pbtxt").write_text(ensemble + scheduling)


def _model(out: Path, name: str, backend: str, inputs: list[Tensor], outputs: list[Tensor]) -> None:
    directory = out / f"{ENSEMBLE}_{name}"
    (directory / "1").mkdir(parents=True)
    batching = "dynamic_batching { }\n" if backend == "onnxruntime" else ""
    text = _config(f"{ENSEMBLE}_{name}", f'backend: "{backend}"', inputs, outputs) + batching
    (directory / "config.pbtxt").write_text(text)


def _graph(spec: PassSpec, manifest: Manifest, bundle: Path, version: Path) -> None:
    """The graph, and the files beside it that hold its weights."""
    for name in _stored_files(manifest):
        _link(bundle / name, version / name)
    _link(bundle / spec.file, version / "model.onnx")


def _stored_files(manifest: Manifest) -> list[str]:
    """Those that hold numbers, for graphs and bases."""
    engines = {engine.file for engine in manifest.engines}
    return sorted(name for name in manifest.files if not name.endswith(".onnx") and name not in engines)


def _python(manifest: Manifest, bundle: Path, version: Path, step: str, inputs: list[str], text: str) -> None:
    (version / "bundle").mkdir()
    _link(bundle / MANIFEST_FILE, version / "bundle" / MANIFEST_FILE)
    if step == "Routing":  # it reads the bases
        for name in _stored_files(manifest):
            _link(bundle / name, version / "bundle" / name)
    (version / "model.py").write_text(_PYTHON.format(text=text, step=step, inputs=inputs))


def _link(source: Path, target: Path) -> None:
    """A second name for the same file where that is possible: the weights are needed in several places."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _config(name: str, kind: str, inputs: list[Tensor], outputs: list[Tensor]) -> str:
    reshaped = _SCALARS if "onnxruntime" in kind else frozenset()
    listed = [
        f"{key} [\n{_tensors(tensors, reshaped)}\n]\n"
        for key, tensors in (("input", inputs), ("output", outputs))
    ]
    return f'name: "{name}"\n{kind}\nmax_batch_size: {MAX_BATCH}\n' + "".join(listed)


def _tensors(tensors: list[Tensor], reshaped: frozenset[str]) -> str:
    rows = []
    for name, kind, shape in tensors:
        reshape = " reshape { shape: [] }" if name in reshaped else ""
        rows.append(f'  {{ name: "{name}" data_type: {_TYPES[kind]} dims: {shape}{reshape} }}')
    return ",\n".join(rows)


def _step(name: str, inputs: list[Tensor], outputs: list[Tensor]) -> str:
    maps = [f'      input_map {{ key: "{t[0]}" value: "{t[0]}" }}' for t in inputs]
    maps += [f'      output_map {{ key: "{t[0]}" value: "{t[0]}" }}' for t in outputs]
    lines = "\n".join(maps)
    return f'    {{\n      model_name: "{ENSEMBLE}_{name}"\n      model_version: -1\n{lines}\n    }}'
