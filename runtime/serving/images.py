"""Encoded images of strangers to Pillow images: few formats, bounded size, the header read before the pixels."""

from __future__ import annotations

import io
import warnings

from PIL import Image, UnidentifiedImageError

from runtime.errors import InputError
from runtime.preprocess import load_image

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")


def image_from_bytes(data: bytes, where: str, max_pixels: int) -> Image.Image:
    """Decode an image.

    Args:
        data: the file's content.
        where: named in errors.
        max_pixels: width times height, at most; asked of the header, before memory is taken.

    Raises:
        InputError: empty, of another format than `FORMATS`, too large, or damaged.
    """
    if not data:
        raise InputError(f"{where}: no bytes; send the content of an image file.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own, larger limit, and notes on odd metadata
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            _require_size(image.size, where, max_pixels)
            return load_image(image, where)
    except UnidentifiedImageError as error:
        raise InputError(f"{where}: not an image; {', '.join(FORMATS)} are read.") from error
    except Image.DecompressionBombError as error:
        raise InputError(f"{where}: more than {max_pixels} pixels; shrink it.") from error
    except InputError:
        raise
    except Exception as error:  # Pillow's parsers raise almost anything on damaged headers
        raise InputError(f"{where}: damaged image ({error}).") from error


def _require_size(size: tuple[int, int], where: str, max_pixels: int) -> None:
    if size[0] * size[1] > max_pixels:
        raise InputError(f"{where}: {size[0]} x {size[1]} pixels, at most {max_pixels} are read; shrink it.")
