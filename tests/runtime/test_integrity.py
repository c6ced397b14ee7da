"""A bundle is closed: its graphs read listed files only, extra files are named, a replaced one is not mixed in."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime import BackendError, BundleError, Classifier
from runtime.bundle import FileSpec
from runtime.checksums import sha256_of_file
from runtime.errors import MassRuntimeError
from runtime.graph_files import check_graph_files
from runtime.integrity import extra_files, require_unchanged
from runtime.manifest import read_manifest

onnx = pytest.importorskip("onnx")

FILES = {"first_pass.onnx": FileSpec(1000, ""), "weights.bin": FileSpec(800, "")}


def external(**entries: str):
    tensor = onnx.TensorProto(name="w", data_type=1, dims=[2], data_location=1)
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def in_initializer(model, tensor):
    model.graph.initializer.append(tensor)


def in_constant(model, tensor):
    model.graph.node.add(op_type="Constant").attribute.add(name="value", type=4).t.CopyFrom(tensor)


def in_tensor_list(model, tensor):
    model.graph.node.add(op_type="X").attribute.add(name="value", type=9).tensors.append(tensor)


def in_sparse_initializer(model, tensor):
    model.graph.sparse_initializer.add().values.CopyFrom(tensor)


def in_sparse_attribute(model, tensor):
    model.graph.node.add(op_type="X").attribute.add(name="value", type=11).sparse_tensor.indices.CopyFrom(
        tensor
    )


def in_subgraph(model, tensor):
    branch = model.graph.node.add(op_type="If").attribute.add(name="then_branch", type=5).g
    branch.node.add(op_type="If").attribute.add(name="else_branch", type=5).g.initializer.append(tensor)


def in_subgraph_list(model, tensor):
    model.graph.node.add(op_type="X").attribute.add(name="all", type=10).graphs.add().initializer.append(
        tensor
    )


def in_function(model, tensor):
    node = model.functions.add(name="f").node.add(op_type="Constant")
    node.attribute.add(name="value", type=4).t.CopyFrom(tensor)


def in_training(model, tensor):
    model.training_info.add().initialization.initializer.append(tensor)


PLACES = (
    in_initializer, in_constant, in_tensor_list, in_sparse_initializer, in_sparse_attribute, in_subgraph,
    in_subgraph_list, in_function, in_training,
)  # fmt: skip


def graph(tmp_path: Path, place, tensor) -> Path:
    model = onnx.ModelProto(ir_version=10, producer_name="weights.bin")
    model.graph.name = "location"
    place(model, tensor)
    path = tmp_path / "graph.onnx"
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize("place", PLACES)
def test_tensors_within_listed_files_are_accepted_wherever_they_stand(tmp_path, place) -> None:
    check_graph_files(
        graph(tmp_path, place, external(location="weights.bin", offset="792", length="8")), FILES
    )
    check_graph_files(graph(tmp_path, place, external(location="weights.bin")), FILES)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "location",
    [
        "/etc/passwd",
        "../weights.bin",
        "sub/../../weights.bin",
        "./weights.bin",
        "other.bin",
        "",
        "C:\\weights.bin",
    ],
)
def test_tensors_in_any_other_file_are_refused_wherever_they_stand(tmp_path, place, location) -> None:
    with pytest.raises(BundleError, match=r"no file of this bundle.*weights\.bin"):
        check_graph_files(graph(tmp_path, place, external(location=location, offset="0")), FILES)


@pytest.mark.parametrize(
    ("entries", "match"),
    [
        (
            {"location": "weights.bin", "offset": "800", "length": "1"},
            r"1 bytes at 800 of 'weights\.bin', which has 800",
        ),
        ({"location": "weights.bin", "offset": "0", "length": "9" * 30}, "which has 800"),
        ({"location": "weights.bin", "offset": "-4"}, "which has 800"),
        ({"location": "weights.bin", "length": "x"}, "which has 800"),
        ({"location": "weights.bin", "offset": "²"}, "which has 800"),
    ],
)
def test_tensors_beyond_the_end_of_a_file_are_refused(tmp_path, entries, match) -> None:
    with pytest.raises(BundleError, match=match):
        check_graph_files(graph(tmp_path, in_initializer, external(**entries)), FILES)


def test_a_key_that_is_given_twice_is_refused(tmp_path) -> None:
    tensor = external(location="/etc/passwd")
    tensor.external_data.add(key="location", value="weights.bin")
    with pytest.raises(BundleError, match="'location' is given twice"):
        check_graph_files(graph(tmp_path, in_initializer, tensor), FILES)


def test_what_is_no_graph_is_refused(tmp_path, monkeypatch) -> None:
    path = tmp_path / "graph.onnx"
    for data in (b"\xff", b"\x0b\x0c", b"\x3a\x05a", b"\x80" * 20, b"\x0d\x00", b"\x3a\x02\x2a\xff"):
        path.write_bytes(data)
        with pytest.raises(BundleError, match="not an ONNX graph"):
            check_graph_files(path, FILES)
    path.write_bytes(b"")
    with pytest.raises(BundleError, match="0 bytes, expected a graph"):
        check_graph_files(path, FILES)
    monkeypatch.setattr("runtime.graph_files.MAX_GRAPH_BYTES", 1)
    path.write_bytes(b"ab")
    with pytest.raises(BundleError, match="2 bytes, expected a graph of 1 to 1"):
        check_graph_files(path, FILES)


def test_graphs_nested_without_end_are_refused(tmp_path) -> None:
    data = b""
    for _ in range(100):  # a graph in an attribute of a node of a graph
        for field in (6, 5, 1):
            length, size = b"", len(data)
            while size > 0x7F:
                length, size = length + bytes([size & 0x7F | 0x80]), size >> 7
            data = bytes([field << 3 | 2]) + length + bytes([size]) + data
    path = tmp_path / "graph.onnx"
    model = onnx.ModelProto(ir_version=10)
    serialized = model.SerializeToString()
    size = bytes([len(data) & 0x7F | 0x80, len(data) >> 7])
    path.write_bytes(serialized + b"\x3a" + size + data)
    with pytest.raises(BundleError, match="nested deeper than 64"):
        check_graph_files(path, FILES)


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_any_change_of_a_graph_is_read_to_an_end(tmp_path_factory, toy_bundle, data) -> None:
    graph = bytearray((toy_bundle() / "first_pass.onnx").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        graph[data.draw(st.integers(0, len(graph) - 1))] = data.draw(st.integers(0, 255))
    del graph[data.draw(st.integers(0, len(graph))) :]
    path = tmp_path_factory.getbasetemp() / "changed.onnx"
    path.write_bytes(graph)
    try:
        check_graph_files(path, FILES)
    except MassRuntimeError as error:
        assert str(path) in str(error)  # noqa: PT017 - other exceptions are the failure


def sign_anew(bundle: Path, name: str) -> None:
    """Make the manifest agree with a changed file, as whoever forges a bundle would."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    path = bundle / name
    manifest["files"][name] = {"bytes": path.stat().st_size, "sha256": sha256_of_file(path)}
    (bundle / "manifest.json").write_text(json.dumps(manifest))


