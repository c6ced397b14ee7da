"""Whatever a manifest, an image or an array holds, the answer is a result or one of the project's errors."""

from __future__ import annotations

import io
import json
import struct
import time
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from runtime import Classifier, InputError
from runtime.bundle import MANIFEST_FILE, PreprocessSpec
from runtime.errors import BundleError
from runtime.manifest import json_from_manifest, manifest_from_json
from runtime.preprocess import pixel_values_from_images

SPEC = PreprocessSpec((8, 8), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**400), 10**400) | st.floats() | st.text(max_size=8)
    | st.sampled_from(["..", "/etc/passwd", "a\0b", "weights.bin", "float32", "topk"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)  # fmt: skip


@given(st.data())
@settings(max_examples=400, deadline=None)
def test_a_manifest_with_anything_anywhere_is_read_or_refused(toy_bundle, changed_anywhere, data) -> None:
    manifest = json.loads((toy_bundle() / MANIFEST_FILE).read_text())
    manifest = changed_anywhere(manifest, data, JSON)
    try:
        parsed = manifest_from_json(json.dumps(manifest))
    except BundleError as error:
        assert len(str(error)) < 20_000  # noqa: PT017 - other exceptions are the failure
    else:
        again = manifest_from_json(json_from_manifest(parsed))
        assert json_from_manifest(again) == json_from_manifest(parsed)


@given(st.text())
@settings(max_examples=200, deadline=None)
def test_any_text_is_no_manifest(text) -> None:
    with pytest.raises(BundleError):
        manifest_from_json(text)


@pytest.fixture(scope="module")
def encoded() -> list[bytes]:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8))
    frames = {"save_all": True, "append_images": [picture.rotate(90), picture]}
    made = []
    for kind, more in (
        ("PNG", {}),
        ("JPEG", {}),
        ("GIF", frames),
        ("WEBP", frames),
        ("TIFF", frames),
        ("BMP", {}),
    ):
        file = io.BytesIO()
        picture.save(file, kind, **more)
        made.append(file.getvalue())
    return made


@given(st.data())
@settings(max_examples=400, deadline=None)
@pytest.mark.filterwarnings("ignore")
def test_a_damaged_image_is_decoded_or_refused(encoded, tmp_path_factory, data) -> None:
    image = bytearray(data.draw(st.sampled_from(encoded)))
    for _ in range(data.draw(st.integers(0, 6))):
        image[data.draw(st.integers(0, len(image) - 1))] = data.draw(st.integers(0, 255))
    del image[data.draw(st.integers(1, len(image))) :]
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(image)
    try:
        pixel_values = pixel_values_from_images([path], SPEC)
    except InputError as error:
        assert "image 0" in str(error)  # noqa: PT017 - as above
    else:
        assert np.isfinite(pixel_values).all()


@pytest.mark.parametrize("size", [(1, 30000), (30000, 1), (1, 1), (20000, 3)])
def test_absurd_shapes_are_cropped_without_being_made_whole(size, tmp_path) -> None:
    path = tmp_path / "strip.png"
    Image.new("RGB", size, (10, 20, 30)).save(path)
    assert pixel_values_from_images([path], PreprocessSpec((224, 224), *[(0.5,) * 3] * 2)).shape == (
        1,
        3,
        224,
        224,
    )


def png_of_size(width: int, height: int) -> bytes:
    """A PNG that says it is that large, in a hundred bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(b"\0" * 64)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(100_000, 100_000), (2**31 - 1, 2**31 - 1), (65_535, 65_535)])
def test_bombs_are_refused_before_they_are_unpacked(size, tmp_path) -> None:
    resource = pytest.importorskip("resource")
    path = tmp_path / "bomb.png"
    path.write_bytes(png_of_size(*size))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match=r"image 0 .*bomb\.png"):
        pixel_values_from_images([path], SPEC)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


@given(st.integers(0, 2), st.integers(0, 3 * 64 - 1), st.sampled_from([np.nan, np.inf, -np.inf]))
@settings(max_examples=60, deadline=None)
def test_a_value_that_is_not_finite_is_named_by_its_image(toy_bundle, toy, image, place, value) -> None:
    classifier = shared(toy_bundle())
    pixel_values = toy.pixel_values(3)
    pixel_values[image].reshape(-1)[place] = value
    with pytest.raises(InputError, match=f"NaN or infinity in image {image}"):
        classifier.forward(pixel_values)


_OPEN: dict[str, Classifier] = {}


def shared(bundle) -> Classifier:
    """One classifier for all examples."""
    return _OPEN.setdefault(str(bundle), Classifier(bundle, "cpu"))


def bmp_of_runs(width: int, height: int) -> bytes:
    """A run-length encoded BMP, which Pillow decodes in Python: it says to end each line at once."""
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, 0, 0, 0, 256, 0)
    offset = 14 + len(header) + 1024
    return struct.pack("<2sIHHI", b"BM", offset + 64, 0, 0, offset) + header + b"\0" * 1024 + b"\1\0\0\0" * 16


@pytest.mark.parametrize("as_file", [True, False])
def test_what_is_decoded_slowly_may_not_be_large(tmp_path, as_file) -> None:
    path = tmp_path / "slow.bmp"
    path.write_bytes(bmp_of_runs(16_000_000, 9))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of many pixels
        source = path if as_file else Image.open(io.BytesIO(path.read_bytes()))
        start = time.perf_counter()
        with pytest.raises(InputError, match=r"16000000 x 9 pixels of BMP, which is decoded slowly"):
            pixel_values_from_images([source], SPEC)
    assert time.perf_counter() - start < 1
    path.write_bytes(bmp_of_runs(30, 9))
    assert pixel_values_from_images([path], SPEC).shape == (1, 3, 8, 8)


def test_paths_that_the_system_refuses_are_named() -> None:
    with pytest.raises(InputError, match=r"cannot be read or is damaged .*too long"):
        pixel_values_from_images(["a" * 5000], SPEC)
    with pytest.raises(BundleError, match=r"cannot be read .*too long"):
        Classifier("a" * 5000)
