"""Artifact -> bundle: two ONNX graphs, one weights file, a manifest; written aside, then put in place."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from pathlib import Path

import onnx_ir as ir

import mass_export
from mass_export.artifact import Artifact
from mass_export.bundle_int8 import convert_bundle_int8, round_first_pass
from mass_export.bundle_precision import convert_bundle, require_graph_precision
from mass_export.engine_bundle import build_engines
from mass_export.errors import ExportError
from mass_export.first_pass import add_first_pass
from mass_export.graph import Graph
from mass_export.image_input import add_image_input
from mass_export.one_task import write_one_task
from mass_export.progress import Progress
from mass_export.second_pass import (
    CONV1,
    AdaptiveLayers,
    add_second_pass,
    all_factors,
    core_name,
    store_vectors,
)
from mass_export.spec import ArtifactInfo
from mass_export.stacked_bases import StackedBases, store_bases
from mass_export.staging import replace_directory, staging
from mass_export.verify import verify_bundle
from mass_export.vit_graph import Layers
from mass_export.weights_file import WeightsFile
from runtime.bundle import (
    FIRST_PASS,
    FORMAT,
    MANIFEST_FILE,
    SCHEMA_VERSION,
    SECOND_PASS,
    ImageDtype,
    Manifest,
    OneTaskSpec,
    PassSpec,
    PreprocessSpec,
    RouterSpec,
    TaskSpec,
    VectorTables,
)
from runtime.checksums import file_specs, sha256_of_file
from runtime.engine_settings import EngineSettings
from runtime.engine_spec import Precision
from runtime.manifest import json_from_manifest

WEIGHTS_FILE = "weights.bin"
# Make the scores of many blocks and the heads probabilities on validation images of the zoo; elsewhere they only rank.
CONFIDENCE_SCALES = {"length": 0.33, "tasks": 1.25, "none": 1.0}


def export_bundle(
    artifact: Artifact,
    artifact_path: Path,
    out: Path,
    *,
    verify: bool,
    progress: Progress,
    precision: Precision = "fp32",
    engines: EngineSettings | None = None,
    precise_router: bool = False,
    router_precision: Precision | None = None,
    image_dtype: ImageDtype = "float32",
) -> Path:
    """Write a bundle directory.

    Everything is written to a temporary directory beside `out`, verified there, and then takes its name in one step;
    a kill or a full disk leaves what was there. Of several exports to one place at a time, the last one stays.

    Args:
        artifact: what to export.
        artifact_path: its file, for the provenance in the manifest.
        out: bundle directory; may exist if it is empty or a bundle.
        verify: run the bundle against the eager model first.
        progress: where to show it.
        precision: of the graphs, `fp32`, `fp16` or `int8`.
        engines: also build TensorRT engines, so.
        precise_router: with int8, see `convert_bundle_int8`.
        router_precision: `int8` for a first pass in eight bits before a second in fp32; None is `precision`.
        image_dtype: `float32` for graphs that take normalised images, `uint8` for graphs that take their bytes.

    Raises:
        EngineError: TensorRT is missing or refuses.
        ExportError: `out` is something else than a bundle, or cannot be written.
        VerificationError: the graphs do not reproduce the eager model.
    """
    out = out.absolute()
    _check_replaceable(out)
    require_graph_precision(precision)
    _require_router_precision(router_precision, precision, engines)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with staging(out) as scratch:
            staged = _stage(
                artifact,
                artifact_path,
                scratch,
                precision,
                progress,
                precise_router=precise_router,
                router_precision=router_precision,
                image_dtype=image_dtype,
            )
            if verify:
                verify_bundle(artifact, staged, progress=progress)
            if engines is not None:
                build_engines(staged, engines, progress=progress)
            _check_replaceable(out)
            replace_directory(staged, out)
    except OSError as error:
        raise ExportError(
            f"{out}: cannot be written ({error.strerror or error}); what was there is unchanged. Make room or choose "
            "another --out."
        ) from error
    return out


def _stage(
    artifact: Artifact,
    artifact_path: Path,
    scratch: Path,
    precision: Precision,
    progress: Progress,
    *,
    precise_router: bool,
    router_precision: Precision | None,
    image_dtype: ImageDtype,
) -> Path:
    """Write the bundle below `scratch`, in its precision."""
    staged = scratch / "fp32"
    staged.mkdir()
    manifest = write_bundle(
        artifact, artifact_path, staged, progress, image_dtype, router_precision=router_precision
    )
    if precision == "fp32":
        return staged
    converted = scratch / precision
    converted.mkdir()
    if precision == "int8":
        convert_bundle_int8(staged, manifest, converted, precise_router=precise_router)
    else:
        convert_bundle(staged, manifest, converted, precision)
    shutil.rmtree(staged)
    return converted


def write_bundle(
    artifact: Artifact,
    artifact_path: Path,
    directory: Path,
    progress: Progress,
    image_dtype: ImageDtype = "float32",
    *,
    router_precision: Precision | None = None,
) -> Manifest:
    """Write graphs, weights and manifest into an empty directory."""
    preprocess = dataclasses.replace(artifact.info.preprocess, dtype=image_dtype)
    routes = not artifact.merged and router_precision is None
    with WeightsFile(directory / WEIGHTS_FILE) as weights:
        if router_precision is None:
            first = _write_first_pass(artifact, weights, directory, preprocess)
        else:
            first = _write_rounded_first_pass(artifact, directory, preprocess)
        factors = all_factors(artifact)
        cores = {name: core_name(name) for name in factors}
        bases = store_bases(weights, factors, cores, artifact.info.vision.width, progress)
        tables = None
        if artifact.info.merge.vectors == "mean":
            tables = store_vectors(
                weights,
                artifact.info.vision,
                artifact.base,
                artifact.tasks,
                with_base=routes,
                conv1_bases=bases.matrices.get(CONV1),
            )
        second = _write_second_pass(artifact, weights, directory, bases, tables, preprocess)
        one_task = write_one_task(artifact, weights, directory, bases, tables, preprocess, routes=routes)
    passes = {FIRST_PASS: first, SECOND_PASS: second}
    manifest = _manifest(artifact, artifact_path, passes, bases, one_task, directory, preprocess)
    manifest = dataclasses.replace(manifest, router_precision=router_precision)
    (directory / MANIFEST_FILE).write_text(json_from_manifest(manifest), encoding="utf-8")
    return manifest


def _write_first_pass(
    artifact: Artifact, weights: WeightsFile, directory: Path, preprocess: PreprocessSpec
) -> PassSpec:
    graph = Graph(FIRST_PASS, weights)
    pixel_values = add_image_input(graph, preprocess)
    shares_base = not artifact.merged
    params, prefix = (artifact.base, "base.") if shares_base else (artifact.merged, "merged.")
    layers = Layers(graph, artifact.info.vision, params, prefix)
    residuals, unknown = add_first_pass(layers, artifact, pixel_values)
    outputs: dict[str, tuple[ir.Value, list[int | str]]] = {
        "residuals": (residuals, ["B", len(artifact.tasks)])
    }
    if unknown is not None:
        outputs["unknown"] = (unknown, ["B"])
    return graph.save(directory / f"{FIRST_PASS}.onnx", outputs, mass_export.__version__)


def _write_rounded_first_pass(artifact: Artifact, directory: Path, preprocess: PreprocessSpec) -> PassSpec:
    """In eight bits; the fp32 weights that it is rounded from do not come into the bundle."""
    with tempfile.TemporaryDirectory(dir=directory.parent) as name:
        scratch = Path(name)
        with WeightsFile(scratch / WEIGHTS_FILE) as weights:
            spec = _write_first_pass(artifact, weights, scratch, preprocess)
        return round_first_pass(scratch / spec.file, spec, directory)


def _write_second_pass(
    artifact: Artifact,
    weights: WeightsFile,
    directory: Path,
    bases: StackedBases,
    tables: VectorTables | None,
    preprocess: PreprocessSpec,
) -> PassSpec:
    graph = Graph(SECOND_PASS, weights)
    pixel_values = add_image_input(graph, preprocess)
    layers = AdaptiveLayers(graph, artifact.info.vision, artifact.base, artifact.info.merge, bases, tables)
    logits = add_second_pass(layers, artifact.heads, pixel_values)
    classes = sum(len(task.classes) for task in artifact.info.tasks)
    shape: list[int | str] = ["B", classes]
    return graph.save(directory / f"{SECOND_PASS}.onnx", {"logits": (logits, shape)}, mass_export.__version__)


def _manifest(
    artifact: Artifact,
    artifact_path: Path,
    passes: dict[str, PassSpec],
    bases: StackedBases,
    one_task: OneTaskSpec,
    directory: Path,
    preprocess: PreprocessSpec,
) -> Manifest:
    info = artifact.info
    tasks, start = [], 0
    for task in info.tasks:
        tasks.append(TaskSpec(task.name, task.classes, start, start + len(task.classes)))
        start += len(task.classes)
    router = info.router
    return Manifest(
        format=FORMAT,
        schema_version=SCHEMA_VERSION,
        producer=f"mass-export {mass_export.__version__}",
        model=dataclasses.asdict(info.vision)
        | {"first_pass": info.merge.base_merge, "vectors": info.merge.vectors},
        preprocess=preprocess,
        tasks=tuple(tasks),
        router=RouterSpec(
            mode=router.mode,
            threshold=router.threshold,
            temperature=router.temperature,
            max_tasks=router.max_tasks,
            head_choice=info.merge.head_choice,
            sum_weights=info.merge.sum_weights,
            verify_margin=router.verify_margin,
            verify_budget=router.verify_budget,
            verify_prior=router.verify_prior,
            unknown_threshold=None if info.calibration is None else info.calibration.unknown_threshold,
            confidence_scale=_confidence_scale(info),
            layers=tuple(sorted({tap.layer for tap in info.taps()})),
            site=router.site,
            token=router.token,
            norm=router.norm,
        ),
        compose=info.merge.compose,
        passes=passes,
        matrices=tuple(matrix for name, matrix in bases.matrices.items() if name != CONV1),
        one_task=one_task,
        files=file_specs(directory),
        provenance={
            "artifact": {"file": artifact_path.name, "sha256": sha256_of_file(artifact_path)},
            **info.provenance,
        },
    )


def _confidence_scale(info: ArtifactInfo) -> float:
    """Of the images that taught the router, else one that suits z-scores over the tasks."""
    if info.calibration is not None and info.calibration.confidence_scale is not None:
        return info.calibration.confidence_scale
    return CONFIDENCE_SCALES[info.router.standardize]


def _require_router_precision(
    router: Precision | None, precision: Precision, engines: EngineSettings | None
) -> None:
    if router is not None and (router != "int8" or precision != "fp32" or engines is not None):
        raise ExportError(
            f"router_precision: expected int8, with --precision fp32 and --backend onnx, got {router} with {precision}"
            f"{'' if engines is None else ' and engines'}; int8 alone is for both passes, and engines set their own."
        )


def _check_replaceable(out: Path) -> None:
    if not out.exists():
        return
    if not out.is_dir() or (any(out.iterdir()) and not (out / MANIFEST_FILE).is_file()):
        raise ExportError(f"{out}: exists and is not a bundle; choose another --out or remove it yourself.")
