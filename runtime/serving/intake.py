"""From the three forms of a classify request to images, tasks and `top_k`."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request

from runtime.serving.problems import RequestProblem
from runtime.serving.settings import Limits

JSON_KEYS = {"images", "tasks", "top_k"}
MAX_TOP_K = 1000
_LINK = ("http:", "https:", "ftp:", "file:", "s3:", "gs:", "//")


@dataclass(frozen=True)
class Intake:
    """What was asked: (name, content) of each image, task names (none: all may answer), `top_k`."""

    images: tuple[tuple[str, bytes], ...]
    tasks: tuple[str, ...]
    top_k: int


async def read_request(request: Request, limits: Limits) -> Intake:
    """Read a request by its content type: JSON, multipart, or else the bytes of one image.

    Raises:
        RequestProblem: malformed, without images, with too many, or with links instead of bytes.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    tasks, top_k = _names(request.query_params.getlist("tasks")), request.query_params.get("top_k", "5")
    if kind == "application/json":
        intake = _from_json(await request.body(), tasks, top_k)
    elif kind == "multipart/form-data":
        try:
            parts = request.form(max_files=limits.max_images + 1, max_fields=64, max_part_size=1 << 16)
            async with parts as form:
                intake = await _from_form(form, tasks, top_k)
        except HTTPException as error:
            raise RequestProblem(400, f"multipart body: {error.detail}.") from error
    elif kind == "application/x-www-form-urlencoded":
        raise RequestProblem(
            415, "content type: an image cannot be sent as URL-encoded form; send its bytes as image/*."
        )
    else:
        intake = Intake((("0", await request.body()),), tasks, _top_k(top_k))
    if not intake.images:
        raise RequestProblem(400, "images: none given; send the bytes of at least one.")
    if len(intake.images) > limits.max_images:
        raise RequestProblem(
            413, f"images: {len(intake.images)} given, at most {limits.max_images} a request; send several."
        )
    return intake


def _from_json(body: bytes, tasks: tuple[str, ...], top_k: str) -> Intake:
    try:
        data = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestProblem(400, f"body: not valid JSON ({error}).") from error
    if not isinstance(data, dict):
        raise RequestProblem(400, f"body: expected an object with {sorted(JSON_KEYS)}.")
    unknown = sorted(set(data) - JSON_KEYS)
    if unknown:
        hint = (
            " Links are not followed: send the bytes in base64." if "url" in " ".join(unknown).lower() else ""
        )
        raise RequestProblem(400, f"body: unknown keys {unknown}; known are {sorted(JSON_KEYS)}.{hint}")
    images = data.get("images", [])
    if not isinstance(images, list):
        raise RequestProblem(400, "images: expected a list of base64 strings.")
    asked = data.get("tasks")
    if isinstance(asked, str):
        asked = [asked]
    if asked is not None and not (isinstance(asked, list) and all(isinstance(name, str) for name in asked)):
        raise RequestProblem(400, "tasks: expected a list of names.")
    decoded = tuple((str(index), _decoded(image, index)) for index, image in enumerate(images))
    return Intake(decoded, tasks if asked is None else tuple(asked), _top_k(data.get("top_k", top_k)))


def _decoded(image: Any, index: int) -> bytes:
    if isinstance(image, dict) and any("url" in str(key).lower() for key in image):
        image = "http:"
    if not isinstance(image, str):
        raise RequestProblem(400, f"images[{index}]: expected a base64 string, got {type(image).__name__}.")
    if image[:8].lower().startswith(_LINK):
        raise RequestProblem(
            400, f"images[{index}]: links are not followed; send the image's bytes in base64."
        )
    if image.startswith("data:"):  # holds the bytes itself
        head, _, image = image.partition(",")
        if not head.endswith(";base64"):
            raise RequestProblem(400, f"images[{index}]: a data: value must be in base64.")
    try:
        return base64.b64decode(image, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestProblem(400, f"images[{index}]: not valid base64 ({error}).") from error


async def _from_form(form: FormData, tasks: tuple[str, ...], top_k: str) -> Intake:
    images: list[tuple[str, bytes]] = []
    asked = list(tasks)
    for key, value in form.multi_items():
        if isinstance(value, UploadFile):
            images.append((value.filename or str(len(images)), await value.read()))
        elif key == "tasks":
            asked += _names([value])
        elif key == "top_k":
            top_k = value
        elif value[:8].lower().startswith(_LINK):
            raise RequestProblem(400, f"{key}: links are not followed; send the image as a file.")
        else:
            raise RequestProblem(400, f"{key}: unknown field; known are files, tasks and top_k.")
    return Intake(tuple(images), tuple(dict.fromkeys(asked)), _top_k(top_k))


def _names(values: Sequence[str]) -> tuple[str, ...]:
    """Names, repeated or separated by commas."""
    return tuple(name.strip() for value in values for name in value.split(",") if name.strip())


def _top_k(value: Any) -> int:
    text = "" if isinstance(value, bool | float) else str(value)
    found = int(text) if text.isascii() and text.isdigit() and len(text) <= 9 else 0
    if not 1 <= found <= MAX_TOP_K:
        raise RequestProblem(400, f"top_k: expected an integer in 1..{MAX_TOP_K}, got {str(value)[:40]!r}.")
    return found
