"""Kill exports over an existing bundle, run several at once, fill the disk: does the bundle answer each time?

    python scripts/crash_test.py --kills 200 --full-disks 20

Real exports and merges' writes run in forked processes and are ended by SIGKILL: at random times, and before every
file operation (Python's audit events). After each kill the bundle is loaded with full verification and classifies
images; its logits must be those of the old or of the new bundle. The same is done with an artifact's file.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mass_export.artifact import Artifact, read_artifact, write_artifact
from mass_export.errors import ExportError
from mass_export.heads import Head
from mass_export.merge import merge
from mass_export.onnx_export import export_bundle
from mass_export.progress import Progress
from mass_export.recipe import load_recipe
from runtime import Classifier

QUIET = Progress(quiet=True)
FILE_EVENTS = ("open", "os.", "shutil.", "tempfile.", "ctypes.dlsym")


def in_child(work: Callable[[], Any]) -> Any:
    """What `work` returns in a forked process; its exception as text."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(reading)
        try:
            result = work()
        except BaseException as error:  # noqa: BLE001 - the parent wants to know
            result = f"{type(error).__name__}: {error}"
        with os.fdopen(writing, "wb") as pipe:
            pickle.dump(result, pipe)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        data = pipe.read()
    os.waitpid(pid, 0)
    return pickle.loads(data) if data else None  # noqa: S301 - our own child wrote it


def killed(work: Callable[[], Any], *, after_s: float | None = None, before_event: int | None = None) -> bool:
    """Run `work` in a child that is killed after a time, or before its n-th file operation; whether it was."""
    pid = os.fork()
    if not pid:
        if before_event is not None:
            kill_before(before_event)
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - nothing but the kill may end it
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            os._exit(1)
        os._exit(0)
    if after_s is not None:
        time.sleep(after_s)
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise SystemExit("a writer failed before it was killed")
    return os.WIFSIGNALED(status)


def kill_before(number: int) -> None:
    """Kill this process before its n-th file operation from here."""
    left = number

    def hook(event: str, _: object) -> None:
        nonlocal left
        if event.startswith(FILE_EVENTS):
            left -= 1
            if left == -1:  # the kill is an event, too
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


@dataclasses.dataclass
class Target:
    """Something that can be written as `old` or `new` to one place, and tells which it is."""

    name: str
    write: Callable[[str], Any]
    read: Callable[[], str]
    seen: Counter[str] = dataclasses.field(default_factory=Counter)

    def check(self) -> str:
        """Which one is there; anything but `old` or `new` ends the test."""
        found = self.read()
        if found not in ("old", "new"):
            raise SystemExit(f"{self.name}: neither the old nor the new one: {found}")
        self.seen[found] += 1
        return found

    def other(self) -> str:
        """The one that is not there."""
        return "new" if self.read() == "old" else "old"


def kill_randomly(target: Target, kills: int, rng: np.random.Generator) -> int:
    """Kill at times drawn evenly over (a little more than) the time of a whole write; how often it was in time."""
    start = time.perf_counter()
    in_child(lambda: target.write("old"))
    duration_s = time.perf_counter() - start
    done = 0
    for _ in range(kills):
        version = target.other()
        done += killed(lambda v=version: target.write(v), after_s=rng.uniform(0, 1.1 * duration_s))
        target.check()
    return done


def kill_before_every_operation(target: Target, stride: int) -> int:
    """Kill before the first, then before a later operation, until a write gets through; how many kills."""
    done = 0
    while killed(lambda: target.write(target.other()), before_event=done * stride):
        target.check()
        done += 1
    return done


def run_together(target: Target, processes: int, rounds: int) -> int:
    """Write old and new from several processes at once; none may fail."""
    for _ in range(rounds):
        children = []
        for number in range(processes):
            pid = os.fork()
            if not pid:
                try:
                    target.write(("old", "new")[number % 2])
                except BaseException as error:  # noqa: BLE001 - the parent wants to know
                    print(f"{type(error).__name__}: {error}", file=sys.stderr)
                    os._exit(1)
                os._exit(0)
            children.append(pid)
        if any(os.waitpid(pid, 0)[1] for pid in children):
            raise SystemExit(f"{target.name}: one of {processes} writers at once failed")
        target.check()
    return rounds


@contextlib.contextmanager
def small_disk(nbytes: int) -> Iterator[Path]:
    """A file system in memory of this size."""
    with tempfile.TemporaryDirectory() as place:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={nbytes}", "tmpfs", place], check=True)
        try:
            yield Path(place)
        finally:
            subprocess.run(["umount", place], check=True)


