"""`manifest.json`: read and written."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from runtime.bundle import FORMAT, MANIFEST_FILE, MAX_MANIFEST_BYTES, SCHEMA_VERSION, Manifest
from runtime.errors import BundleError
from runtime.manifest_checks import check_manifest
from runtime.typed_json import typed_dataclass


def json_from_manifest(manifest: Manifest) -> str:
    """Serialise, with a stable layout."""
    return json.dumps(dataclasses.asdict(manifest), indent=1, ensure_ascii=False) + "\n"


def manifest_from_json(text: str, where: str = MANIFEST_FILE) -> Manifest:
    """Parse and validate.

    Raises:
        BundleError: not JSON, another format or schema version, a missing, unknown or ill-typed key.
    """
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{where}: not valid JSON ({error}); export the bundle again.") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise BundleError(f'{where}: not a {FORMAT} manifest (its "format" key must be "{FORMAT}").')
    version = data.get("schema_version")
    if version != SCHEMA_VERSION:
        newer = isinstance(version, int) and version > SCHEMA_VERSION
        advice = "install a newer mass-export" if newer else "export the bundle again with this version"
        raise BundleError(
            f"{where}: schema version {version!r}, this runtime reads {SCHEMA_VERSION}; {advice}."
        )
    manifest = typed_dataclass(Manifest, data, where)
    check_manifest(manifest, where)
    return manifest


def read_manifest(directory: Path) -> Manifest:
    """Read `manifest.json` of a bundle directory.

    Raises:
        BundleError: no such directory or file, or an invalid manifest.
    """
    path = directory / MANIFEST_FILE
    try:
        if not directory.is_dir() or not path.is_file():
            raise BundleError(
                f"{directory}: not a bundle (no {MANIFEST_FILE}); give the directory that mass-export wrote."
            )
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise BundleError(f"{path}: larger than {MAX_MANIFEST_BYTES} bytes; not a manifest.")
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BundleError(f"{path}: not UTF-8 text; export the bundle again.") from error
    except OSError as error:
        raise BundleError(f"{path}: cannot be read ({error.strerror}).") from error
    return manifest_from_json(text, str(path))
