from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from mass_export.cli import main


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_eval_finds_the_recipe_by_its_checksum_and_puts_the_baselines_beside(pico_bundle, tmp_path):
    recipe, data, bundle = pico_bundle()
    (data / "other.yaml").write_text("tasks: []")
    out = tmp_path / "scores" / "scores.json"
    done = run("eval", "--bundle", bundle, "--data", data, "--json", out)
    assert done.exit_code == 0, done.output
    scores = json.loads(out.read_text())
    assert scores["baselines"]["finetuned"]["known_task_accuracy"] == 0.75
    assert scores["normalized_joint_accuracy"] == pytest.approx(scores["joint_accuracy"] / 0.75)
    assert "Of fine-tuned" in done.stdout
    given = run("eval", "--bundle", bundle, "--data", data, "--recipe", recipe, "--json", out)
    assert given.exit_code == 0
    assert json.loads(out.read_text()) == scores


def test_eval_without_a_recipe_says_that_there_are_no_baselines(pico_bundle, tmp_path):
    recipe, data, bundle = pico_bundle()
    recipe.write_text(recipe.read_text() + "\n# changed since\n")
    done = run("eval", "--bundle", bundle, "--data", data, "--json", tmp_path / "scores.json")
    assert done.exit_code == 0, done.output
    assert "without --recipe there are no baselines" in done.stderr
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["baselines"] is None
    assert "normalized_joint_accuracy" not in scores


def test_eval_refuses_a_recipe_of_other_tasks(pico_bundle, pico_files, tmp_path):
    _, data, bundle = pico_bundle(tasks=3)
    other = pico_files(tasks=4, directory=tmp_path / "other")
    done = run("eval", "--bundle", bundle, "--data", data, "--recipe", other)
    assert (done.exit_code, done.stderr.count("\n")) == (1, 1)
    assert "not the recipe of this bundle: the task(s) task3" in done.stderr


def test_eval_of_another_split_looks_at_its_images(pico_bundle, tmp_path):
    _, data, bundle = pico_bundle(splits={"val": 5, "test": 8})
    run("eval", "--bundle", bundle, "--data", data, "--split", "val", "--json", tmp_path / "scores.json")
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert (scores["split"], scores["images"]) == ("val", 15)


def test_missing_images_are_one_line_and_exit_code_1(pico_bundle, tmp_path):
    *_, bundle = pico_bundle()
    done = run("eval", "--bundle", bundle, "--data", tmp_path / "nowhere")
    assert (done.exit_code, done.stderr.count("\n")) == (1, 1)
    assert done.stderr.startswith("Error: ")


def test_choose_layer_names_the_best_and_writes_all(pico_data, tmp_path):
    recipe, data = pico_data(splits={"val": 6})
    done = run("choose-layer", recipe, "--data", data, "--json", tmp_path / "layers.json")
    assert done.exit_code == 0, done.output
    written = json.loads((tmp_path / "layers.json").read_text())
    best = written["best"]
    assert len(written["layers"]) == 6
    assert best["joint_accuracy"] == max(row["joint_accuracy"] for row in written["layers"])
    assert f"router: {{layer: {best['layer']}, mode: {best['mode']}}}" in done.stdout


def test_a_json_file_that_cannot_be_written_is_named(pico_data):
    recipe, data = pico_data(splits={"val": 2})
    done = run("choose-layer", recipe, "--data", data, "--json", recipe / "layers.json")
    assert done.exit_code == 1
    assert "layers.json: cannot be written" in done.stderr


def test_report_refuses_a_file_that_is_no_report(tmp_path):
    (tmp_path / "scores.json").write_text("{}")
    done = run("report", tmp_path / "scores.json", "--out", tmp_path / "report.html")
    assert done.exit_code == 1
    assert "not a report of the demo" in done.stderr
    assert not (tmp_path / "report.html").exists()
