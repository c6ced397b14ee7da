"""Flags of 191 countries by eight vendors, from Iconify and Debian; two vendors are test only."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from ..arrays import SIZE, TaskArrays, split_arrays, square, trim
from ..downloads import Sources
from .iconify import PACKAGE, IconSet, load_icon_set

TEST_VENDORS = ("cif", "openmoji")
RENDERED_WIDTH = 96
_REGIONAL_INDICATOR_A = 0x1F1E6

FlagReaders = dict[str, Callable[[], Image.Image]]


def build(sources: Sources) -> TaskArrays:
    """Renders each vendor's flags of the countries that all vendors have."""
    vendors = flags_of_vendors(sources)
    countries = sorted(set.intersection(*(set(flags) for flags in vendors.values())))
    # These only help to choose the countries: cut to a circle, too many flags look the same.
    del vendors["circle-flags"]
    images, labels, vendor_numbers = [], [], []
    for number, flags in enumerate(vendors.values()):
        for country, read_flag in flags.items():
            if country in countries:
                images.append(square(trim(read_flag()), SIZE, padding=0.03))
                labels.append(countries.index(country))
                vendor_numbers.append(number)
    is_test = np.isin(np.array(list(vendors))[vendor_numbers], TEST_VENDORS)
    return split_arrays(np.stack(images), np.array(labels), is_test, countries, np.array(vendor_numbers))


def flags_of_vendors(sources: Sources) -> dict[str, FlagReaders]:
    """Finds each vendor's flags by two-letter country code, of the countries that Twemoji has."""
    package = sources.npm(PACKAGE)
    twemoji, openmoji = load_icon_set(package, "twemoji"), load_icon_set(package, "openmoji")
    codes, openmoji_codes = emoji_of_countries(twemoji), emoji_of_countries(openmoji)
    code_of_name = {country_name(name): code for code, name in (openmoji_codes | codes).items()}

    vendors = {"flag-icons": readers(load_icon_set(package, "flag"), {code: f"{code}-4x3" for code in codes})}
    for prefix in ("circle-flags", "flagpack", "cif"):
        vendors[prefix] = readers(load_icon_set(package, prefix), {code: code for code in codes})
    vendors["twemoji"] = readers(twemoji, codes)
    vendors["openmoji"] = readers(openmoji, openmoji_codes)
    for prefix in ("emojione", "emojione-v1"):
        icon_set = load_icon_set(package, prefix)
        names = {name: country_name(name) for name in icon_set.icons if name.startswith("flag-for")}
        known = {code_of_name[country]: name for name, country in names.items() if country in code_of_name}
        vendors[prefix] = readers(icon_set, known)
    folder = sources.apt("iso-flags-png-320x240") / "usr/share/iso-flags-png-320x240"
    files = {code: folder / f"{code}.png" for code in codes}
    vendors["iso-flags"] = {code: partial(read_png, path) for code, path in files.items() if path.is_file()}
    return vendors


def readers(icon_set: IconSet, names: dict[str, str]) -> FlagReaders:
    """Returns for each country code whose icon the set has how to render it."""
    return {
        code: partial(icon_set.render, name, RENDERED_WIDTH)
        for code, name in names.items()
        if name in icon_set.icons
    }


def read_png(path: Path) -> Image.Image:
    """Reads an image file."""
    with Image.open(path) as file:
        return file.convert("RGBA")


def country_name(icon_name: str) -> str:
    """Returns the country in the name of a flag emoji (`flag-for-albania` -> `albania`)."""
    return icon_name.removeprefix("flag-").removeprefix("for-")


def emoji_of_countries(icon_set: IconSet) -> dict[str, str]:
    """Maps country codes to emoji names: a flag emoji is written as two regional indicators, one a letter."""
    emoji = {}
    for characters, name in icon_set.content.get("chars", {}).items():
        points = characters.split("-")
        if len(points) == 2 and all(point.startswith("1f1") for point in points):
            emoji["".join(chr(int(point, 16) - _REGIONAL_INDICATOR_A + ord("a")) for point in points)] = name
    return emoji
