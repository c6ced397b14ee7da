from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from examples.zoo.build.arrays import TaskArrays
from examples.zoo.build.contrast import ContrastSettings, adapt, pair_loss
from examples.zoo.build.finetune import split_validation
from examples.zoo.build.tower import build_tower, load_tower, save_tower

SETTINGS = ContrastSettings(steps=3, per_task=4, warmup=1, ema=0.0)


def arrays(seed):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (20, 32, 32), dtype=np.uint8)
    labels = np.arange(20) % 2
    return TaskArrays(images, labels, images[:2], labels[:2], ("a", "b"))


def test_the_loss_is_small_where_partners_agree_and_large_where_they_do_not():
    pictures = normalize(torch.eye(8), dim=1)
    agreeing = pair_loss(torch.cat([pictures, pictures]), 0.05)
    strangers = pair_loss(torch.cat([pictures, pictures.roll(1, 0)]), 0.05)
    assert agreeing < 1e-3
    assert strangers > 10


def test_adapting_reads_neither_labels_nor_validation_nor_test_images(tmp_path):
    save_tower(build_tower(), tmp_path / "words.safetensors")
    clean = {"animals": arrays(0), "mnist": arrays(1)}
    spoilt = {}
    for task, given in clean.items():
        split = split_validation(task, given)
        images, labels = given.train_images.copy(), given.train_labels.copy()
        images[split.validation] = 0
        assert len(split.validation)
        spoilt[task] = TaskArrays(images, labels, given.test_images * 0, given.test_labels, given.classes)
    for name, tasks in (("clean", clean), ("spoilt", spoilt)):
        adapt(
            tasks, tmp_path / "words.safetensors", tmp_path / name, tmp_path / f"{name}.safetensors", SETTINGS
        )
    words, one, two = (
        load_tower(tmp_path / f"{name}.safetensors").state_dict() for name in ("words", "clean", "spoilt")
    )
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert not all(torch.equal(one[key], words[key]) for key in one)


@pytest.mark.parametrize("content", [b"there"])
def test_a_base_that_is_there_is_kept(tmp_path, content):
    (tmp_path / "base.safetensors").write_bytes(content)
    adapt({}, tmp_path / "no.safetensors", tmp_path / "work", tmp_path / "base.safetensors", SETTINGS)
    assert (tmp_path / "base.safetensors").read_bytes() == content
