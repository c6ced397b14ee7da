from __future__ import annotations

import json
import subprocess

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from mass_export.cli import main
from runtime.classifier import Classifier


@pytest.fixture
def photos(tmp_path):
    rng = np.random.default_rng(3)
    (tmp_path / "photos/deep").mkdir(parents=True)
    for name in ("b.png", "a.png", "deep/c.png"):
        pixels = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / name)
    (tmp_path / "photos/notes.txt").write_text("no image")
    return tmp_path / "photos"


def run(*arguments):
    return CliRunner().invoke(main, ["classify", *map(str, arguments)])


def test_a_folder_is_classified_as_the_runtime_does_it_in_sorted_order(pico_bundle, photos):
    *_, bundle = pico_bundle()
    done = run("--bundle", bundle, photos, "--json", "--top-k", 2)
    assert done.exit_code == 0, done.output
    answers = json.loads(done.stdout)
    files = [photos / "a.png", photos / "b.png", photos / "deep/c.png"]
    with Classifier(bundle) as classifier:
        expected = classifier.predict(files, top_k=2)
    assert answers == [
        {"image": str(file), **json.loads(json.dumps(found.to_dict()))}
        for file, found in zip(files, expected, strict=True)
    ]


def test_the_table_names_image_task_route_label_and_score(pico_bundle, photos, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    *_, bundle = pico_bundle()
    lines = run("--bundle", bundle, photos / "a.png").stdout.splitlines()
    assert lines[1].split() == ["Image", "Task", "Route", "Label", "Score", "Next"]
    (row,) = [line for line in lines if "a.png" in line]
    assert row.count("%") == 4  # route, score, and the scores of two more labels


def test_a_given_task_has_no_route(pico_bundle, photos):
    *_, bundle = pico_bundle()
    (answer,) = json.loads(run("--bundle", bundle, photos / "a.png", "--task", "task1", "--json").stdout)
    assert answer["task"] == "task1"
    assert answer["route_confidence"] is answer["route_margin"] is answer["residuals"] is None


@pytest.mark.parametrize(
    ("name", "match"), [("nowhere", "no such file or folder"), ("empty", "no images in this folder")]
)
def test_a_place_without_images_is_one_error_line(pico_bundle, tmp_path, name, match):
    *_, bundle = pico_bundle()
    (tmp_path / "empty").mkdir()
    done = run("--bundle", bundle, tmp_path / name)
    assert (done.exit_code, done.stderr.count("\n")) == (1, 1)
    assert match in done.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_for_a_shell_calls_back_the_command(shell):
    done = CliRunner().invoke(main, ["completion", shell])
    assert done.exit_code == 0
    assert f"_MASS_COMPLETE={shell}_complete" in done.stdout


def test_bash_completes_commands_and_options():
    def completed(words, at):
        environment = {"_MASS_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(at)}
        done = CliRunner().invoke(main, [], prog_name="mass", env=environment)
        return [line.partition(",")[2] for line in done.output.splitlines()]

    assert completed("mass cl", 1) == ["classify"]
    assert "--bundle" in completed("mass classify --b", 2)


def test_the_printed_bash_completion_is_valid_bash(tmp_path):
    script = tmp_path / "completion.bash"
    script.write_text(CliRunner().invoke(main, ["completion", "bash"]).stdout)
    subprocess.run(["bash", "-n", script], check=True)


def test_exit_codes_are_those_that_the_help_names(pico_bundle, photos, tmp_path):
    *_, bundle = pico_bundle()
    text = " ".join(CliRunner().invoke(main, ["--help"]).output.split())
    assert "0 done; 1 an input or the machine is at fault" in text
    assert run("--bundle", bundle, photos / "a.png").exit_code == 0
    assert run("--bundle", tmp_path, photos / "a.png").exit_code == 1
    assert run("--bundle", bundle).exit_code == 2
