"""Unit sprites by race, from Debian's Battle for Wesnoth; the test units are in no train image."""

from __future__ import annotations

import numpy as np
from PIL import Image

from ..arrays import (
    SIZE,
    Bools,
    Ints,
    TaskArrays,
    cluster,
    draw_groups,
    opaque_share,
    resize_all,
    sampled,
    similar_pairs,
    split_arrays,
    square,
    trim,
)
from ..downloads import Sources

SEED = 3
RACE_OF_FOLDER = {
    "elves-wood": "elf",
    "dwarves": "dwarf",
    "saurians": "saurian",
    "drakes": "drake",
    "orcs": "orc",
    "human-loyalists": "loyalist",
    "human-magi": "mage",
    "human-outlaws": "outlaw",
    "undead": "undead",
    "undead-skeletal": "skeleton",
    "goblins": "goblin",
    "nagas": "naga",
    "merfolk": "merfolk",
    "trolls": "troll",
    "monsters": "monster",
    "woses": "wose",
    "dunefolk": "dunefolk",
}
CLASSES = tuple(RACE_OF_FOLDER.values())
SMALLEST, LARGEST = 40, 100
SPRITE_SIZE, COMPARED_SIZE = 48, 24
MEADOW_GREEN = (120, 140, 90)
SAME_FRAME = 0.97
TEST_SHARE = 0.30
TRAIN_SIZE, TEST_SIZE = 12_000, 1_000


def build(sources: Sources) -> TaskArrays:
    """Reads the sprites, joins units that share frames, and splits each race by unit."""
    folder = sources.apt("wesnoth-1.16-data") / "usr/share/games/wesnoth/1.16/data/core/images/units"
    sprites, labels, units = [], [], []
    for label, race_folder in enumerate(RACE_OF_FOLDER):
        files = sorted((folder / race_folder).rglob("*.png"), key=str)
        names = [path.relative_to(folder / race_folder).with_suffix("").as_posix() for path in files]
        for path, name in zip(files, names, strict=True):
            with Image.open(path) as file:
                sprite = file.convert("RGBA")
            if (
                max(sprite.size) > LARGEST
                or min(sprite.size) < SMALLEST
                or opaque_share(sprite, above=60) < 0.03
            ):
                continue
            sprites.append(square(trim(sprite), SPRITE_SIZE, background=MEADOW_GREEN, padding=0.03))
            labels.append(label)
            units.append(f"{CLASSES[label]}/{unit_of(name, set(names))}")
    images = np.stack(sprites)
    races = np.array(labels)
    unit_names, unit_of_image = np.unique(units, return_inverse=True)
    small = resize_all(images, COMPARED_SIZE, Image.Resampling.BOX)
    shared = ((unit_of_image[i], unit_of_image[j]) for i, j in similar_pairs(small, SAME_FRAME))
    groups = cluster(len(unit_names), shared)[unit_of_image]
    is_test = draw_test_units(groups, races, np.random.default_rng(SEED))
    images = resize_all(images, SIZE, Image.Resampling.BICUBIC)
    arrays = split_arrays(images, races, is_test, CLASSES, groups)
    return sampled(arrays, "sprites", TRAIN_SIZE, TEST_SIZE)


def unit_of(name: str, names: set[str]) -> str:
    """Guesses which unit a frame shows.

    Args:
        name: the file's path within the race's folder, without extension: `archer-attack-1` or `troll/idle+2`
        names: all of the race's files

    Returns:
        the sub-folder; or the shortest beginning of the name that is itself a file, else the first word
    """
    folder, _, _ = name.rpartition("/")
    if folder:
        unit, _, _ = folder.partition("/")
        first_word, _, _ = unit.partition("-")
        return first_word.partition("+")[0] if first_word in names else unit
    words = name.partition("+")[0].split("-")
    beginnings = ["-".join(words[:count]) for count in range(1, len(words) + 1)]
    return next((beginning for beginning in beginnings if beginning in names), words[0])


def draw_test_units(groups: Ints, races: Ints, rng: np.random.Generator) -> Bools:
    """Draws whole units of each race until about 30% of its images are test images. [N] bool."""
    is_test = np.zeros(len(groups), bool)
    for race in range(len(CLASSES)):
        members = races == race
        # A group can reach into other races; all of it counts, and all of it moves.
        names = np.unique(groups[members])
        sizes = np.array([(groups == name).sum() for name in names])
        is_test |= np.isin(groups, draw_groups(names, sizes, rng, TEST_SHARE * members.sum()))
    return is_test
