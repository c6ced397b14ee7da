"""Images of nothing, made without data."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mass_export.artifact import Artifact
from mass_export.image_input import mean_and_std
from mass_export.verify import enlarged
from runtime.bundle import PreprocessSpec

SYNTHETIC_IMAGES = 256
DULL_IMAGES = 16  # of a kind


def synthetic_images(artifact: Artifact, count: int = SYNTHETIC_IMAGES, seed: int = 0) -> NDArray[np.float32]:
    """Images of nothing: 1/f noise of several slopes, patches, gradients and lines, normalised. [n, 3, H, W]"""
    rng = np.random.default_rng(seed)
    H, W = artifact.info.vision.image_size
    frequency = np.hypot(np.fft.fftfreq(H)[:, None], np.fft.fftfreq(W)[None, :])
    frequency[0, 0] = 1 / max(H, W)
    images = np.empty((count, 3, H, W), np.float32)
    for i in range(count):
        kind = i % 4
        if kind == 0:  # coloured 1/f noise
            spectrum = np.fft.fft2(rng.standard_normal((3, H, W))) / frequency ** rng.uniform(0.3, 2)
            picture = np.fft.ifft2(spectrum).real
        elif kind == 1:  # flat patches
            cells = int(rng.integers(2, 9))
            picture = enlarged(rng.random((3, cells, cells)), H, W)
        elif kind == 2:  # a light shape on a dark ground, or the other way round
            rows, columns = np.mgrid[0:H, 0:W]
            angle, width = rng.uniform(0, np.pi, 3), rng.uniform(1, 4, 3)
            distance = [
                abs((rows - rng.uniform(0, H)) * np.cos(a) + (columns - rng.uniform(0, W)) * np.sin(a)) / w
                for a, w in zip(angle, width, strict=True)
            ]
            picture = np.repeat((np.min(distance, axis=0) < 1)[None].astype(float), 3, axis=0)
            picture = picture if rng.random() < 0.5 else 1 - picture
        else:  # smooth colour gradients
            picture = gradient(rng.random((3, 2, 2)), H, W)
        span = picture.max() - picture.min()
        images[i] = (picture - picture.min()) / (span if span > 0 else 1)
    mean, std = mean_and_std(artifact.info.preprocess)
    return (images - mean) / std


def dull_images(
    pixel_values: NDArray[np.float32], spec: PreprocessSpec, seed: int = 0
) -> NDArray[np.float32]:
    """Images that show nothing: the given ones at a tenth of their contrast, blank ones, smooth gradients.

    Args:
        pixel_values: normalised; some are taken. [n, 3, H, W]
        spec: of the normalisation.
        seed: of the choice.

    Returns:
        normalised. [M, 3, H, W]
    """
    rng = np.random.default_rng(seed)
    H, W = spec.image_size
    mean, std = mean_and_std(spec)
    pictures = pixel_values[rng.permutation(len(pixel_values))[:DULL_IMAGES]] * std + mean
    middle = pictures.mean(axis=(2, 3), keepdims=True)
    blank = np.concatenate([np.linspace(0, 1, 8)[:, None] * np.ones(3), rng.random((DULL_IMAGES // 2, 3))])
    images = [
        middle + (pictures - middle) / 10,
        np.broadcast_to(blank[:, :, None, None], (len(blank), 3, H, W)),
        gradient(rng.random((DULL_IMAGES, 3, 2, 2)), H, W),
    ]
    normalised: NDArray[np.float32] = ((np.concatenate(images) - mean) / std).astype(np.float32)
    return normalised


def gradient(corners: NDArray[Any], H: int, W: int) -> NDArray[Any]:
    """Bilinear between the values of the four corners: [.., 2, 2] -> [.., H, W]"""
    down, across = np.linspace(0, 1, H)[:, None], np.linspace(0, 1, W)[None, :]
    top = corners[..., :1, :1] * (1 - across) + corners[..., :1, 1:] * across
    bottom = corners[..., 1:, :1] * (1 - across) + corners[..., 1:, 1:] * across
    picture: NDArray[Any] = top * (1 - down) + bottom * down
    return picture
