"""Emoji by group, from nine vendors in Iconify; all vendors' drawings of a test emoji are test images."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from ..arrays import (
    SIZE,
    Bools,
    Images,
    Ints,
    TaskArrays,
    cluster,
    draw_groups,
    opaque_share,
    sampled,
    similar_pairs,
    split_arrays,
    square,
    trim,
)
from ..downloads import Sources
from .iconify import PACKAGE, IconSet, load_icon_set

SEED = 0
CLASS_OF_GROUP = {
    "Smileys & Emotion": "smiley",
    "People & Body": "people",
    "Animals & Nature": "animal/nature",
    "Food & Drink": "food",
    "Travel & Places": "travel",
    "Activities": "activity",
    "Objects": "object",
    "Symbols": "symbol",
}
CLASSES = tuple(CLASS_OF_GROUP.values())
VENDORS = (
    "noto",
    "noto-v1",
    "twemoji",
    "openmoji",
    "fluent-emoji-flat",
    "fluent-emoji",
    "emojione",
    "emojione-v1",
    "fxemoji",
)
SKIN_TONE = re.compile(r"skin-tone|-(light|medium|dark|medium-light|medium-dark)(-|$)")
PERSON_BEFORE = re.compile(r"^(man|woman|person|men|women|people|boy|girl|mx|male|female)-")
PERSON_BEHIND = re.compile(r"-(man|woman|men|women|facing-right|selector)$")
# Emoji that are variations of one drawing: a pattern of their names and the name they share.
VARIATIONS = (
    (re.compile(r"o-clock|thirty"), "CLOCK"),
    (re.compile(r"^(?!.*cake).*moon"), "MOON"),
    (re.compile(r"^globe-showing"), "GLOBE"),
    (re.compile(r"^(family|kiss|couple|holding-hands)"), "FAMILY"),
    (re.compile(r"^(?!.*arrow).*button"), "BUTTON"),
    (re.compile(r"^keycap"), "KEYCAP"),
    (re.compile(r"(circle|square|diamond)$"), "SHAPE"),
    (re.compile(r"heart$"), "HEART"),
    (re.compile(r"books?$"), "BOOK"),
    (re.compile(r"mailbox"), "MAILBOX"),
    (re.compile(r"arrow$"), "ARROW"),
)
RENDERED_WIDTH = 64
SAME_DRAWING = 0.93
LARGEST_SHARE, TEST_SHARE = 0.10, 0.22
TRAIN_SIZE, TEST_SIZE = 12_000, 2_000


def build(sources: Sources) -> TaskArrays:
    """Renders the emoji, joins variations and look-alikes, and splits each group by these."""
    package = sources.npm(PACKAGE)
    group_of_name = groups_of_names(package)
    images, labels, subjects = [], [], []
    for vendor in VENDORS:
        for name, image in render_emoji(load_icon_set(package, vendor), group_of_name):
            images.append(image)
            labels.append(CLASSES.index(CLASS_OF_GROUP[group_of_name[name]]))
            subjects.append(subject_of(name))
    pixels, classes = np.stack(images), np.array(labels)
    subject_names, subject_of_image = np.unique(subjects, return_inverse=True)
    alike = ((subject_of_image[i], subject_of_image[j]) for i, j in similar_pairs(pixels, SAME_DRAWING))
    groups = cluster(len(subject_names), alike)[subject_of_image]
    is_test = draw_test_emoji(groups, classes, np.random.default_rng(SEED))
    arrays = split_arrays(pixels, classes, is_test, CLASSES, groups)
    return sampled(arrays, "emoji", TRAIN_SIZE, TEST_SIZE)


def groups_of_names(package: Path) -> dict[str, str]:
    """Maps emoji names to the Unicode group they belong to, by Twemoji and, where that has none, by Noto."""
    groups: dict[str, str] = {}
    for vendor in ("twemoji", "noto"):
        own: dict[str, str] = {}
        for group, names in load_icon_set(package, vendor).content["categories"].items():
            own |= dict.fromkeys(names, group)
        groups = own | groups
    return groups


def render_emoji(icon_set: IconSet, group_of_name: dict[str, str]) -> list[tuple[str, Images]]:
    """Renders a vendor's emoji of the eight groups, without variants of the skin tone."""
    rendered = []
    for name in icon_set.icons:
        if (
            name in icon_set.aliases
            or group_of_name.get(name) not in CLASS_OF_GROUP
            or SKIN_TONE.search(name)
        ):
            continue
        image = icon_set.render(name, RENDERED_WIDTH)
        if opaque_share(image, above=40) >= 0.01:
            rendered.append((name, square(trim(image), SIZE, padding=0.04)))
    return rendered


def subject_of(name: str) -> str:
    """Returns what an emoji shows, one name for all variations of it (`woman-running` -> `running`)."""
    name = PERSON_BEHIND.sub("", PERSON_BEFORE.sub("", name))
    return next((subject for pattern, subject in VARIATIONS if pattern.search(name)), name)


def draw_test_emoji(groups: Ints, classes: Ints, rng: np.random.Generator) -> Bools:
    """Draws groups of each class until 22% of its images are test images; large groups stay in train."""
    is_test = np.zeros(len(groups), bool)
    for label in range(len(CLASSES)):
        members = classes == label
        names, sizes = np.unique(groups[members], return_counts=True)
        # A group can reach into other classes: all of it moves, though only this class's images count.
        whole_sizes = np.array([(groups == name).sum() for name in names])
        small = whole_sizes <= LARGEST_SHARE * members.sum()
        drawn = draw_groups(names, sizes, rng, TEST_SHARE * members.sum(), overshoot=True, eligible=small)
        is_test |= np.isin(groups, drawn)
    return is_test
