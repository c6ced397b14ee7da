"""What the documentation says to type is typed here: bash and Python blocks run page by page, in their order.

A block that cannot run here says so in its opening line, as in `bash no-run: needs a GPU`. Its commands, and those
within sentences, are only parsed: the command exists, and so does each of its options.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import pytest
from PIL import Image

from mass_export.cli import main
from runtime.__main__ import _parser as runtime_parser
from runtime.serving.__main__ import _parser as serving_parser

ROOT = Path(__file__).parents[2]
PAGES = {
    str(path.relative_to(ROOT)): path
    for path in sorted([*(ROOT / "docs").glob("*.md"), *(ROOT / "examples").glob("*/README.md")])
}
FENCE = re.compile(r"^```(?P<language>\w*)(?P<marker>[^\n]*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
NO_RUN = re.compile(r" no-run: \S.*")
IMAGES_PER_SPLIT = 40  # those that `mass calibrate --limit 40` draws from all
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# Programs that are not of this project: nothing of them is checked but that they stand here.
OTHERS = {"source", "cd", "curl", "npm", "node", "rsync", "sha256sum"}


@dataclass(frozen=True)
class Block:
    language: str
    marker: str
    body: str

    @property
    def runs(self):
        return self.language in ("bash", "python") and not self.marker


def blocks(page):
    return [Block(**match.groupdict()) for match in FENCE.finditer(page.read_text(encoding="utf-8"))]


def commands(text):
    """Words of every command; a line that ends with a backslash goes on, comments and redirections are left out."""
    for line in text.replace("\\\n", " ").splitlines():
        for part in re.split(r"&&|\|", line):
            words = shlex.split(part.partition(" > ")[0], comments=True)
            while words and "=" in words[0]:  # VARIABLE=value before a command
                words = words[1:]
            if words:
                yield words


ALL = {name: blocks(page) for name, page in PAGES.items()}
WRITTEN = [
    (name, words)
    for name, found in ALL.items()
    for block in found
    if block.language == "bash" and not block.runs
    for words in commands(block.body)
]
PROGRAM = re.compile(
    r"`((?:mass|python -m runtime(?:\.serving)?|(?:python )?(?:\./)?scripts/\w+(?:\.py)?)(?: [^`]*)?)`"
)
SPANS = [
    (name, span)
    for name, page in PAGES.items()
    for span in PROGRAM.findall(FENCE.sub("", page.read_text(encoding="utf-8")))
]


def label(case):
    return f"{case[0]}: {case[1] if isinstance(case[1], str) else ' '.join(case[1])}"


def script_of(program):
    """The file of a script of this repository, and the source that has its options."""
    path = ROOT / program
    source = path.with_suffix(".py")
    assert path.is_file(), program
    return source.read_text(encoding="utf-8") if source.is_file() else path.read_text(encoding="utf-8")


def require_options(words, known, where):
    for word in words:
        if re.fullmatch(r"--[a-z][a-z0-9-]*", word):
            assert known(word), f"{where} has no {word}"


def options_of(command):
    return {name for param in command.params for name in (*param.opts, *param.secondary_opts)} | {"--help"}


def check(words):
    """The command exists, with these options; nothing is run."""
    program, *rest = words
    if program == "mass":
        command = main.commands[rest[0]]
        if "--help" not in rest:
            command.make_context(rest[0], rest[1:])
    elif program == "python" and rest[:2] == ["-m", "runtime"]:
        runtime_parser().parse_args(rest[2:])
    elif program == "python" and rest[:2] == ["-m", "runtime.serving"]:
        serving_parser().parse_args(rest[2:])
    elif program == "python":
        source = script_of(rest[0])
        require_options(rest[1:], lambda word: f'"{word}"' in source or f'"{word}/' in source, rest[0])
    elif program in ("python3", "pip"):
        check_environment(words)
    elif program not in OTHERS:
        script_of(program)


def check_environment(words):
    if words[0] == "python3":
        assert words[1:3] == ["-m", "venv"]
        return
    assert words[1] == "install"
    (package,) = [word for word in words[2:] if not word.startswith("-")]
    name, _, extras = package.rstrip("]").partition("[")
    assert name in (".", PROJECT["name"])
    assert set(filter(None, extras.split(","))) <= set(PROJECT["optional-dependencies"])


def test_every_marker_says_why_a_block_does_not_run():
    for name, found in ALL.items():
        for block in found:
            assert not block.marker or (block.language == "bash" and NO_RUN.fullmatch(block.marker)), name


@pytest.mark.parametrize("case", WRITTEN, ids=label)
def test_a_command_that_is_not_run_exists_with_its_options(case):
    check(case[1])


@pytest.mark.parametrize("case", SPANS, ids=label)
def test_a_command_in_a_sentence_exists_with_its_options(case):
    words = case[1].replace("...", "").replace(" ..", "").split()
    if words[0] == "mass":
        if len(words) > 1 and re.fullmatch(r"[a-z-]+", words[1]) and not words[1].startswith("-"):
            assert words[1] in main.commands
            require_options(words[2:], options_of(main.commands[words[1]]).__contains__, f"mass {words[1]}")
    elif words[:2] == ["python", "-m"]:
        known = {name for action in runtime_parser()._actions for name in action.option_strings}
        if words[2] == "runtime":
            require_options(words[3:], known.__contains__, "python -m runtime")
    else:
        source = script_of(words[words[0] == "python"])
        rest = words[1 + (words[0] == "python") :]
        require_options(rest, lambda word: f'"{word}"' in source or f'"{word}/' in source, words[0])


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """What a page's commands find: this repository, with fewer of the zoo's images."""
    root = tmp_path_factory.mktemp("repository")
    zoo = root / "examples/zoo"
    shutil.copytree(ROOT / "examples/zoo", zoo, ignore=shutil.ignore_patterns("data", "build", "licenses"))
    for file in (ROOT / "examples/zoo/data").glob("*/*.npz"):
        with np.load(file) as arrays:
            count = len(arrays["images"])
            chosen = np.sort(np.random.default_rng(0).choice(count, IMAGES_PER_SPLIT, replace=False))
            rows = chosen if file.stem == "val" else slice(0, IMAGES_PER_SPLIT + 1)
            kept = {name: arrays[name][rows] for name in ("images", "labels")}
        (zoo / "data" / file.parent.name).mkdir(parents=True, exist_ok=True)
        np.savez(zoo / "data" / file.parent.name / file.name, **kept)
    for name in ("scripts", "docs", "README.md", "pyproject.toml"):
        (root / name).symlink_to(ROOT / name)
    return root


@pytest.fixture(scope="module")
def made(repository, tmp_path_factory):
    """What most pages take for granted: an artifact, its bundle, and some pictures."""
    root = tmp_path_factory.mktemp("made")
    merge = f"mass merge {repository}/examples/zoo/core.yaml --out merged.safetensors"
    export = "mass export --artifact merged.safetensors --out engines/ --no-verify"
    run(["bash", "-ec", f"{merge}; {export}"], root)
    (root / "photos").mkdir()
    for task in ("animals", "icons"):
        with np.load(repository / f"examples/zoo/data/{task}/test.npz") as arrays:
            for number, image in enumerate(arrays["images"][:20]):
                Image.fromarray(image).save(root / f"photos/{task}-{number}.png")
    Image.fromarray(image).resize((80, 60)).convert("RGB").save(root / "cat.jpg")
    return root


@pytest.fixture
def sandbox(repository, tmp_path):
    for path in repository.iterdir():
        (tmp_path / path.name).symlink_to(path)
    return tmp_path


def run(words, directory):
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "COLUMNS": "120", "NO_COLOR": "1"}
    environment["OMP_NUM_THREADS"] = "1"  # PyTorch's threads wait for each other, long where others work, too
    finished = subprocess.run(
        words,
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert finished.returncode == 0, f"{words[-1]}\n{finished.stdout}\n{finished.stderr}"
    return finished.stdout


def pattern_of(line):
    """Matches a line of an output whatever its figures; `..` stands for anything."""
    words = re.split(r"\s+", line.strip())
    return re.compile(r"\s+".join(_word_pattern(word) for word in words))


def _word_pattern(word):
    parts = re.split(r"(\d[\d.,]*|\.\d+|\.\.)", word)
    return "".join(
        r".*" if part == ".." else r"[\d.,]+" if i % 2 else re.escape(part) for i, part in enumerate(parts)
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, found in ALL.items() if any(block.runs for block in found)])
def test_the_blocks_of_a_page_run_and_print_what_it_shows(name, sandbox, request):
    if name != "docs/tutorial.md":  # which makes everything itself
        shutil.copytree(request.getfixturevalue("made"), sandbox, dirs_exist_ok=True)
    output, program = "", ""
    for block in ALL[name]:
        if block.language == "text":
            for line in block.body.splitlines():
                if line != "..":
                    assert pattern_of(line).search(output), f"{line}\nis not in\n{output}"
        elif block.runs and block.language == "bash":
            output = run(["bash", "-euo", "pipefail", "-c", block.body], sandbox)
        elif block.runs:
            program += block.body  # the blocks of a page are one program
            output = run([sys.executable, "-W", "error", "-c", program], sandbox)


def test_a_shown_line_matches_whatever_its_figures_and_nothing_else():
    shown = pattern_of("Wrote ../engines: 8 tasks, 17.0 MB, .44 of 1,234 ..")
    assert shown.search("Wrote /tmp/x/engines:  8 tasks, 3 MB,   .5 of 99 and more")
    assert not shown.search("Wrote /tmp/x/engines: 8 models, 3 MB, .5 of 99 and more")
    assert not shown.search("Wrote /tmp/x/engines: 8 tasks, many MB, .5 of 99 and more")


@pytest.mark.parametrize("name", ["mass no-such-command --out x", "mass export --no-such-option"])
def test_a_command_that_does_not_exist_is_found(name):
    with pytest.raises((KeyError, click.UsageError)):
        check(name.split())
