"""Images to `pixel_values`: open_clip's validation transform with Pillow and numpy alone.

The order matters and is open_clip's: resize in the image's own mode, crop, and only then convert to RGB. Like
open_clip this ignores the EXIF orientation and takes the first frame of an animation.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from runtime.bundle import PreprocessSpec
from runtime.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

ImageSource: TypeAlias = "str | os.PathLike[str] | Image | NDArray[np.uint8]"

# A resized image is made whole, as open_clip does, up to this many pixels (those of a camera). Of a longer
# one (a strip of 1 x 30000 becomes 224 x 6720000) only the crop is made; Pillow then clips between its two
# passes in another order, which can be seen in noise.
_MAX_WHOLE_PIXELS = 1 << 25
# Pillow decodes a few formats in Python, up to a second for a million pixels; a hundred bytes of such a file can ask
# for a hundred million.
_MAX_SLOW_PIXELS = 1 << 22


def load_image(source: ImageSource, where: str = "image") -> Image:
    """Decode an image, or wrap an array.

    Args:
        source: path, Pillow image, or uint8 array: grey [H, W] or [H, W, 1], RGB [H, W, 3], RGBA [H, W, 4].
        where: named in errors.

    Raises:
        InputError: no such file, not an image, damaged, too large to be decoded safely, or an unfit array.
    """
    from PIL import Image as pil  # noqa: N813, PLC0415 (deferred: importing runtime stays light)

    if isinstance(source, np.ndarray):
        return pil.fromarray(_checked_pixels(source, where))
    if isinstance(source, str | os.PathLike):
        return _decode(Path(source), f"{where} ({os.fspath(source)})")
    if not isinstance(source, pil.Image):
        raise InputError(
            f"{where}: expected a path, a Pillow image or a uint8 array, got {type(source).__name__}."
        )
    if min(source.size) < 1:
        raise InputError(f"{where}: the image is empty, {source.size[0]} x {source.size[1]} pixels.")
    _require_quick_decoder(source, where)
    try:
        source.load()
    except Exception as error:  # Pillow's decoders raise almost anything on damaged data
        raise InputError(f"{where}: damaged image ({error}).") from error
    return source


def _require_quick_decoder(image: Image, where: str) -> None:
    from PIL.Image import DECODERS  # noqa: PLC0415

    slow = any(tile[0] in DECODERS for tile in getattr(image, "tile", ()))
    if slow and image.size[0] * image.size[1] > _MAX_SLOW_PIXELS:
        raise InputError(
            f"{where}: {image.size[0]} x {image.size[1]} pixels of {image.format}, which is decoded slowly: at most "
            f"{_MAX_SLOW_PIXELS} are read; convert it to PNG or JPEG first."
        )


def _checked_pixels(pixels: NDArray[Any], where: str) -> NDArray[np.uint8]:
    shape = pixels.shape
    if pixels.dtype != np.uint8:
        raise InputError(f"{where}: expected an array of uint8 in 0..255, got {pixels.dtype}.")
    if len(shape) not in (2, 3) or min(shape) < 1 or (len(shape) == 3 and shape[2] not in (1, 3, 4)):
        raise InputError(
            f"{where}: expected an array of shape [H, W], [H, W, 3] or [H, W, 4], got {list(shape)}."
        )
    squeezed = pixels[:, :, 0] if len(shape) == 3 and shape[2] == 1 else pixels
    return np.ascontiguousarray(squeezed)


def _require_file(path: Path, where: str) -> None:
    if not path.is_file():
        raise InputError(f"{where}: {'not a file' if path.exists() else 'no such file'}.")


def _decode(path: Path, where: str) -> Image:
    from PIL import Image as pil  # noqa: N813, PLC0415
    from PIL import UnidentifiedImageError  # noqa: PLC0415

    try:
        _require_file(path, where)
        with pil.open(path) as image:
            # Encapsulated PostScript is a program, which Pillow would run with Ghostscript.
            if image.format != "EPS":
                _require_quick_decoder(image, where)
                image.load()
                return image
    except InputError:
        raise
    except UnidentifiedImageError as error:
        raise InputError(f"{where}: not an image in a format that Pillow reads.") from error
    except (pil.DecompressionBombError, pil.DecompressionBombWarning) as error:
        raise InputError(f"{where}: {error} Shrink it first.") from error
    except OSError as error:
        raise InputError(f"{where}: cannot be read or is damaged ({error}).") from error
    except Exception as error:  # Pillow's decoders raise almost anything on damaged data
        raise InputError(f"{where}: damaged image ({error}).") from error
    raise InputError(f"{where}: PostScript is a program, not an image; convert it to PNG first.")


def pixel_values_from_images(
    sources: Sequence[ImageSource], spec: PreprocessSpec, first_index: int = 0
) -> NDArray[Any]:
    """Load, resize, crop and normalise a batch.

    Args:
        sources: images, see `load_image`.
        spec: of the bundle.
        first_index: number of the first image, for errors.

    Returns:
        pixel_values: normalised RGB [B, 3, H, W] float32; with `spec.dtype` uint8 bytes [B, H, W, 3] uint8

    Raises:
        InputError: naming the first image that cannot be used, and why.

    Example:
        >>> spec = PreprocessSpec((8, 8), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
        >>> pixel_values = pixel_values_from_images([np.zeros((20, 30, 3), np.uint8)], spec)
        >>> pixel_values.shape, float(pixel_values.min())
        ((1, 3, 8, 8), -1.0)
    """
    pixel_values = np.empty((len(sources), *spec.input_shape), spec.dtype)
    for row, source in enumerate(sources):
        where = f"image {first_index + row}"
        image = load_image(source, where)
        try:
            rgb = _rgb(_fitted(image, spec))
            pixel_values[row] = rgb if spec.dtype == "uint8" else normalized(rgb, spec)
        except (ValueError, OSError, MemoryError) as error:
            raise InputError(
                f"{where}: this {image.size[0]} x {image.size[1]} image of mode {image.mode} cannot be "
                f"converted to RGB ({error})."
            ) from error
    return pixel_values


def resized_size(size: tuple[int, int], spec: PreprocessSpec) -> tuple[int, int]:
    """Size before the crop, never smaller than `spec.image_size` (so nothing is ever padded).

    Square targets follow torchvision's `Resize(int)`, which truncates the longer side; other targets follow
    timm's `ResizeKeepRatio`, which rounds both.

    Args:
        size: (width, height) of the image.
        spec: of the bundle.

    Returns:
        (width, height).

    Example:
        >>> spec = PreprocessSpec((224, 224), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
        >>> resized_size((640, 480), spec)
        (298, 224)
    """
    width, height = size
    high, wide = spec.image_size
    if spec.resize_mode == "squash":
        return wide, high
    if high != wide:
        ratio = min(height / high, width / wide)
        return round(width / ratio), round(height / ratio)
    if width <= height:
        return high, int(high * height / width)
    return int(high * width / height), high


def _fitted(image: Image, spec: PreprocessSpec) -> Image:
    """Resize and centre crop, in the image's own mode."""
    from PIL.Image import Resampling  # noqa: PLC0415

    high, wide = spec.image_size
    full_width, full_height = resized_size(image.size, spec)
    left, top = round((full_width - wide) / 2), round((full_height - high) / 2)
    # For targets that are not square open_clip resizes bicubically whatever `interpolation` says.
    bilinear = spec.interpolation == "bilinear" and (high == wide or spec.resize_mode == "squash")
    resampling = Resampling.BILINEAR if bilinear else Resampling.BICUBIC
    if full_width * full_height > _MAX_WHOLE_PIXELS:
        x, y = image.size[0] / full_width, image.size[1] / full_height
        box = (left * x, top * y, min((left + wide) * x, image.size[0]), min((top + high) * y, image.size[1]))
        return image.resize((wide, high), resampling, box)
    if image.size != (full_width, full_height):
        image = image.resize((full_width, full_height), resampling)
    return image.crop((left, top, left + wide, top + high))


def _rgb(image: Image) -> NDArray[np.uint8]:
    """Convert an image of the final size, which belongs to the caller of this function alone. [H, W, 3]"""
    # Transparent colours count as opaque, as in open_clip; kept, they would only make Pillow warn.
    image.info.pop("transparency", None)
    return np.asarray(image.convert("RGB"))


def normalized(rgb: NDArray[np.uint8], spec: PreprocessSpec) -> NDArray[np.float32]:
    """Of images at their final size: [.., H, W, 3] -> [.., 3, H, W], a view of another order."""
    pixels = np.asarray(rgb, np.float32) / np.float32(255)
    mean, std = np.asarray(spec.mean, np.float32), np.asarray(spec.std, np.float32)
    return np.moveaxis((pixels - mean) / std, -1, -3)
