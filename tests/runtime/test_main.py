"""`python -m runtime`: a table or JSON, and one error line."""

import json

import numpy as np
import pytest
from PIL import Image

from runtime.__main__ import main


@pytest.fixture
def image_files(tmp_path):
    files = []
    for number in range(2):
        pixels = np.random.default_rng(number).integers(0, 256, (9, 12, 3), dtype=np.uint8)
        files.append(str(tmp_path / f"image{number}.png"))
        Image.fromarray(pixels).save(files[-1])
    return files


def test_the_table_has_a_line_for_each_image(toy_bundle, image_files, capsys):
    assert main([str(toy_bundle()), *image_files, "--task", "birds", "--top-k", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["image", "task", "label", "score", "next"]
    assert len(lines) == 3
    for file, line in zip(image_files, lines[1:], strict=True):
        cells = line.split()
        assert cells[:2] == [file, "birds"]
        assert cells[2] in ("wren", "owl", "tit")
        assert len(cells) == 6


def test_json_holds_every_prediction(toy_bundle, image_files, capsys, prediction_keys):
    assert main([str(toy_bundle()), *image_files, "--json", "--provider", "cpu"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [entry["image"] for entry in found] == image_files
    assert set(found[0]) == {"image"} | prediction_keys


def test_several_tasks_may_be_named(toy_bundle, image_files, capsys):
    assert main([str(toy_bundle()), *image_files, "--json", "--task", "cars", "--task", "digits"]) == 0
    assert {entry["task"] for entry in json.loads(capsys.readouterr().out)} <= {"cars", "digits"}


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--task", "boats"], "error: tasks: unknown 'boats'"),
        (["--top-k", "0"], "error: top_k"),
        (
            ["--provider", "tensorrt"],
            ("error: this bundle has no TensorRT engines", "error: TensorRT needs an NVIDIA GPU"),
        ),
    ],
)
def test_a_mistake_is_one_error_line_and_no_output(toy_bundle, image_files, capsys, arguments, match):
    assert main([str(toy_bundle()), *image_files, *arguments]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(match)
    assert captured.err.count("\n") == 1


def test_a_bad_image_leaves_no_partial_output(toy_bundle, image_files, capsys):
    assert main([str(toy_bundle()), image_files[0], "gone.png"]) == 1
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "error: image 1 (gone.png): no such file.\n")


def test_a_missing_bundle_is_named(tmp_path, image_files, capsys):
    assert main([str(tmp_path / "engines"), *image_files]) == 1
    assert "engines: not a bundle" in capsys.readouterr().err


def test_wrong_usage_exits_with_two(capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["only-a-bundle"])
    assert exit_info.value.code == 2
    assert "IMAGE" in capsys.readouterr().err
