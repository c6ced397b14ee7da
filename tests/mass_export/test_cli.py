from __future__ import annotations

import re
import subprocess
import sys
import warnings

import click
import pytest
import yaml
from click.testing import CliRunner

from mass_export import build_commands, cli
from mass_export.errors import ArtifactError
from runtime.errors import BundleError


@pytest.fixture
def run():
    def invoke(*arguments, command=cli.main):
        return CliRunner().invoke(command, [str(argument) for argument in arguments])

    return invoke


def commands():
    return [cli.main, *cli.main.commands.values()]


def test_help_starts_without_the_heavy_libraries():
    code = (
        "import sys; from mass_export import cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'onnxruntime', 'onnx_ir', 'open_clip', 'safetensors', 'rich', 'yaml'}\n"
        "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "merge" in done.stdout


@pytest.mark.parametrize("command", commands(), ids=lambda command: command.name)
def test_the_help_of_every_command_shows_an_example_that_parses(run, command):
    help_text = run("--help", command=command).output
    examples = re.findall(r"^ +mass (\w.*)$", help_text.partition("Example:")[2], flags=re.MULTILINE)
    assert examples
    for example in examples:
        name, *arguments = example.split()
        found = cli.main.commands[name]
        with click.Context(found) as context:
            found.parse_args(context, arguments)


def test_merge_writes_an_artifact_and_says_so(run, pico_files):
    recipe = pico_files()
    out = recipe.parent / "merged.safetensors"
    result = run("merge", recipe, "--out", out)
    assert result.exit_code == 0, result.output
    assert re.search(r"Wrote .*merged\.safetensors: 3 tasks, 0\.\d MB, in \d+\.\d s", result.output)
    first = out.read_bytes()
    assert run("--out", out, "-q", recipe, command=build_commands.merge).exit_code == 0
    assert out.read_bytes() == first


def test_a_mistake_is_one_error_line_and_writes_nothing(run, pico_files):
    path = pico_files()
    recipe = yaml.safe_load(path.read_text())
    recipe["tasks"][1]["classes"].append("one too many")
    path.write_text(yaml.safe_dump(recipe))
    before = set(path.parent.iterdir())
    result = run("merge", path, "--out", path.parent / "merged.safetensors")
    assert result.exit_code == 1
    assert re.fullmatch(
        r"Error: task task1: head: .*5 classes and the head has 4; make them agree\.\n", result.output
    )
    assert set(path.parent.iterdir()) == before


def test_an_input_is_never_overwritten(run, pico_files):
    path = pico_files()
    before = path.read_bytes()
    result = run("merge", path, "--out", path)
    assert result.exit_code == 1
    assert "is an input of the merge" in result.output
    assert path.read_bytes() == before


def test_export_of_a_damaged_artifact_is_one_error_line(run, tmp_path):
    (tmp_path / "a").write_bytes(b"damaged")
    result = run("export", "--artifact", tmp_path / "a", "--out", tmp_path / "engines")
    assert result.exit_code == 1
    assert re.fullmatch(r"Error: .*not a complete safetensors file.*\n", result.output)
    assert not (tmp_path / "engines").exists()


def failing(error):
    @click.command(cls=cli.main.command_class)
    def command():
        raise error

    return command


@pytest.mark.parametrize("error", [ArtifactError("two\nlines"), BundleError("two\nlines")])
def test_both_packages_errors_become_one_line(run, error):
    result = run(command=failing(error))
    assert (result.exit_code, result.output) == (1, "Error: two lines\n")


def test_unexpected_errors_keep_their_traceback(run):
    result = run(command=failing(ZeroDivisionError("a bug")))
    assert isinstance(result.exception, ZeroDivisionError)


def test_warnings_are_one_line_on_stderr(run):
    @click.command(cls=cli.main.command_class)
    def command():
        warnings.simplefilter("always")
        warnings.warn("the stack is ill-conditioned", UserWarning, stacklevel=1)
        click.echo("done")

    result = run(command=command)
    assert (result.stdout, result.stderr) == ("done\n", "Warning: the stack is ill-conditioned\n")


def test_wrong_usage_is_explained(run):
    result = run("merge")
    assert result.exit_code == 2
    assert "Missing argument 'RECIPE'" in result.output