def test_a_forged_graph_that_reads_another_file_is_never_loaded(own_bundle, tmp_path) -> None:
    (tmp_path / "secret.bin").write_bytes(b"\0" * 8)
    path = own_bundle / "first_pass.onnx"
    model = onnx.load(path)
    model.graph.initializer.append(external(location=str(tmp_path / "secret.bin")))
    path.write_bytes(model.SerializeToString())
    sign_anew(own_bundle, "first_pass.onnx")
    with pytest.raises(BundleError, match=r"secret\.bin"):
        Classifier(own_bundle, "cpu")


def test_extra_files_are_named_and_harmless(own_bundle, toy, caplog) -> None:
    (own_bundle / "surprise.onnx").write_bytes(b"?")
    (own_bundle / ".DS_Store").write_bytes(b"")
    assert extra_files(own_bundle, read_manifest(own_bundle)) == ["surprise.onnx"]
    with caplog.at_level(logging.WARNING), Classifier(own_bundle, "cpu") as classifier:
        assert classifier.forward(toy.pixel_values(1)).logits.shape == (1, 8)
    assert "surprise.onnx" in caplog.text


def test_a_bundle_that_was_replaced_is_noticed_but_new_engines_are_not_a_change(own_bundle) -> None:
    manifest = read_manifest(own_bundle)
    require_unchanged(own_bundle, manifest)
    require_unchanged(own_bundle, dataclasses.replace(manifest, provenance={"x": float("nan")}))
    weights = own_bundle / "weights.bin"
    weights.write_bytes(weights.read_bytes()[::-1])
    sign_anew(own_bundle, "weights.bin")
    with pytest.raises(BundleError, match="was replaced while it was in use"):
        require_unchanged(own_bundle, manifest)


def test_a_second_pass_that_is_loaded_later_is_of_the_same_bundle_or_refused(own_bundle, tmp_path) -> None:
    from runtime.onnx_session import LazySession

    manifest = read_manifest(own_bundle)
    session = LazySession(own_bundle / "second_pass.onnx", 1, lambda: require_unchanged(own_bundle, manifest))
    own_bundle.rename(tmp_path / "old")
    shutil.copytree(tmp_path / "old", own_bundle)
    weights = own_bundle / "weights.bin"
    weights.write_bytes(weights.read_bytes()[::-1])
    sign_anew(own_bundle, "weights.bin")
    with pytest.raises(BackendError, match=r"second_pass\.onnx: cannot be loaded any more.*load it again"):
        session.run({"pixel_values": np.zeros((1, 3, 8, 8), np.float32)})
