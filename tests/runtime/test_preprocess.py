"""Preprocessing equals open_clip's validation transform, and refuses what is not an image."""

import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from runtime.bundle import PreprocessSpec
from runtime.errors import InputError
from runtime.preprocess import load_image, pixel_values_from_images, resized_size

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
ONE_LEVEL = 1 / 255 / min(STD) + 1e-6


def spec_of(height=32, width=32, interpolation="bicubic", resize_mode="shortest"):
    return PreprocessSpec((height, width), MEAN, STD, interpolation, resize_mode)


def open_clip_pixel_values(image, spec):
    transform = pytest.importorskip("open_clip.transform").image_transform(
        tuple(spec.image_size), is_train=False, mean=spec.mean, std=spec.std,
        interpolation=spec.interpolation, resize_mode=spec.resize_mode,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return transform(image).numpy()


def random_image(mode="RGB", size=(45, 37), seed=0):
    width, height = size
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 4), dtype=np.uint8)
    if mode == "I;16":
        return Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    if mode in ("I", "F"):
        return Image.fromarray(pixels[..., 0]).convert(mode)
    if mode in ("RGBA", "CMYK"):
        return Image.frombytes(mode, size, pixels.tobytes())
    image = Image.fromarray(np.ascontiguousarray(pixels[..., :3]))
    if mode == "P":
        return image.quantize(32)
    return image.convert(mode)


def assert_within_one_level(image, spec):
    expected = open_clip_pixel_values(image.copy(), spec)
    actual = pixel_values_from_images([image], spec)[0]
    assert actual.dtype == np.float32
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= ONE_LEVEL


@pytest.mark.parametrize(
    "size", [(45, 37), (37, 45), (33, 32), (32, 32), (5, 3), (1, 1), (200, 99), (64, 61)]
)
@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "RGBA", "LA", "CMYK", "YCbCr", "I;16", "I", "F"])
def test_every_mode_and_size_equals_open_clip(mode, size):
    assert_within_one_level(random_image(mode, size), spec_of())


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("resize_mode", ["shortest", "squash"])
@pytest.mark.parametrize("target", [(32, 32), (33, 33), (24, 40), (40, 24)])
def test_every_setting_equals_open_clip(interpolation, resize_mode, target):
    for size in [(45, 37), (20, 51)]:
        assert_within_one_level(random_image(size=size), spec_of(*target, interpolation, resize_mode))


@pytest.mark.parametrize("size", [(2, 301), (301, 2), (3, 1000), (1, 70)])
@pytest.mark.parametrize("mode", ["RGB", "P", "RGBA"])
def test_elongated_images_equal_open_clip(size, mode):
    assert_within_one_level(random_image(mode, size), spec_of(16, 16))


def test_a_strip_is_cropped_without_making_the_whole_resized_image():
    ramp = np.tile(np.linspace(0, 255, 30_000).astype(np.uint8)[None, :, None], (1, 1, 3))
    spec = spec_of(224, 224)
    pixel_values = pixel_values_from_images([ramp, ramp.transpose(1, 0, 2)], spec)
    middle = (127 / 255 - np.array(MEAN)) / np.array(STD)
    assert np.abs(pixel_values - middle[:, None, None]).max() <= ONE_LEVEL


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 400), st.integers(1, 400))
def test_the_resized_image_is_never_smaller_than_the_crop(width, height, high, wide):
    full_width, full_height = resized_size((width, height), spec_of(high, wide))
    assert full_width >= wide
    assert full_height >= high


def test_exif_orientation_is_ignored_as_in_open_clip(tmp_path):
    image = random_image(size=(50, 34))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "rotated.png", exif=exif)
    with Image.open(tmp_path / "rotated.png") as reread:
        expected = open_clip_pixel_values(reread, spec_of())
    assert np.array_equal(pixel_values_from_images([tmp_path / "rotated.png"], spec_of())[0], expected)


def test_a_palette_with_transparency_neither_warns_nor_changes_the_image_given():
    image = random_image("P")
    image.info["transparency"] = bytes(range(20))
    assert_within_one_level(image, spec_of())
    assert "transparency" in image.info


def test_paths_arrays_and_pillow_images_give_the_same_values(tmp_path):
    image = random_image()
    image.save(tmp_path / "a.png")
    sources = [image, np.asarray(image), tmp_path / "a.png", str(tmp_path / "a.png")]
    pixel_values = pixel_values_from_images(sources, spec_of())
    assert pixel_values.shape == (4, 3, 32, 32)
    assert all(np.array_equal(pixel_values[0], other) for other in pixel_values[1:])


def test_grey_arrays_may_have_a_channel_axis():
    grey = np.asarray(random_image("L"))
    pixel_values = pixel_values_from_images([grey, grey[:, :, None], grey[:, ::-1][:, ::-1]], spec_of())
    assert np.array_equal(pixel_values[0], pixel_values[1])
    assert np.array_equal(pixel_values[0], pixel_values[2])


def refused(source, match):
    with pytest.raises(InputError, match=match):
        pixel_values_from_images([random_image(), source], spec_of(), first_index=6)


def test_a_text_file_called_jpg_is_named(tmp_path):
    (tmp_path / "note.jpg").write_text("not an image")
    refused(tmp_path / "note.jpg", r"image 7 \(.*note\.jpg\): not an image")


def test_a_missing_file_and_a_directory_are_named(tmp_path):
    refused(tmp_path / "gone.png", r"image 7 \(.*gone\.png\): no such file")
    refused(str(tmp_path), r"image 7 \(.*\): not a file")


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "bmp", "tiff", "webp"])
def test_a_truncated_file_is_refused(tmp_path, suffix):
    path = tmp_path / f"cut.{suffix}"
    random_image(size=(90, 80)).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    refused(path, r"image 7 \(.*cut\.")


def test_a_truncated_pillow_image_is_refused(tmp_path):
    path = tmp_path / "cut.png"
    random_image(size=(90, 80)).save(path)
    path.write_bytes(path.read_bytes()[:3000])
    with Image.open(path) as lazy:
        refused(lazy, "image 7: damaged image")


def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch):
    random_image(size=(90, 80)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    refused(tmp_path / "bomb.png", r"image 7 \(.*bomb\.png\).*Shrink it first")


def test_postscript_is_never_run(tmp_path):
    random_image().save(tmp_path / "program.png", "EPS")
    refused(tmp_path / "program.png", "PostScript is a program")


@pytest.mark.parametrize(
    ("array", "match"),
    [
        (np.zeros((5, 5, 3)), "uint8"),
        (np.zeros((5, 5, 3), np.int64), "uint8"),
        (np.zeros((3, 5, 5), np.uint8), "shape"),
        (np.zeros((5,), np.uint8), "shape"),
        (np.zeros((0, 5, 3), np.uint8), "shape"),
        (np.zeros((2, 5, 5, 3), np.uint8), "shape"),
    ],
)
def test_an_array_of_another_dtype_or_shape_is_refused(array, match):
    refused(array, rf"image 7: .*{match}")


def test_anything_else_is_refused():
    refused(None, "image 7: expected a path, a Pillow image or a uint8 array, got NoneType")
    refused(Image.new("RGB", (0, 4)), "image 7: the image is empty")


def test_a_path_object_is_opened_and_closed(tmp_path):
    random_image().save(tmp_path / "a.png")
    image = load_image(Path(tmp_path / "a.png"))
    (tmp_path / "a.png").unlink()
    assert image.getpixel((0, 0)) is not None
