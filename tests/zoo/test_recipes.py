"""The pure pieces of the zoo's recipes, without any download."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from examples.zoo.build import arrays
from examples.zoo.build.downloads import ClientMissingError, Sources, fetch_npm
from examples.zoo.build.tasks import (
    TASKS,
    animals,
    build_task,
    emoji,
    icons,
    letters,
    mnist,
    planets,
    sprites,
)


def noise(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 32, 32), dtype=np.uint8)


def task_arrays(train: np.ndarray, test: np.ndarray) -> arrays.TaskArrays:
    labels = np.arange(len(train)) % 2, np.arange(len(test)) % 2
    return arrays.TaskArrays(train, labels[0], test, labels[1], ("a", "b"), np.arange(len(train)))


class TestNearDuplicates:
    def test_brighter_copy_is_a_near_duplicate(self) -> None:
        images = noise(4) // 2
        images[3] = images[1] + 40
        assert list(arrays.similar_pairs(images, 0.95)) == [(1, 3)]

    def test_mirror_image_counts_only_when_asked_for(self) -> None:
        images = noise(3)
        images[2] = images[0, :, ::-1]
        assert list(arrays.similar_pairs(images, 0.95)) == []
        assert list(arrays.similar_pairs(images, 0.95, mirrored=True)) == [(0, 2)]

    def test_pairs_are_found_across_the_chunks_of_rows(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(arrays, "_ROWS_AT_ONCE", 2)
        images = noise(7)
        images[6] = images[0]
        images[5] = images[3]
        assert list(arrays.similar_pairs(images, 0.95)) == [(0, 6), (3, 5)]

    def test_flat_images_resemble_nothing(self) -> None:
        assert list(arrays.similar_pairs(np.full((3, 32, 32), 9, np.uint8), 0.5)) == []

    def test_highest_correlation_is_1_for_a_copy(self) -> None:
        others = noise(5)
        correlation = arrays.highest_correlation(np.concatenate([others[2:3], noise(1, seed=1)]), others)
        assert correlation[0] == pytest.approx(1, abs=1e-5)
        assert correlation[1] < 0.2

    def test_chains_of_pairs_are_one_cluster_named_after_a_member(self) -> None:
        names = arrays.cluster(6, [(0, 1), (4, 5), (1, 2)])
        assert names[0] == names[1] == names[2] == 2
        assert names[4] == names[5] == 5
        assert names[3] == 3


class TestSplitting:
    groups = np.arange(20)
    sizes = np.full(20, 5)

    def test_without_overshoot_the_wanted_size_is_never_exceeded(self) -> None:
        drawn = arrays.draw_groups(self.groups, self.sizes, np.random.default_rng(0), 33)
        assert len(drawn) == len(set(drawn)) == 6

    def test_with_overshoot_the_wanted_size_is_reached(self) -> None:
        drawn = arrays.draw_groups(self.groups, self.sizes, np.random.default_rng(0), 33, overshoot=True)
        assert len(drawn) == 7

    def test_ineligible_groups_are_never_drawn(self) -> None:
        eligible = self.groups % 2 == 0
        drawn = arrays.draw_groups(self.groups, self.sizes, np.random.default_rng(0), 1000, eligible=eligible)
        assert set(drawn) == set(self.groups[eligible])

    def test_the_draw_depends_on_the_seed_alone(self) -> None:
        first, again = (
            arrays.draw_groups(self.groups, self.sizes, np.random.default_rng(3), 50) for _ in range(2)
        )
        assert np.array_equal(first, again)

    def test_sprites_of_one_unit_stay_together(self) -> None:
        units, races = np.repeat(np.arange(40), 4), np.repeat(np.arange(2), 80)
        is_test = sprites.draw_test_units(units, races, np.random.default_rng(0))
        assert 0.2 < is_test.mean() <= 0.3
        assert not set(units[is_test]) & set(units[~is_test])

    def test_emoji_of_one_subject_stay_together_even_across_classes(self) -> None:
        subjects = np.arange(400) % 100
        classes = np.random.default_rng(0).integers(0, len(emoji.CLASSES), 400)
        is_test = emoji.draw_test_emoji(subjects, classes, np.random.default_rng(0))
        assert is_test.any()
        assert not set(subjects[is_test]) & set(subjects[~is_test])

    def test_fonts_of_one_design_are_capped_and_distinct(self) -> None:
        glyphs = noise(30).reshape(30, 1, 32, 32)
        glyphs[29] = glyphs[28]
        designs = np.array([0] * 20 + [1] * 10)
        kept = letters.distinct_fonts(glyphs, designs, np.random.default_rng(0))
        assert (designs[kept] == 0).sum() == 12
        assert (designs[kept] == 1).sum() == 9

    def test_a_train_image_that_equals_a_test_image_is_dropped_with_its_label_and_group(self) -> None:
        whole = task_arrays(noise(5), noise(5)[3:4])
        kept = arrays.without_test_images(whole)
        assert kept.train_groups is not None
        assert kept.train_groups.tolist() == [0, 1, 2, 4]
        assert kept.train_labels.tolist() == [0, 1, 0, 0]
        assert len(kept.test_images) == 1

    def test_only_parts_that_are_too_large_are_sampled(self) -> None:
        whole = task_arrays(noise(10), noise(4, seed=1))
        part = arrays.sampled(whole, "mnist", 6, 4)
        assert len(part.train_images) == 6
        assert np.array_equal(part.test_images, whole.test_images)

    def test_a_sample_keeps_the_order(self) -> None:
        part = arrays.sampled(task_arrays(noise(50), noise(9, seed=1)), "mnist", 20, 9)
        assert part.train_groups is not None
        assert (np.diff(part.train_groups) > 0).all()

    def test_an_unknown_task_has_no_sample_stream(self) -> None:
        with pytest.raises(KeyError):
            arrays.sample_stream("no such task")


class TestImages:
    def test_trim_cuts_the_transparent_margin(self) -> None:
        image = Image.new("RGBA", (40, 30))
        image.paste((255, 0, 0, 255), (5, 6, 15, 26))
        assert arrays.trim(image).size == (10, 20)

    def test_nearly_transparent_pixels_are_margin(self) -> None:
        image = Image.new("RGBA", (20, 20), (0, 0, 0, 8))
        image.putpixel((3, 4), (0, 0, 0, 9))
        assert arrays.trim(image).size == (1, 1)

    def test_an_empty_image_is_left_as_it_is(self) -> None:
        assert arrays.trim(Image.new("RGBA", (7, 5))).size == (7, 5)

    def test_square_centres_on_the_background(self) -> None:
        red = (255, 0, 0)
        pixels = arrays.square(Image.new("RGB", (32, 16), red), 32, background=(0, 0, 255))
        assert pixels.shape == (32, 32, 3)
        assert pixels[16, 16].tolist() == [255, 0, 0]
        assert pixels[2, 16].tolist() == pixels[29, 16].tolist() == [0, 0, 255]

    def test_padding_is_a_share_of_the_longer_side(self) -> None:
        pixels = arrays.square(Image.new("RGB", (20, 20)), 24, padding=0.1)
        assert (pixels[:2] == 255).all()
        assert (pixels[2:22, 2:22] == 0).all()

    def test_map_patches_are_listed_row_by_row_and_stay_within_their_longitudes(self) -> None:
        corners = planets.patch_corners(32, 100, 300)
        assert corners == sorted(corners, key=lambda corner: (corner[1], corner[0]))
        assert min(x for x, _ in corners) == 100
        assert max(x for x, _ in corners) + planets.PATCH <= 300

    def test_mnist_images_get_a_border_of_2_pixels(self) -> None:
        content = np.array([0x803, 2, 28, 28], ">u4").tobytes() + b"\xff" * (2 * 28 * 28)
        images = mnist.images_from_idx(content)
        assert images.shape == (2, 32, 32)
        assert (images[:, 2:30, 2:30] == 255).all()
        assert images.sum() == 255 * 2 * 28 * 28


class TestArrayFiles:
    def test_saved_arrays_are_loaded_again(self, tmp_path: Path) -> None:
        whole = task_arrays(noise(4), noise(2, seed=1))
        whole.save(tmp_path / "task.npz")
        loaded = arrays.TaskArrays.load(tmp_path / "task.npz")
        assert loaded.classes == whole.classes
        for name in ("train_images", "train_labels", "test_images", "test_labels", "train_groups"):
            assert np.array_equal(getattr(loaded, name), getattr(whole, name))

    def test_absent_groups_stay_absent(self, tmp_path: Path) -> None:
        whole = arrays.split_arrays(noise(4), np.arange(4), np.arange(4) > 2, "abcd")
        whole.save(tmp_path / "task.npz")
        assert arrays.TaskArrays.load(tmp_path / "task.npz").train_groups is None


class TestRestrictedUnpickler:
    @pytest.mark.parametrize("dtype", [np.uint8, np.int64])
    def test_reads_a_numpy_array(self, dtype: type) -> None:
        array = np.arange(6, dtype=dtype).reshape(2, 3)
        assert np.array_equal(animals.read_array(pickle.dumps(array, protocol=4)), array)

    @pytest.mark.parametrize("value", [OrderedDict(a=1), Path("x"), print, np.float64(1.5), ValueError("x")])
    def test_refuses_every_other_class_or_function(self, value: object) -> None:
        with pytest.raises(animals.ForbiddenPickleError, match="only plain numpy arrays"):
            animals.read_array(pickle.dumps(value))

    def test_refuses_to_call_a_function(self) -> None:
        class Attack:
            def __reduce__(self) -> tuple[object, tuple[str]]:
                return eval, ("1/0",)

        with pytest.raises(animals.ForbiddenPickleError, match="eval"):
            animals.read_array(pickle.dumps(Attack()))


class TestNames:
    @pytest.mark.parametrize(
        ("name", "concept"),
        [
            ("home", "home"),
            ("house-outline", "home"),
            ("bell-bold-24", "bell"),
            ("bell-off", None),
            ("x", None),
        ],
    )
    def test_icon_names_lose_their_style_but_nothing_else(self, name: str, concept: str | None) -> None:
        assert icons.concept_of(name) == concept

    @pytest.mark.parametrize(
        ("prefix", "family"),
        [("fa6-solid", "fa"), ("mdi", "material"), ("lucide", "feather"), ("lucide-lab", "lucide-lab")],
    )
    def test_icon_sets_after_one_design_are_one_family(self, prefix: str, family: str) -> None:
        assert icons.family_of(prefix) == family

    @pytest.mark.parametrize(
        ("name", "subject"),
        [
            ("woman-running", "running"),
            ("two-thirty", "CLOCK"),
            ("full-moon-face", "MOON"),
            ("moon-cake", "moon-cake"),
            ("play-button", "BUTTON"),
            ("right-arrow", "ARROW"),
            ("blue-heart", "HEART"),
            ("banana", "banana"),
        ],
    )
    def test_variations_of_an_emoji_are_one_subject(self, name: str, subject: str) -> None:
        assert emoji.subject_of(name) == subject

    def test_frames_belong_to_the_unit_whose_file_their_name_begins_with(self) -> None:
        names = {"archer", "archer-attack-1", "shaman+female"}
        assert sprites.unit_of("archer-attack-1", names) == "archer"
        assert sprites.unit_of("shaman+female", names) == "shaman"
        assert sprites.unit_of("archer-bow/idle", names) == "archer"
        assert sprites.unit_of("lord/idle-2", names) == "lord"

    @pytest.mark.parametrize("file", ["Karla-Bold.ttf", "Karla-Medium.otf", "karla.ttf", "Karla_Light.ttf"])
    def test_font_files_of_one_family_share_a_name(self, file: str) -> None:
        assert letters.family_name(Path(file)) == "karla"


class TestDownloads:
    def test_a_package_in_the_cache_is_not_fetched(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PATH", "")
        folder = tmp_path / "npm" / "scope-name-1.0"
        folder.mkdir(parents=True)
        assert fetch_npm("@scope/name", "1.0", tmp_path) == folder

    def test_a_missing_client_is_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", "")
        with pytest.raises(ClientMissingError, match="apt-get"):
            Sources(tmp_path).apt("some-package")

    def test_an_unknown_task_is_refused_with_the_known_ones(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="mnist, fashion"):
            build_task("cifar", Sources(tmp_path))

    def test_every_task_has_a_recipe_file(self) -> None:
        folder = Path(arrays.__file__).parent / "tasks"
        assert all((folder / f"{task}.py").is_file() for task in TASKS)