def fill_disks(target: Target, disk: Path, out: Path, tries: int, rng: np.random.Generator) -> Counter[str]:
    """Export with less and less room; each must say so and leave the old one, or succeed."""
    outcomes: Counter[str] = Counter()
    ballast = disk / "ballast"
    size = sum(file.stat().st_size for file in out.iterdir())
    for _ in range(tries):
        free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
        ballast.write_bytes(b"\0" * max(0, int(free - rng.uniform(0, 1.2) * size)))
        version = target.other()
        said = in_child(lambda v=version: target.write(v))
        ballast.unlink()
        found = target.check()
        if found != version and not str(said).startswith(ExportError.__name__):
            raise SystemExit(f"full disk: not one of our errors: {said}")
        outcomes["written" if found == version else "refused, the other one kept"] += 1
    return outcomes


def bundle_target(artifacts: dict[str, Path], out: Path, *, verify: bool) -> Target:
    """A bundle, told by its logits; both are written once to learn them."""
    loaded: dict[str, Artifact] = {name: read_artifact(path) for name, path in artifacts.items()}
    spec = loaded["old"].info.vision
    shape = (2, 3, *spec.image_size)
    images = np.random.default_rng(0).normal(size=shape).astype(np.float32)

    def write(version: str) -> None:
        export_bundle(loaded[version], artifacts[version], out, verify=verify, progress=QUIET)

    def logits() -> np.ndarray[Any, Any]:
        with Classifier(out, "cpu", num_threads=1) as classifier:
            return classifier.forward(images).logits

    known: dict[bytes, str] = {}
    for version in artifacts:
        in_child(lambda v=version: write(v))
        known[in_child(logits).tobytes()] = version

    def read() -> str:
        found = in_child(logits)
        return known.get(found.tobytes(), "other answers") if isinstance(found, np.ndarray) else str(found)

    return Target("bundle", write, read)


def artifact_target(artifacts: dict[str, Path], out: Path) -> Target:
    """An artifact, told by the scale of its first head."""
    loaded = {name: read_artifact(path) for name, path in artifacts.items()}
    scales = {name: float(artifact.heads[0].weight.sum()) for name, artifact in loaded.items()}

    def read() -> str:
        found = in_child(lambda: float(read_artifact(out).heads[0].weight.sum()))
        return next((name for name, scale in scales.items() if scale == found), str(found))

    return Target("artifact", lambda version: write_artifact(out, loaded[version]), read)


def main() -> None:
    """Run everything and print the counts."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--recipe", type=Path, default=Path("examples/zoo/core.yaml"))
    parser.add_argument("--kills", type=int, default=50, help="at random times, of each kind")
    parser.add_argument("--stride", type=int, default=1, help="kill before every n-th file operation")
    parser.add_argument("--rounds", type=int, default=5, help="of four exports at once")
    parser.add_argument("--full-disks", type=int, default=0, help="exports on a small tmpfs; needs root")
    parser.add_argument(
        "--verify", action="store_true", help="exports compare with the eager model, as by default"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    report: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        merged = merge(load_recipe(options.recipe), QUIET)
        louder = tuple(Head(2 * head.weight, head.bias) for head in merged.heads)
        artifacts = {name: place / f"{name}.safetensors" for name in ("old", "new")}
        write_artifact(artifacts["old"], merged)
        write_artifact(artifacts["new"], dataclasses.replace(merged, heads=louder))
        home = place / "home"
        home.mkdir()
        bundle = bundle_target(artifacts, home / "engines", verify=options.verify)
        artifact = artifact_target(artifacts, home / "merged.safetensors")
        for target in (bundle, artifact):
            report[target.name] = {
                "killed at random times": kill_randomly(target, options.kills, rng),
                "killed before a file operation": kill_before_every_operation(target, options.stride),
                "four writers at once, rounds": run_together(target, 4, options.rounds),
                "found afterwards": dict(target.seen),
            }
        bundle.write("old")
        left = sorted(path.name for path in home.iterdir() if path.name.startswith(".engines"))
        report["left by killed exports after one that was not"] = left
        if options.full_disks:
            size = sum(file.stat().st_size for file in (home / "engines").iterdir())
            with small_disk(int(2.5 * size)) as disk:
                full = bundle_target(artifacts, disk / "engines", verify=False)
                report["full disk"] = dict(fill_disks(full, disk, disk / "engines", options.full_disks, rng))
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
