"""`mass doctor`: known ways in which a merge fails, looked for in an artifact or a bundle and in how it routes images.

`json_from_diagnosis` is a `Diagnosis` as one JSON object, field by field; names keep their meaning while
`schema_version` stays.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

from mass_export.diagnosis_report import FORMAT, SCHEMA_VERSION, Diagnosis, Finding
from mass_export.diagnosis_routing import ROUTING_CHECKS, Routes, routes_of_images
from mass_export.diagnosis_weights import WEIGHT_CHECKS
from mass_export.errors import ArtifactError, DataError
from mass_export.inspection_sources import Source, source_from_artifact, source_from_bundle
from mass_export.progress import Progress
from runtime.errors import BackendError, BundleError
from runtime.integrity import check_bundle, extra_files
from runtime.manifest import read_manifest


def diagnose(
    path: Path,
    progress: Progress,
    *,
    data: Path | None = None,
    split: str = "val",
    images: Path | None = None,
) -> Diagnosis:
    """Look for every known signature.

    Args:
        path: an artifact (a file) or a bundle (a directory).
        progress: where to show it.
        data: labelled images of every task, to see how they are routed; see `mass_export.datasets`.
        split: which of them.
        images: instead of these, unlabelled images: a folder or an array file.

    Raises:
        ArtifactError: no such path, or no sound artifact.
        BundleError: no bundle. One whose files are damaged is a finding.
        DataError: the images cannot be read.
    """
    if data is not None and images is not None:
        raise DataError("doctor: give --data or --images, not both.")
    if not path.exists():
        raise ArtifactError(f"{path}: no such file or directory; give an artifact or a bundle.")
    kind = "bundle" if path.is_dir() else "artifact"
    report = Diagnosis(FORMAT, SCHEMA_VERSION, kind, str(path))
    if kind == "bundle":
        damage = _file_findings(path)
        report = report.with_check("files", damage)
        if any(finding.severity == "problem" for finding in damage):
            return report  # nothing more can be trusted
    source = source_from_bundle(path) if kind == "bundle" else source_from_artifact(path)
    report = dataclasses.replace(report, tasks=tuple(source.classes))
    for name, find in progress.track(tuple(WEIGHT_CHECKS.items()), "Examining weights"):
        report = report.with_check(name, find(source))
    if data is None and images is None:
        return report
    return _with_routing(
        report, path, lambda bundle: routes_of_images(bundle, data, split, images, progress), source
    )


def json_from_diagnosis(diagnosis: Diagnosis) -> str:
    """One JSON object."""
    return json.dumps(dataclasses.asdict(diagnosis), indent=1, ensure_ascii=False, allow_nan=False)


def _with_routing(report: Diagnosis, path: Path, run: Callable[[Path], Routes], source: Source) -> Diagnosis:
    try:
        if report.kind == "bundle":
            routes = run(path)
        else:
            with tempfile.TemporaryDirectory() as scratch:
                routes = run(_bundle_of(path, Path(scratch)))
    except BackendError as error:
        broken = Finding(
            "runs",
            "problem",
            (),
            str(error),
            "Merge from checkpoints that are sound by themselves; in fp16 or int8, try fp32.",
        )
        return report.with_check("runs", [broken])
    report = dataclasses.replace(report, images=len(routes.winner)).with_check("runs", [])
    for name, find in ROUTING_CHECKS.items():
        report = report.with_check(name, find(routes, source))
    return report


def _bundle_of(artifact: Path, directory: Path) -> Path:
    from mass_export.artifact import read_artifact  # noqa: PLC0415 - torch, which bundles do not need
    from mass_export.onnx_export import write_bundle  # noqa: PLC0415

    write_bundle(read_artifact(artifact), artifact, directory, Progress(quiet=True))
    return directory


def _file_findings(bundle: Path) -> list[Finding]:
    manifest = read_manifest(bundle)
    try:
        check_bundle(bundle, manifest)
    except BundleError as error:
        return [Finding("files", "problem", (), str(error), "Copy the bundle again, or export it again.")]
    extra = extra_files(bundle, manifest)
    if not extra:
        return []
    seen = f"Beside the bundle's own files there are {', '.join(extra)}; nothing reads them."
    return [Finding("files", "note", tuple(extra), seen, "Remove them, or find out who put them there.")]
