"""`ArtifactInfo` <-> the JSON text in an artifact's header."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection
from typing import Any

from mass_export.checks import checked_mapping, is_int, is_real, require
from mass_export.errors import ArtifactError, ModelConfigError, RecipeError
from mass_export.model_config import preprocess_spec_from_config
from mass_export.router_spec import CalibrationInfo, RouterSettings
from mass_export.spec import ArtifactInfo, MergeSettings, TaskInfo, VisionSpec
from runtime.bundle import PreprocessSpec

FORMAT = "mass-artifact"
SCHEMA_VERSION = 1
BUNDLE_ALONE = ("dtype",)  # what only a bundle's preprocessing says: what its graphs take


def metadata_from_info(info: ArtifactInfo) -> dict[str, str]:
    """The header's metadata: format, schema version and the settings as JSON."""
    header = dataclasses.asdict(info)
    for name in BUNDLE_ALONE:
        del header["preprocess"][name]
    text = json.dumps(header, ensure_ascii=False, allow_nan=False)
    return {"format": FORMAT, "schema_version": str(SCHEMA_VERSION), "info": text}


def info_from_metadata(metadata: dict[str, str] | None, where: str) -> ArtifactInfo:
    """Parse and check the header of the file `where`.

    Raises:
        ArtifactError: the file is not an artifact, of another schema version, or its settings are invalid.
    """
    if not metadata or metadata.get("format") != FORMAT:
        raise ArtifactError(
            f"{where}: safetensors, but not a MASS artifact; give the file that mass merge wrote."
        )
    version = metadata.get("schema_version", "")
    if version != str(SCHEMA_VERSION):
        newer = version.isdecimal() and int(version) > SCHEMA_VERSION
        advice = "install a newer mass-export" if newer else "merge again with this version"
        raise ArtifactError(
            f"{where}: schema version {version!r}, this version reads {SCHEMA_VERSION}; {advice}."
        )
    try:
        return _info_from_json(json.loads(metadata.get("info", "")))
    except (RecipeError, ModelConfigError) as error:
        raise ArtifactError(f"{where}: invalid header: {error}") from error
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{where}: invalid header: not JSON ({error}).") from error


def _info_from_json(data: object) -> ArtifactInfo:
    fields = [field.name for field in dataclasses.fields(ArtifactInfo)]
    required = [name for name in fields if name != "calibration"]
    header = checked_mapping(data, fields, "info", required=required)
    tasks = [
        checked_mapping(task, ("name", "classes"), "tasks", required=("name", "classes"))
        for task in _list(header["tasks"], "tasks")
    ]
    for task in tasks:
        classes = _list(task["classes"], "classes")
        require(all(isinstance(name, str) for name in classes), f"classes: expected text, got {classes!r}.")
    ratios, ranks = _list(header["rank_ratios"], "rank_ratios"), _list(header["ranks"], "ranks")
    require(all(value is None or is_real(value) for value in ratios), f"rank_ratios: got {ratios!r}.")
    require(all(value is None or is_int(value) for value in ranks), f"ranks: got {ranks!r}.")
    return ArtifactInfo(
        vision=_vision(header["vision"]),
        preprocess=_preprocess(header["preprocess"]),
        tasks=tuple(TaskInfo(task["name"], tuple(task["classes"])) for task in tasks),
        merge=MergeSettings(**_fields(header["merge"], MergeSettings, "merge")),
        router=RouterSettings(**_fields(header["router"], RouterSettings, "router")),
        rank_ratios=tuple(ratios),
        provenance=_object(header["provenance"], "provenance"),
        ranks=tuple(ranks),
        model_config=_object(header["model_config"], "model_config"),
        calibration=_calibration(header.get("calibration")),
    )


def _calibration(data: object) -> CalibrationInfo | None:
    if data is None:
        return None
    # Artifacts of earlier versions know less.
    later = ("router", "unknown", "unknown_threshold", "stops", "stop_margin", "confidence_scale")
    return CalibrationInfo(**_fields(data, CalibrationInfo, "calibration", optional=later))


def _vision(data: object) -> VisionSpec:
    return VisionSpec.from_json(_fields(data, VisionSpec, "vision"))


def _preprocess(data: object) -> PreprocessSpec:
    fields = _fields(data, PreprocessSpec, "preprocess", without=BUNDLE_ALONE)
    size = _list(fields.pop("image_size"), "preprocess.image_size")
    require(
        len(size) == 2 and all(is_int(n) and n >= 1 for n in size), f"preprocess.image_size: got {size!r}."
    )
    return preprocess_spec_from_config(fields, (size[0], size[1]), "preprocess")


def _fields(
    data: object, kind: type, key: str, optional: Collection[str] = (), without: Collection[str] = ()
) -> dict[str, Any]:
    names = [field.name for field in dataclasses.fields(kind) if field.name not in without]
    mapping = checked_mapping(data, names, key)
    missing = [name for name in names if name not in mapping and name not in optional]
    require(not missing, f"{key}: missing key(s) {', '.join(missing)}.")
    return mapping


def _list(value: object, key: str) -> list[Any]:
    if not isinstance(value, list):
        raise RecipeError(f"{key}: expected a list, got {value!r}.")
    return value


def _object(value: object, key: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RecipeError(f"{key}: expected an object, got {value!r}.")
    return value
