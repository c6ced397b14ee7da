"""Silhouettes of ten animals, from PyPI's Animal-MNIST; no test animal is a train animal mirrored or not."""

from __future__ import annotations

import gzip
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np

from ..arrays import SIZE, Images, Ints, TaskArrays, cluster, draw_groups, similar_pairs, split_arrays
from ..downloads import Sources

SEED = 0
CLASSES = ("Bear", "Bird", "Cat", "Cow", "Dog", "Elephant", "Giraffe", "Horse", "Sheep", "Zebra")
SAME_ANIMAL = 0.95
TEST_SIZE = 2_000

# All that a pickled array needs; numpy 2 renamed the module of the first.
_RECONSTRUCT: Callable[..., Any] = np.zeros(0).__reduce__()[0]  # type: ignore[assignment]
_ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}


class ForbiddenPickleError(pickle.UnpicklingError):
    """A pickle asks for something that an array does not consist of."""

    def __init__(self, module: str, name: str) -> None:
        super().__init__(f"refused to load {module}.{name}: only plain numpy arrays are read")


class ArrayUnpickler(pickle.Unpickler):
    """Reads pickled numpy arrays and refuses every other class or function (a pickle can name any)."""

    def find_class(self, module: str, name: str) -> Any:
        """Looks up one of the names that a pickled array holds."""
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise ForbiddenPickleError(module, name) from None


def build(sources: Sources) -> TaskArrays:
    """Reads Animal-MNIST, drops exact duplicates and splits by clusters of near-duplicates."""
    folder = sources.pypi("animal-mnist") / "animal_mnist/data/Animal_MNIST"
    images: Images = read_array(gzip.decompress((folder / "animal_data_version_3.gz").read_bytes()))
    labels: Ints = read_array(gzip.decompress((folder / "animal_label_version_3.gz").read_bytes()))
    images, labels = images.reshape(-1, 28, 28), labels.astype(np.int64)

    # The package is in the order of its classes.
    order = np.random.default_rng(SEED).permutation(len(images))
    order = np.concatenate([order[TEST_SIZE:], order[:TEST_SIZE]])
    images, labels = images[order], labels[order]
    _, first = np.unique(images.reshape(len(images), -1), axis=0, return_index=True)
    first.sort()
    images, labels = images[first], labels[first]

    animals = cluster(len(images), similar_pairs(images, SAME_ANIMAL, mirrored=True))
    names, sizes = np.unique(animals, return_counts=True)
    rng = np.random.default_rng(SEED)
    is_test = np.isin(animals, draw_groups(names, sizes, rng, TEST_SIZE, overshoot=True))
    border = (SIZE - 28) // 2
    images = np.pad(images, ((0, 0), (border, border), (border, border)))
    return split_arrays(images, labels, is_test, CLASSES, animals)


def read_array(content: bytes) -> np.ndarray[Any, Any]:
    """Reads one pickled numpy array.

    Raises:
        ForbiddenPickleError: the pickle names anything else than an array
    """
    return np.asarray(ArrayUnpickler(io.BytesIO(content)).load())
