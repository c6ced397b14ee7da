"""Fuzz what is read from files, guided by coverage (atheris): only our own errors, bounded memory, no hang.

    pip install atheris
    python scripts/fuzz.py --seconds 120                 # every target
    python scripts/fuzz.py manifest image --seconds 600

Each target runs in a process of its own under libFuzzer, from sound files as seeds: another exception than the
project's ends it, as do 10 seconds for one input or more memory than 2 GiB above that of the start.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import resource
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from fuzz_seeds import ZOO, write_seeds

MEMORY_BYTES = 2 << 30
TIMEOUT_S = 10
STRUCTURED = ("manifest", "artifact_header", "recipe")
TARGETS = ("manifest", "graph", "artifact_header", "artifact_file", "recipe", "image")


def manifest_target(_: Path) -> Callable[[bytes], None]:
    """`manifest.json` of a bundle."""
    from runtime.manifest import json_from_manifest, manifest_from_json  # noqa: PLC0415

    def run(data: bytes) -> None:
        text = data.decode("utf-8", "replace")
        json_from_manifest(manifest_from_json(text))

    return run


def graph_target(place: Path) -> Callable[[bytes], None]:
    """An `.onnx` file, as far as it is read before ONNX Runtime gets it."""
    from runtime.bundle import FileSpec  # noqa: PLC0415
    from runtime.graph_files import check_graph_files  # noqa: PLC0415

    path, files = place / "graph.onnx", {"weights.bin": FileSpec(1 << 30, "")}

    def run(data: bytes) -> None:
        path.write_bytes(data)
        check_graph_files(path, files)

    return run


def artifact_header_target(_: Path) -> Callable[[bytes], None]:
    """The settings in an artifact's header."""
    from mass_export.artifact_header import FORMAT, info_from_metadata  # noqa: PLC0415

    def run(data: bytes) -> None:
        text = data.decode("utf-8", "replace")
        info_from_metadata({"format": FORMAT, "schema_version": "1", "info": text}, "fuzz")

    return run


def artifact_file_target(place: Path) -> Callable[[bytes], None]:
    """A whole artifact."""
    from mass_export.artifact import read_artifact  # noqa: PLC0415

    path = place / "merged.safetensors"

    def run(data: bytes) -> None:
        path.write_bytes(data)
        read_artifact(path)

    return run


def recipe_target(place: Path) -> Callable[[bytes], None]:
    """A recipe, beside files that it may name."""
    import open_clip  # noqa: F401, PLC0415 - which takes more memory than an input may

    from mass_export.recipe import load_recipe  # noqa: PLC0415

    os.environ["HF_HUB_OFFLINE"] = "1"
    path = place / "recipe.yaml"
    for name in ("model_config.json", "base.safetensors", "heads.safetensors"):
        (place / name).write_bytes((ZOO / name).read_bytes())
    for name in ("checkpoints", "classes"):
        (place / name).symlink_to(ZOO / name)

    def run(data: bytes) -> None:
        path.write_bytes(data)
        load_recipe(path)

    return run


def image_target(place: Path) -> Callable[[bytes], None]:
    """An image file."""
    import PIL.Image  # noqa: PLC0415

    from runtime.bundle import PreprocessSpec  # noqa: PLC0415
    from runtime.preprocess import pixel_values_from_images  # noqa: PLC0415

    PIL.Image.init()  # all formats, while imports are instrumented
    path, spec = place / "image", PreprocessSpec((32, 32), (0.5,) * 3, (0.5,) * 3)

    def run(data: bytes) -> None:
        path.write_bytes(data)
        assert np.isfinite(pixel_values_from_images([path], spec)).all()

    return run


ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 0.5, -0.5, 1e308, -1e400, float("nan"), 10**40, "", "a", "..", "/etc/passwd", "a/b",
    "\0", "\ud800", [], [[]], [0], {}, {"": {}}, "float32", "hf:a/b", "default", "all",
)  # fmt: skip


def mutate_value(value: Any, rng: random.Random) -> Any:
    """One change somewhere in parsed JSON: another value, one less, one twice, or one from elsewhere."""
    at, places = value, []
    while isinstance(at, dict | list) and at:
        key = rng.choice(list(at) if isinstance(at, dict) else range(len(at)))
        places.append((at, key))
        if rng.random() < 0.2:
            break
        at = at[key]
    if not places:
        return rng.choice(ODD_VALUES)
    parent, key = places[-1]
    kind = rng.randrange(4)
    if kind == 0:
        del parent[key]
    elif kind == 1 and isinstance(parent, list):
        parent.insert(key, parent[key])
    elif kind == 2:
        other, elsewhere = rng.choice(places)
        parent[key] = json.loads(json.dumps(other[elsewhere]))
    else:
        parent[key] = rng.choice(ODD_VALUES)
    return value


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """Other bytes, some less, or some twice (atheris.Mutate cannot be called from a custom mutator)."""
    changed = bytearray(data or b"0")
    start = rng.randrange(len(changed))
    stop = min(len(changed), start + rng.choice((1, 1, 2, 8, 64)))
    part = bytes(changed[start:stop])
    changed[start:stop] = rng.choice(
        (b"", part * 2, part * 50, part[::-1], rng.randbytes(len(part)), b"[" * 2000)
    )
    return bytes(changed)


