"""The manifest survives a round trip, and every damaged bundle is refused with its reason."""

import dataclasses
import hashlib
import json
import mmap

import numpy as np
import pytest

import runtime.checksums
import runtime.manifest_checks
from runtime import BundleError, Classifier
from runtime.bundle import FileSpec, StoredArray
from runtime.checksums import check_files, file_spec
from runtime.manifest import json_from_manifest, manifest_from_json, read_manifest
from runtime.mapped_files import map_array


def set_key(*path, value):
    """A change of the manifest's JSON: put `value` at `path`."""

    def change(data):
        for key in path[:-1]:
            data = data[key]
        data[path[-1]] = value

    return change


def drop_key(*path):
    def change(data):
        for key in path[:-1]:
            data = data[key]
        del data[path[-1]]

    return change


def test_a_manifest_survives_a_round_trip(toy_bundle):
    manifest = read_manifest(toy_bundle())
    assert manifest_from_json(json_from_manifest(manifest)) == manifest


def test_sum_weights_may_be_absent(edit_manifest):
    assert read_manifest(edit_manifest(drop_key("router", "sum_weights"))).router.sum_weights == "uniform"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (set_key("format", value="zip"), "not a mass-bundle manifest"),
        (set_key("schema_version", value=4), "schema version 4, this runtime reads 3; install a newer"),
        (set_key("schema_version", value=0), "schema version 0.*export the bundle again"),
        (set_key("schema_version", value="1"), "schema version '1'"),
        (drop_key("router"), r"missing keys \['router'\]"),
        (set_key("colour", value=1), r"unknown keys \['colour'\]"),
        (drop_key("router", "layers"), r"router: missing keys \['layers'\]"),
        (set_key("router", value=[]), "router: expected an object"),
        (set_key("router", "mode", value="best"), "router.mode: expected one of topk, top1, weighted"),
        (set_key("router", "threshold", value=1), "threshold must lie"),
        (set_key("router", "threshold", value="0.2"), 'threshold: expected a finite number, got "0.2"'),
        (
            set_key("router", "threshold", value=10**400),
            "threshold: expected a finite number, got 1000.*[.]{3}",
        ),
        (set_key("router", "temperature", value=0), "temperature must be"),
        (
            set_key("router", "temperature", value=float("nan")),
            "temperature: expected a finite number, got NaN",
        ),
        (set_key("router", "max_tasks", value=0), "max_tasks must be"),
        (set_key("router", "max_tasks", value=True), "max_tasks: expected int, got true"),
        (set_key("router", "sum_weights", value="some"), "router.sum_weights: expected one of"),
        (set_key("compose", value="product"), "compose: expected one of tsvm, sum"),
        (set_key("preprocess", "image_size", value=[8]), "image_size: expected a list"),
        (set_key("preprocess", "image_size", value=[8, 0]), "image_size and std must be positive"),
        (set_key("preprocess", "std", value=[1, 1, 0]), "image_size and std must be positive"),
        (set_key("preprocess", "mean", value=[float("inf"), 0, 0]), r"mean\[0\]: expected a finite number"),
        (set_key("preprocess", "mean", 1, value="x"), r"mean\[1\]: expected a finite number"),
        (set_key("tasks", value=[]), "task names must be given"),
        (set_key("tasks", 1, "name", value="cars"), "task names must be given and distinct"),
        (set_key("tasks", 1, "start", value=3), "task 'birds': head range 3..5 does not fit"),
        (set_key("tasks", 3, "classes", value=[]), "task 'flowers': head range 7..8 does not fit"),
        (set_key("tasks", 0, "classes", value="ab"), "classes: expected a list"),
        (drop_key("passes", "first_pass"), "passes must be first_pass and second_pass"),
        (set_key("passes", value=[]), "passes: expected an object"),
        (set_key("passes", "first_pass", "file", value="../evil.onnx"), "unsafe file name '../evil.onnx'"),
        (set_key("passes", "first_pass", "file", value="/etc/passwd"), "unsafe file name"),
        (set_key("passes", "first_pass", "file", value="C:evil"), "unsafe file name"),
        (set_key("passes", "first_pass", "file", value="a\\b"), "unsafe file name"),
        (set_key("passes", "first_pass", "file", value="a\0b"), "unsafe file name"),
        (set_key("passes", "first_pass", "file", value=""), "unsafe file name"),
        (set_key("passes", "first_pass", "file", value=".."), "unsafe file name"),
        (set_key("files", "manifest.json", value={"bytes": 1, "sha256": ""}), "unsafe file name"),
        (drop_key("files", "weights.bin"), "'weights.bin' is used but not listed"),
        (
            set_key("passes", "first_pass", "inputs", 0, "shape", 1, value=1.5),
            r"shape\[1\]: expected int | str",
        ),
        (set_key("matrices", 0, "u_t", "dtype", value="object"), "u_t: dtype must be one of int8, float16"),
        (set_key("matrices", 0, "s", "shape", value=[4, 2, 1]), "s: shape .* is not that of stacked bases"),
        (set_key("matrices", 0, "vh", "shape", value=[4, -2, 12]), "vh: shape .* is not that"),
        (set_key("matrices", 0, "vh", "offset", value=-4), "vh: lies at bytes -4"),
        (set_key("matrices", 0, "vh", "shape", value=[4, 2, 10**12]), "vh: lies at bytes"),
        (set_key("matrices", 0, "u_t", "shape", value=[3, 2, 12]), "do not fit 4 tasks"),
        (set_key("matrices", 0, "ranks", value=[2, 2, 2, 3]), "do not fit 4 tasks"),
        (set_key("matrices", 0, "ranks", value=[2, 2]), "do not fit 4 tasks"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(edit_manifest, change, match):
    with pytest.raises(BundleError, match=match):
        Classifier(edit_manifest(change))


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "[" * 100_000, '{"format": "mass-bundle"'])
def test_what_is_not_a_manifest_is_refused(own_bundle, text):
    (own_bundle / "manifest.json").write_text(text)
    with pytest.raises(BundleError, match=r"manifest\.json: not"):
        Classifier(own_bundle)


