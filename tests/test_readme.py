from __future__ import annotations

import contextlib
import importlib.util
import io
import re
import shlex
import subprocess
from pathlib import Path

import click
import numpy as np
import pytest
from PIL import Image

from mass_export.cli import main
from mass_export.recipe import load_recipe
from mass_export.report_files import read_report
from runtime.__main__ import main as runtime_main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = ROOT / "examples/zoo/results.json"


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


COMMANDS = [
    shlex.split(line, comments=True)
    for line in "".join(blocks("bash")).splitlines() + re.findall(r"`(mass [a-z-]+ .*?--.*?)`", README)
]


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_in_the_readme_exists_with_its_options(words):
    program, *rest = words
    if program == "mass":
        command = main.commands.get(rest[0])
        assert command is not None or rest == ["--help"]
        if command is not None and rest[1:] != ["--help"]:
            command.make_context(rest[0], rest[1:])  # parses, runs nothing
    elif program == "python":
        assert rest[:2] == ["-m", "runtime"]
        with pytest.raises(SystemExit, match="0"), contextlib.redirect_stdout(io.StringIO()):
            runtime_main([*rest[2:], "--help"])
    elif program == "pip":
        extras = re.findall(r"\[(\w+)\]", " ".join(rest))
        assert set(extras) <= set(
            re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
        )
    else:
        path = ROOT / program
        assert path.is_file()
        assert path.stat().st_mode & 0o111


def test_the_recipe_in_the_readme_is_accepted(pico_files, tmp_path):
    pico_files(tasks=1)
    (text,) = blocks("yaml")
    for theirs, ours in {
        "model_config.json": "model.json",
        "cars.safetensors": "task0.safetensors",
        "cars.weight": "task0.weight",
    }.items():
        assert theirs in text
        text = text.replace(theirs, ours)
    (tmp_path / "readme.yaml").write_text(text)
    recipe = load_recipe(tmp_path / "readme.yaml")
    assert [(task.name, task.classes) for task in recipe.tasks] == [("cars", ("suv", "sedan"))]


def test_the_program_in_the_readme_runs(pico_files, tmp_path, monkeypatch, capsys):
    from mass_export.artifact import write_artifact
    from mass_export.merge import merge
    from mass_export.onnx_export import export_bundle
    from mass_export.progress import Progress

    progress = Progress(quiet=True)
    artifact = merge(load_recipe(pico_files()), progress)
    write_artifact(tmp_path / "merged.safetensors", artifact)
    export_bundle(
        artifact, tmp_path / "merged.safetensors", tmp_path / "engines", verify=False, progress=progress
    )
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(tmp_path / "cat.jpg")
    monkeypatch.chdir(tmp_path)
    (program,) = blocks("python")
    exec(compile(program, "README.md", "exec"), {})  # noqa: S102
    assert re.fullmatch(
        r"task\d task\d-class\d 0\.\d\d\n|task\d task\d-class\d 1\.00\n", capsys.readouterr().out
    )


def test_the_table_is_the_rendering_of_the_figures_in_the_zoo():
    block = script("update_readme").BLOCK.search(README)
    assert block is not None
    if RESULTS.is_file():
        assert script("update_readme").with_table(README, read_report(RESULTS)) == README
    else:
        assert block[0] == ""


def test_the_table_is_replaced_and_the_rest_of_the_readme_is_kept():
    report = {"suites": ["core"], "machine": {}, "core": {"configurations": [], "baselines": {}}}
    update = script("update_readme")
    changed = update.with_table(README, update.results_from_report(report))
    assert changed != README
    assert update.BLOCK.sub("", changed) == update.BLOCK.sub("", README)
    assert update.with_table(changed, report) == changed
    with pytest.raises(click.ClickException, match="markers"):
        update.with_table("no markers", report)


def test_every_local_link_leads_somewhere():
    targets = [target for target in re.findall(r"\]\(([^)]+)\)", README) if "://" not in target]
    assert targets
    assert [target for target in targets if not (ROOT / target.partition("#")[0]).exists()] == []


def test_every_command_has_a_help_text_with_an_example_that_parses():
    for name, command in main.commands.items():
        assert command.help, name
        examples = re.findall(rf"^ *mass ({re.escape(name)} .*)$", command.epilog or "", re.MULTILINE)
        assert examples, f"mass {name} has no example"
        for example in examples:
            command.make_context(name, shlex.split(example)[1:])


def test_scripts_are_valid_bash():
    for name in ("scripts/demo", "scripts/test", "scripts/environment.sh", ".ci/run"):
        subprocess.run(["bash", "-n", ROOT / name], check=True)