def structural_mutator(target: str) -> Callable[[bytes, int, int], bytes]:
    """Mostly changes within the structure of JSON or YAML, which few changes of bytes survive; else of bytes."""

    def mutator(data: bytes, limit: int, seed: int) -> bytes:
        rng = random.Random(seed)  # noqa: S311 - nothing secret
        if rng.random() < 0.3:
            return mutate_bytes(data, rng)[:limit]
        try:
            value = yaml.safe_load(data) if target == "recipe" else json.loads(data)
            for _ in range(rng.randint(1, 3)):
                value = mutate_value(value, rng)
            text = yaml.safe_dump(value, sort_keys=False) if target == "recipe" else json.dumps(value)
            return text.encode("utf-8", "replace")[:limit]
        except (ValueError, yaml.YAMLError, RecursionError, AttributeError, TypeError):
            return mutate_bytes(data, rng)[:limit]

    return mutator


def fuzz(target: str, corpus: Path, place: Path, arguments: list[str]) -> None:
    """Never returns: libFuzzer ends the process."""
    import atheris  # noqa: PLC0415 - not needed by the parent

    with atheris.instrument_imports(include=["runtime", "mass_export", "PIL"], enable_loader_override=False):
        run = globals()[f"{target}_target"](place)
        from mass_export.errors import MassExportError  # noqa: PLC0415
        from runtime.errors import MassRuntimeError  # noqa: PLC0415
    warnings.simplefilter("ignore")

    def one(data: bytes) -> None:
        try:
            run(data)
        except (MassExportError, MassRuntimeError):
            return
        except BaseException:
            traceback.print_exc()
            raise

    for seed in sorted(corpus.iterdir()):  # imports and caches come before the limit
        one(seed.read_bytes())
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES,) * 2)
    more = {"custom_mutator": structural_mutator(target)} if target in STRUCTURED else {}
    atheris.Setup([sys.argv[0], *arguments, str(corpus)], one, **more)
    atheris.Fuzz()


def run_target(target: str, seconds: int, out: Path) -> dict[str, Any]:
    """Fuzz one target in a process of its own; what libFuzzer counted."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as scratch:  # noqa: S108
        corpus, place = Path(scratch) / "corpus", Path(scratch) / "place"
        corpus.mkdir()
        place.mkdir()
        write_seeds(target, corpus, place)
        words = {
            word for seed in corpus.iterdir() for word in re.findall(rb"[A-Za-z_]{3,20}", seed.read_bytes())
        }
        if target in STRUCTURED:
            (place / "words").write_text("".join(f'"{word.decode()}"\n' for word in sorted(words)))
        arguments = [
            f"-max_total_time={seconds}",
            f"-timeout={TIMEOUT_S}",
            "-rss_limit_mb=0",
            "-print_final_stats=1",
        ]
        arguments += [f"-artifact_prefix={out}/{target}-", "-max_len=131072", "-seed=1"]
        if (place / "words").exists():
            arguments.append(f"-dict={place / 'words'}")
        child = [sys.executable, __file__, "--child", target, str(corpus), str(place), json.dumps(arguments)]
        done = subprocess.run(child, capture_output=True, text=True, errors="replace", check=False)
    stats = dict(re.findall(r"stat::(\w+):\s+(\d+)", done.stderr))
    result = {
        "inputs": int(stats.get("number_of_executed_units", 0)),
        "peak_mb": int(stats.get("peak_rss_mb", 0)),
        "edges": int((re.findall(r"cov: (\d+)", done.stderr) or ["0"])[-1]),
        "failed": done.returncode != 0,
    }
    if done.returncode:
        result["said"] = done.stderr[-4000:]
    return result


def main() -> None:
    """Run the targets and print the counts; exit code 1 if one failed."""
    if sys.argv[1:2] == ["--child"]:
        target, corpus, place, arguments = sys.argv[2:]
        fuzz(target, Path(corpus), Path(place), json.loads(arguments))
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("targets", nargs="*", choices=[*TARGETS, []], help="all by default")
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    parser.add_argument("--out", type=Path, default=Path("fuzz-findings"), help="inputs that failed")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    failed = False
    for target in options.targets or TARGETS:
        result = run_target(target, options.seconds, options.out.absolute())
        failed |= result["failed"]
        print(json.dumps({target: result}, indent=1), flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
