from __future__ import annotations

import json

import numpy as np
import pytest

from mass_export.baselines import evaluate_baselines
from mass_export.errors import DataError
from mass_export.evaluation import evaluate_bundle
from mass_export.layer_choice import LayerScore, best_layer
from mass_export.progress import Progress
from mass_export.recipe import load_recipe
from mass_export.suite import CONFIGURATIONS, run_suite

QUIET = Progress(quiet=True)


@pytest.fixture
def suite(pico_data, tmp_path):
    """A suite whose recipe is far from the paper's settings."""
    path, data = pico_data(tasks=3, router={"layer": 0, "mode": "top1"}, base_merge="zeroshot")
    return path, data, run_suite(path, data, tmp_path / "out", progress=QUIET)


def test_a_suite_holds_every_configuration_s_figures_and_survives_json(suite, tmp_path):
    path, data, report = suite
    assert json.loads(json.dumps(report)) == report
    assert report["configurations"] == ["paper", "default", "pool", "task_images"]
    rows = evaluate_baselines(load_recipe(path), data, progress=QUIET)
    assert report["baselines"]["tsvm"]["tasks"] == rows[3].tasks
    for name in report["configurations"]:
        again = evaluate_bundle(
            tmp_path / "out" / name, data, finetuned=rows[0].tasks, progress=QUIET
        ).to_dict()
        assert {key: report[name][key] for key in again} == again
        assert report[name]["parity"]["images"] > report[name]["parity"]["real_images"] == 36
        assert report[name]["sizes"]["all_models_bytes"] == 3 * report[name]["sizes"]["one_model_bytes"]
        assert report[name]["times"]["latency_ms"]["32"]["unknown"] > 0
        assert len(report[name]["examples"]) == 24
    curves = report["curves"]
    assert [row["rank_ratio"] for row in curves["ranks"]] == [1 / 16, 1 / 8, 1 / 4, 1 / 2]
    assert [sorted(row) for row in curves["tasks"]] == [["default", "paper", "tasks"]]  # two of the three
    assert curves["tasks"][0]["tasks"] == 2
    for kind, low, high in (("lead", -3, 3), ("routed", 0, 1)):
        values = np.array(curves["residuals"][kind])
        assert values.shape == (3, 3)  # blocks, tasks
        assert low <= values.min() <= values.max() <= high

    default, paper = (report[name]["settings"] for name in ("default", "paper"))
    assert (default["router"]["layer"], default["merge"]["base_merge"]) == (0, "zeroshot")
    best = best_layer([LayerScore(**row) for row in report["paper"]["layer_choice"]])
    assert (paper["router"]["layer"], paper["router"]["mode"]) == (best.layer, best.mode)
    assert (paper["router"]["threshold"], paper["merge"]["base_merge"]) == (0.2, "tsvm")


def test_the_paper_s_configuration_cannot_be_chosen_without_validation_images(pico_data, tmp_path):
    path, data = pico_data(splits={"test": 4})
    with pytest.raises(DataError, match="split 'val'"):
        run_suite(path, data, tmp_path / "out", configurations=CONFIGURATIONS[:1], progress=QUIET)