def test_a_manifest_of_other_bytes_or_too_many_is_refused(own_bundle, monkeypatch):
    (own_bundle / "manifest.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BundleError, match="not UTF-8"):
        Classifier(own_bundle)
    monkeypatch.setattr("runtime.manifest.MAX_MANIFEST_BYTES", 2)
    with pytest.raises(BundleError, match="larger than 2 bytes"):
        Classifier(own_bundle)


def test_a_directory_without_a_manifest_is_not_a_bundle(tmp_path):
    for place in (tmp_path, tmp_path / "gone"):
        with pytest.raises(BundleError, match=r"not a bundle \(no manifest.json\)"):
            Classifier(place)


def test_a_changed_byte_is_found_by_checksum_and_named(own_bundle):
    path = own_bundle / "weights.bin"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    with pytest.raises(BundleError, match=r"weights\.bin was changed"):
        Classifier(own_bundle)
    Classifier(own_bundle, "cpu", verify="size").close()


def test_every_missing_and_truncated_file_is_named_at_once(own_bundle):
    (own_bundle / "first_pass.onnx").unlink()
    path = own_bundle / "weights.bin"
    path.write_bytes(path.read_bytes()[:-1])
    for verify in ("full", "size"):
        with pytest.raises(
            BundleError, match=r"first_pass\.onnx is missing; weights\.bin has 799 bytes, expected 800"
        ):
            Classifier(own_bundle, verify=verify)


def test_the_checksum_is_only_read_when_asked(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    check_files(tmp_path, {"a": FileSpec(3, "wrong")}, verify="size")


PIECE = mmap.ALLOCATIONGRANULARITY


@pytest.fixture
def small_pieces(monkeypatch):
    for module in (runtime.manifest_checks, runtime.checksums):
        monkeypatch.setattr(module, "PIECE_BYTES", PIECE)


@pytest.mark.parametrize(
    ("size", "pieces"), [(0, 0), (PIECE, 0), (PIECE + 1, 2), (2 * PIECE, 2), (2 * PIECE + 9, 3)]
)
@pytest.mark.usefixtures("small_pieces")
def test_a_large_file_is_compared_piece_by_piece(tmp_path, size, pieces):
    path, data = tmp_path / "a", np.random.default_rng(0).bytes(size)
    path.write_bytes(data)
    spec = file_spec(path)
    assert spec.sha256 == hashlib.sha256(data).hexdigest()
    parts = [data[at : at + PIECE] for at in range(0, size, PIECE)]
    assert list(spec.pieces) == ([hashlib.sha256(part).hexdigest() for part in parts] if pieces else [])
    assert len(spec.pieces) == pieces
    for threads in (None, 1):
        check_files(tmp_path, {"a": spec}, threads=threads)
    for at in {0, size // 2, size - 1} if size else ():
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(BundleError, match=r"a was changed"):
            check_files(tmp_path, {"a": spec})


@pytest.mark.usefixtures("small_pieces")
def test_a_manifest_lists_all_pieces_of_a_file_or_none(own_bundle):
    path = own_bundle / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"]["weights.bin"]["pieces"] = ["0" * 64] * 2
    path.write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=r"weights\.bin: 2 pieces, expected 1\."):
        read_manifest(own_bundle)


def test_arrays_are_mapped_read_only_at_any_offset(tmp_path):
    values = np.arange(6, dtype="<f4").reshape(2, 3)
    (tmp_path / "w").write_bytes(b"xyz" + values.tobytes())
    mapped = map_array(tmp_path, StoredArray("w", 3, "float32", (2, 3)))
    assert np.array_equal(mapped, values)
    assert not mapped.flags.writeable


def test_arrays_whose_entries_lie_apart_are_views_of_the_file(tmp_path):
    values = np.arange(24, dtype="<f4").reshape(2, 12)  # of each task 12 values, of which 6 are the array's
    (tmp_path / "w").write_bytes(b"xyz" + values.tobytes())
    stored = StoredArray("w", 3 + 4 * 4, "float32", (2, 2, 3), stride=48)
    mapped = map_array(tmp_path, stored)
    assert np.array_equal(mapped, values[:, 4:10].reshape(2, 2, 3))
    assert not mapped.flags.writeable
    assert not mapped.flags.owndata
    assert (stored.nbytes, stored.end) == (48, 19 + 48 + 24)
    with pytest.raises(BundleError, match="cannot map"):
        map_array(tmp_path, dataclasses.replace(stored, offset=3 + 4 * 7))


def test_entries_neither_overlap_nor_leave_the_file(own_bundle):
    path = own_bundle / "manifest.json"
    text = path.read_text()
    size = json.loads(text)["files"]["weights.bin"]["bytes"]
    for stride, message in ((1, "u_t: stride must be at least"), (size, "u_t: lies at bytes")):
        manifest = json.loads(text)
        manifest["matrices"][0]["u_t"]["stride"] = stride
        path.write_text(json.dumps(manifest))
        with pytest.raises(BundleError, match=message):
            read_manifest(own_bundle)


def test_empty_arrays_need_no_bytes_and_missing_ones_are_refused(tmp_path):
    (tmp_path / "w").write_bytes(b"")
    assert map_array(tmp_path, StoredArray("w", 0, "float32", (2, 0))).shape == (2, 0)
    for file in ("w", "gone"):
        with pytest.raises(BundleError, match="cannot map"):
            map_array(tmp_path, StoredArray(file, 0, "float32", (2,)))


def test_a_bundle_can_be_copied_and_read_elsewhere(own_bundle, toy):
    with Classifier(own_bundle, "cpu") as classifier:
        assert classifier.forward(toy.pixel_values(1)).logits.shape == (1, 8)
    assert json.loads((own_bundle / "manifest.json").read_text())["format"] == "mass-bundle"
