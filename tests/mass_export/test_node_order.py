"""Bases are gathered where they are multiplied, in the order in which ONNX Runtime runs a graph."""

import numpy as np
import pytest

from mass_export.bench_profile import operator_runs, profiled
from mass_export.bundle_int8 import convert_bundle_int8
from runtime.classifier import Classifier
from runtime.manifest import read_manifest

# What makes another shape of gathered rows and computes nothing.
VIEWS = ("Reshape", "Unsqueeze", "Transpose", "Shape", "Concat", "Cast")


def computing(runs):
    """Names of the operators, without those that only find which rows to gather."""
    return [
        event["args"]["op_name"] for event in runs if "int64" not in event["args"]["output_type_shape"][0]
    ]


def longest_row_of_gathers(names):
    longest = length = 0
    for name in names:
        if name not in VIEWS:
            length = length + 1 if name == "Gather" else 0
            longest = max(longest, length)
    return longest


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("keys", [{}, {"compose": "sum"}, {"patch_embed": "low_rank", "rank": 2}])
def test_no_graph_gathers_bases_before_they_are_needed(pico_bundle, tmp_path, keys, precision):
    _, _, bundle = pico_bundle(router={"layer": 1, "mode": "top1"}, base_merge="zeroshot", **keys)
    if precision == "int8":
        full, bundle = bundle, bundle.parent / "int8"
        bundle.mkdir()
        convert_bundle_int8(full, read_manifest(full), bundle)
    images = np.random.default_rng(0).normal(size=(4, 3, 16, 16)).astype(np.float32)
    with profiled(tmp_path), Classifier(bundle, "cpu", num_threads=1) as classifier:
        gates = np.full((4, 3), 1 / 3, np.float32)
        for sets in ([(0,)] * 4, [(0,), (1,), (2,), (0,)], [(0, 1), (1, 2), (0, 2), (0, 1)]):
            classifier._second_pass(images, sets, gates)
        parts = classifier._one_task
        sessions = [part.session for part in (*parts._segments, parts._patches)]
        for session in (*sessions, classifier._second._session):
            names = computing(operator_runs(session))
            assert names.count("Gather") == 0 or longest_row_of_gathers(names) <= 4
        assert names.count("Gather") > 8  # the last is the second pass
