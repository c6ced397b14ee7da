"""Reads and renders the icon sets of the npm package `@iconify/json`."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

PACKAGE = "@iconify/json"


@dataclass(frozen=True)
class IconSet:
    """One icon set.

    Attributes:
        prefix: its name within Iconify
        icons: icon name -> its SVG body, and its box where that differs from the set's
        aliases: those names in `icons` that only stand for another icon
        content: the set's JSON file
    """

    prefix: str
    icons: dict[str, dict[str, Any]]
    aliases: frozenset[str]
    content: dict[str, Any]

    def render(self, name: str, width: int) -> Image.Image:
        """Renders an icon in black (where it names no colour) on a transparent ground. RGBA."""
        import resvg_py  # noqa: PLC0415 - only rebuilding the zoo needs it

        png = resvg_py.svg_to_bytes(svg_string=self.svg(name), width=width, skip_system_fonts=True)
        return Image.open(io.BytesIO(bytes(png))).convert("RGBA")

    def svg(self, name: str) -> str:
        """Returns an icon as an SVG file."""
        icon = self.icons[name]
        width = icon.get("width", self.content.get("width", 16))
        height = icon.get("height", self.content.get("height", 16))
        left, top = icon.get("left", 0), icon.get("top", 0)
        return (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
            f' width="{width}" height="{height}" viewBox="{left} {top} {width} {height}" color="#000">'
            f"{icon['body']}</svg>"
        )


def load_collections(package: Path) -> dict[str, dict[str, Any]]:
    """Reads what Iconify tells of each set: prefix -> name, author, licence, category."""
    collections: dict[str, dict[str, Any]] = json.loads(
        (package / "collections.json").read_text(encoding="utf-8")
    )
    return collections


def load_icon_set(package: Path, prefix: str) -> IconSet:
    """Reads one set; of its aliases those that neither turn nor mirror the icon."""
    content = json.loads((package / "json" / f"{prefix}.json").read_text(encoding="utf-8"))
    icons, aliases = dict(content["icons"]), set()
    for name, alias in content.get("aliases", {}).items():
        if (
            alias.get("parent") in icons
            and not alias.keys() & {"rotate", "hFlip", "vFlip"}
            and name not in icons
        ):
            icons[name] = icons[alias["parent"]]
            aliases.add(name)
    return IconSet(prefix, icons, frozenset(aliases), content)
