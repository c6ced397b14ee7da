from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from mass_export.datasets import find_images, load_labelled_images
from mass_export.errors import DataError
from mass_export.spec import TaskInfo
from runtime.bundle import PreprocessSpec

TASK = TaskInfo("pets", ("cat", "dog"))
SPEC = PreprocessSpec((8, 8), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def write_arrays(directory, split="test", **arrays):
    file = directory / "data" / TASK.name / f"{split}.npz"
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(file, **arrays)
    return file


def write_image(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (value, value, value)).save(path)


def test_images_of_an_array_file_come_in_order_with_their_labels(tmp_path):
    images = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((5, 8, 8, 3), np.uint8)
    write_arrays(tmp_path, images=images, labels=np.array([0, 1, 1, 0, 1]))
    batches = list(load_labelled_images(tmp_path, TASK).batches(SPEC, size=2))
    assert [len(labels) for _, labels in batches] == [2, 2, 1]
    assert np.concatenate([labels for _, labels in batches]).tolist() == [0, 1, 1, 0, 1]
    pixel_values = np.concatenate([values for values, _ in batches])
    np.testing.assert_allclose(pixel_values[:, 0, 0, 0] * 255, range(5), atol=1e-4)


def test_grey_images_are_taken_as_rgb(tmp_path):
    write_arrays(tmp_path, images=np.full((3, 8, 8), 255, np.uint8), labels=np.zeros(3, np.int64))
    assert load_labelled_images(tmp_path, TASK).pixel_values(SPEC).shape == (3, 3, 8, 8)


def test_each_split_has_its_own_images(tmp_path):
    for split, count in {"val": 2, "test": 3}.items():
        write_arrays(
            tmp_path, split, images=np.zeros((count, 8, 8), np.uint8), labels=np.zeros(count, np.int64)
        )
    assert len(load_labelled_images(tmp_path, TASK, "val")) == 2
    assert len(load_labelled_images(tmp_path, TASK)) == 3
    assert find_images(tmp_path, TASK.name, "train") is None


def test_folders_are_classes(tmp_path):
    write_image(tmp_path / "pets/test/dog/a.png", 10)
    write_image(tmp_path / "pets/test/dog/b.JPG", 10)
    write_image(tmp_path / "pets/test/cat/z.png", 20)
    (tmp_path / "pets/test/dog/notes.txt").write_text("no image")
    images = load_labelled_images(tmp_path, TASK)
    assert [path.name for path in images.sources] == ["z.png", "a.png", "b.JPG"]
    assert images.labels.tolist() == [0, 1, 1]


def test_a_sample_is_always_the_same_and_keeps_labels_with_their_images(tmp_path):
    images = np.arange(200, dtype=np.uint8)[:, None, None] * np.ones((200, 8, 8), np.uint8)
    write_arrays(tmp_path, images=images, labels=np.arange(200) // 100)
    sample, again = (load_labelled_images(tmp_path, TASK).sample(20) for _ in range(2))
    numbers = [int(image[0, 0]) for image in sample.sources]
    assert len(set(numbers)) == 20
    assert numbers == [int(image[0, 0]) for image in again.sources]
    assert sample.labels.tolist() == [number // 100 for number in numbers]
    assert set(sample.labels.tolist()) == {0, 1}
    assert len(sample.sample(100)) == 20


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"labels": [2, 0]}, r"1 label\(s\) out of range, such as 2: task 'pets' has 2 classes"),
        ({"labels": [-1, 0]}, "out of range, such as -1"),
        ({"labels": [0.0, 1.0]}, "labels: expected 2 integers"),
        ({"labels": [0]}, "labels: expected 2 integers"),
        ({"images": np.zeros((2, 8, 8), np.float32)}, "images: expected uint8"),
        ({"images": np.zeros((2, 8, 8, 4), np.uint8)}, "images: expected uint8"),
        ({"images": np.zeros((0, 8, 8), np.uint8), "labels": np.zeros(0, np.int64)}, "holds no images"),
        ({"images": np.array([None, {}], dtype=object)}, "not an array file"),
    ],
)
def test_arrays_that_do_not_fit_are_refused_with_the_file_and_the_fault(tmp_path, arrays, message):
    arrays = {"images": np.zeros((2, 8, 8), np.uint8), "labels": [0, 1]} | arrays
    file = write_arrays(tmp_path, **arrays)
    with pytest.raises(DataError, match=message) as caught:
        load_labelled_images(tmp_path, TASK)
    assert str(file) in str(caught.value)


def test_an_array_file_without_labels_is_refused(tmp_path):
    write_arrays(tmp_path, images=np.zeros((2, 8, 8), np.uint8))
    with pytest.raises(DataError, match="no array named labels"):
        load_labelled_images(tmp_path, TASK)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.9])
def test_a_truncated_array_file_is_refused(tmp_path, share):
    images = np.random.default_rng(0).integers(0, 255, (20, 8, 8), dtype=np.uint8)
    file = write_arrays(tmp_path, images=images, labels=np.zeros(20, np.int64))
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    with pytest.raises(DataError, match="not an array file"):
        load_labelled_images(tmp_path, TASK)


def test_damaged_bytes_in_an_array_file_are_refused(tmp_path):
    images = np.random.default_rng(0).integers(0, 255, (50, 8, 8), dtype=np.uint8)
    file = write_arrays(tmp_path, images=images, labels=np.zeros(50, np.int64))
    content = bytearray(file.read_bytes())
    content[600:700] = bytes(100)
    file.write_bytes(bytes(content))
    with pytest.raises(DataError, match="not an array file"):
        load_labelled_images(tmp_path, TASK)


def test_a_folder_that_is_no_class_is_refused(tmp_path):
    write_image(tmp_path / "pets/test/cat/a.png")
    write_image(tmp_path / "pets/test/horse/a.png")
    with pytest.raises(DataError, match=r"no class of task 'pets': horse\. Its classes: cat, dog"):
        load_labelled_images(tmp_path, TASK)


def test_class_folders_without_images_are_refused(tmp_path):
    (tmp_path / "pets/test/cat").mkdir(parents=True)
    with pytest.raises(DataError, match="no images in class folders"):
        load_labelled_images(tmp_path, TASK)


def test_missing_images_are_named_with_the_places_where_they_are_looked_for(tmp_path):
    with pytest.raises(DataError, match=r"no images of task 'pets', split 'val'.*val\.npz"):
        load_labelled_images(tmp_path, TASK, "val")


def test_a_text_file_called_png_is_named_when_its_batch_is_read(tmp_path):
    write_image(tmp_path / "pets/test/cat/a.png")
    (tmp_path / "pets/test/cat/b.png").write_text("no image")
    images = load_labelled_images(tmp_path, TASK)
    with pytest.raises(DataError, match=r"b\.png"):
        list(images.batches(SPEC))
