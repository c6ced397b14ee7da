"""Forty concepts as icons of many designers, from Iconify; the test icons come from other design families."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..arrays import (
    SIZE,
    Images,
    TaskArrays,
    draw_groups,
    highest_correlation,
    opaque_share,
    split_arrays,
    square,
    trim,
)
from ..downloads import Sources
from .iconify import PACKAGE, IconSet, load_collections, load_icon_set

SEED = 1
# Concept -> the icon names that show it; only names that differ are listed.
NAMES_OF_CONCEPT = {
    "calendar": ("calendar",),
    "star": ("star",),
    "camera": ("camera",),
    "bookmark": ("bookmark",),
    "link": ("link",),
    "cloud": ("cloud",),
    "heart": ("heart",),
    "home": ("home", "house"),
    "folder": ("folder",),
    "lock": ("lock",),
    "flag": ("flag",),
    "key": ("key",),
    "search": ("search", "magnifying-glass", "magnify"),
    "shield": ("shield",),
    "card": ("credit-card",),
    "clock": ("clock",),
    "bell": ("bell", "notification"),
    "eye": ("eye",),
    "sun": ("sun",),
    "moon": ("moon",),
    "phone": ("phone", "call"),
    "globe": ("globe",),
    "clipboard": ("clipboard",),
    "book": ("book",),
    "trophy": ("trophy",),
    "gift": ("gift",),
    "map": ("map",),
    "rocket": ("rocket",),
    "mic": ("microphone", "mic"),
    "user": ("user", "person", "account"),
    "pencil": ("pencil", "edit"),
    "trash": ("trash", "delete", "bin"),
    "printer": ("printer", "print"),
    "cart": ("shopping-cart", "cart"),
    "umbrella": ("umbrella",),
    "car": ("car",),
    "wifi": ("wifi",),
    "gear": ("settings", "cog", "gear"),
    "mail": ("mail", "envelope", "email"),
    "crown": ("crown",),
}
CLASSES = tuple(NAMES_OF_CONCEPT)
CONCEPT_OF_NAME = {name: concept for concept, names in NAMES_OF_CONCEPT.items() for name in names}
STYLE_SUFFIX = re.compile(
    r"-(outline|outlined|filled|fill|solid|line|bold|light|thin|duotone|regular|rounded|round|sharp|twotone|linear"
    r"|broken|16|20|24|28|32|48|o|color|sm|lg|mini|micro|bulk|line-duotone|bold-duotone|outline-rounded"
    r"|outline-sharp)$"
)
LICENCES = {
    "MIT",
    "Apache-2.0",
    "CC0-1.0",
    "ISC",
    "BSD-3-Clause",
    "CC-BY-4.0",
    "CC-BY-3.0",
    "OFL-1.1",
    "MPL-2.0",
    "Unlicense",
}
OTHER_CATEGORIES = {"Logos", "Programming", "Flags / Maps"}
# Sets of one designer, or drawn after another: by the beginning of their names, and one by one.
FAMILY_PREFIXES = (
    "streamline",
    "fluent",
    "icon-park",
    "pepicons",
    "heroicons",
    "fa",
    "fluent-emoji",
    "emojione",
    "noto",
    "material",
    "iconoir",
    "glyphs",
    "bx",
    "ion",
    "vscode",
)
FAMILY_OF_SET = {
    "mdi": "material",
    "ic": "material",
    "mdi-light": "material",
    "line-md": "material",
    "famicons": "ion",
    "boxicons": "bx",
    "lucide": "feather",
    "fe": "feather",
    "zmdi": "material",
    "twemoji": "emoji",
    "openmoji": "emoji",
}
ICONS_PER_SET = 3
RENDERED_WIDTH = 96
TEST_SHARE = 0.22
SAME_DRAWING = 0.95


def build(sources: Sources) -> TaskArrays:
    """Renders the icons, splits them by design family, and drops test icons that resemble a train icon."""
    package = sources.npm(PACKAGE)
    images, labels, families = [], [], []
    for prefix in usable_sets(package):
        for name, image in render_concepts(load_icon_set(package, prefix)):
            images.append(image)
            labels.append(CLASSES.index(concept_of(name)))
            families.append(family_of(prefix))
    names, family_numbers = np.unique(families, return_inverse=True)
    sizes = np.bincount(family_numbers)
    drawn = draw_groups(np.arange(len(names)), sizes, np.random.default_rng(SEED), TEST_SHARE * len(images))
    is_test = np.isin(family_numbers, drawn)
    arrays = split_arrays(np.stack(images), np.array(labels), is_test, CLASSES, family_numbers)
    different = highest_correlation(arrays.test_images, arrays.train_images) <= SAME_DRAWING
    return replace(
        arrays, test_images=arrays.test_images[different], test_labels=arrays.test_labels[different]
    )


def usable_sets(package: Path) -> list[str]:
    """Lists the sets of interface icons whose licence lets them be redistributed."""
    return [
        prefix
        for prefix, facts in sorted(load_collections(package).items())
        if facts["license"].get("spdx") in LICENCES and facts.get("category") not in OTHER_CATEGORIES
    ]


def render_concepts(icon_set: IconSet) -> list[tuple[str, Images]]:
    """Renders up to three icons of each concept, those of the shortest names first."""
    rendered: list[tuple[str, Images]] = []
    counts: Counter[str] = Counter()
    for name in sorted(icon_set.icons, key=lambda name: (len(name), name)):
        icon = icon_set.icons[name]
        if name in icon_set.aliases or icon.get("hidden") or "animate" in icon["body"]:
            continue
        concept = concept_of(name)
        if concept is None or counts[concept] == ICONS_PER_SET:
            continue
        image = icon_set.render(name, RENDERED_WIDTH)
        if opaque_share(image, above=40) >= 0.01:
            counts[concept] += 1
            rendered.append((name, square(trim(image), SIZE, padding=0.06)))
    return rendered


def concept_of(name: str) -> str | None:
    """Returns the concept an icon name stands for, style words aside (`home-outline` -> `home`)."""
    for _ in range(3):
        name = STYLE_SUFFIX.sub("", name)
    return CONCEPT_OF_NAME.get(name)


def family_of(prefix: str) -> str:
    """Returns the design family of an icon set."""
    for family in FAMILY_PREFIXES:
        if prefix.startswith(family):
            return family
    return FAMILY_OF_SET.get(prefix, prefix)
