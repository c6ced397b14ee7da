"""Pretrains the base tower from words: which words name a picture?

The words' embeddings play the part of CLIP's text tower: `logits = scale * feature . embedding` over the whole
vocabulary, softmax cross-entropy against a uniform target over the picture's words, as in Joulin et al. 2016
("Learning Visual Features from Large Weakly Supervised Data", section 3) and CatLIP. Half of the patches are
dropped for most of the run (Li et al. 2023, FLIP), which nearly doubles the pictures seen in the same time.

Two processes with one thread each are faster than one process with two threads at this model size. They train
on batches of their own and average weights and moments every few steps (local SGD, Stich 2019), since waiting for
each other at every step costs a quarter of the time on a machine that has other work too. Each step's batch
depends on (seed, rank, step) alone, so that an interrupted run goes on from its last checkpoint as if it had not
stopped.
"""

from __future__ import annotations

import math
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

from .augment import compose_pictures
from .corpus import GROUPS, Corpus
from .tower import build_tower, normalise, read_config, save_tower

GROUP_SHARES = {
    "icons": 0.44, "logos": 0.07, "clipart": 0.08, "glyphs": 0.18, "textures": 0.14, "game": 0.09,
}  # fmt: skip
"""Share of each batch: glyphs and textures well above their number, for the sake of digits, cloth and maps."""
KINDS = {"icons": 0, "logos": 0, "clipart": 1, "glyphs": 0, "textures": 2, "game": 1}
LOGIT_SCALE = 14.0
CELLS, ORIENTATIONS = 8, 8
DESCRIPTOR_SIZE = CELLS * CELLS * (ORIENTATIONS + 1) + 3 * 16
CHECKPOINT_EVERY = 400
AVERAGE_EVERY = 8
"""Steps between two averages of the processes' weights; a multiple of it must be `CHECKPOINT_EVERY`."""

console = Console(stderr=True)


@dataclass(frozen=True)
class PretrainSettings:
    """How the base is trained.

    Attributes:
        steps: optimizer steps
        batch: pictures per step and process
        processes: data-parallel processes of one thread each
        peak_lr: highest learning rate
        warmup: steps up to the peak
        weight_decay: AdamW's, on matrices only
        patch_dropout: share of patches dropped
        whole_from: share of the run after which no patches are dropped
        shape_weight: weight of the shape descriptor's loss beside the words'
        seed: of weights, batches and augmentation
    """

    steps: int = 3000
    batch: int = 64
    processes: int = 2
    peak_lr: float = 1e-3
    warmup: int = 250
    weight_decay: float = 0.05
    patch_dropout: float = 0.5
    whole_from: float = 0.86
    shape_weight: float = 3.0
    seed: int = 0


class WordModel(nn.Module):
    """The tower and what supervises it: word embeddings and a shape descriptor; only the tower is kept."""

    def __init__(self, words: int) -> None:
        super().__init__()
        config = read_config()["model_cfg"]
        self.tower = build_tower()
        # Zero, as random embeddings would first teach the tower to ignore its input.
        self.embedding = nn.Parameter(torch.zeros(words, config["embed_dim"]))
        self.bias = nn.Parameter(torch.zeros(words))
        self.describe = nn.Linear(config["vision_cfg"]["width"], DESCRIPTOR_SIZE)

    def forward(self, pixel_values: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Mean losses of words and shapes. pixel_values [B, 3, H, W], targets [B, words], rows sum to 1."""
        tokens: list[Tensor] = []
        hook = self.tower.ln_post.register_forward_hook(
            lambda _module, _inputs, output: tokens.append(output)
        )
        features = nn.functional.normalize(self.tower(pixel_values), dim=-1)
        hook.remove()
        logits = LOGIT_SCALE * features @ self.embedding.T + self.bias
        shape = nn.functional.mse_loss(self.describe(tokens[0][:, 0]), describe_shapes(pixel_values))
        return nn.functional.cross_entropy(logits, targets), shape

    @torch.no_grad()
    def centre(self, pixel_values: Tensor) -> None:
        """Chooses `ln_post.bias` so that the untrained tower's outputs have mean zero.

        A fresh CLS token is nearly the same for every image, and training would start from almost no signal.
        """
        bias = self.tower.ln_post.bias
        proj = self.tower.proj
        mean = self.tower(pixel_values).mean(0)
        # The smallest change of the bias that takes the mean away: proj has more rows than columns.
        bias -= mean @ torch.linalg.pinv(proj)


def describe_shapes(pixel_values: Tensor) -> Tensor:
    """Histograms of oriented gradients, a thumbnail and the colours of the quarters' quarters.

    The CLS token learns to predict them for the whole image from the patches that were not dropped, as in
    MaskFeat (Wei et al. 2022). Words alone leave so small a model long without any notion of shape.

    Args:
        pixel_values: normalised images. [B, 3, H, W] float32

    Returns:
        about unit scale. [B, DESCRIPTOR_SIZE] float32
    """
    pool = nn.functional.adaptive_avg_pool2d
    light = pixel_values.mean(1, keepdim=True)
    smooth = nn.functional.pad(light, (1, 1, 1, 1), mode="replicate")
    across = smooth[:, :, 1:-1, 2:] - smooth[:, :, 1:-1, :-2]
    down = smooth[:, :, 2:, 1:-1] - smooth[:, :, :-2, 1:-1]
    strength = (across.square() + down.square()).sqrt()
    angle = torch.atan2(down, across).remainder(math.pi) * (ORIENTATIONS / math.pi)
    bins = angle.floor().clamp(max=ORIENTATIONS - 1).long()
    votes = torch.zeros(len(light), ORIENTATIONS, *light.shape[2:]).scatter_(1, bins, strength)
    histograms = pool(votes, CELLS)
    histograms = histograms / (histograms.square().mean(dim=(1, 2, 3), keepdim=True).sqrt() + 0.02)
    parts = (histograms.clamp(max=4), pool(light, CELLS), pool(pixel_values, 4))
    return torch.cat([part.flatten(1) for part in parts], dim=1)


def pretrain(corpus_folder: Path, work: Path, base: Path, settings: PretrainSettings) -> None:
    """Trains the base and writes it in float16, unless it is there already.

    Args:
        corpus_folder: what `build_corpus` wrote
        work: gets the training checkpoint and the log
        base: the file to write
        settings: how to train
    """
    if base.is_file():
        console.print(f"base: {base} is there")
        return
    work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as rendezvous:
        arguments = (corpus_folder, work, base, settings, str(Path(rendezvous) / "store"))
        spawn(_train, args=arguments, nprocs=settings.processes)


def _train(
    rank: int, corpus_folder: Path, work: Path, base: Path, settings: PretrainSettings, rendezvous: str
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{rendezvous}", rank=rank, world_size=settings.processes)
    torch.manual_seed(settings.seed)
    corpus = Corpus.load(corpus_folder)
    model = WordModel(len(corpus.vocabulary))
    sampler = _Sampler(corpus)
    # Every process centres on the same images, so that all start from the same weights.
    model.centre(sampler.batch(replace(settings, batch=512), 0, settings.steps)[0])
    optimizer = _optimizer(model, settings)
    state_file = work / "pretrain.pt"
    start = 0
    if state_file.is_file():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    began, running = time.time(), np.zeros(2)
    model.train()
    for step in range(start, settings.steps):
        whole = step >= settings.whole_from * settings.steps
        set_patch_dropout(model.tower, 0.0 if whole else settings.patch_dropout)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings.steps, settings.warmup, settings.peak_lr)
        words, shapes = model(*sampler.batch(settings, rank, step))
        loss = words + settings.shape_weight * shapes
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % AVERAGE_EVERY == 0 or step + 1 == settings.steps:
            _average(model, optimizer, settings.processes)
        now = np.array([words.item(), shapes.item()])
        running = now if step == start else 0.98 * running + 0.02 * now
        done = step + 1
        if rank == 0 and (done % 50 == 0 or done == settings.steps):
            rate = (done - start) * settings.batch * settings.processes / (time.time() - began)
            left = (settings.steps - done) * settings.batch * settings.processes / rate / 60
            losses = f"words {running[0]:.3f} shapes {running[1]:.3f}"
            console.print(f"step {done}/{settings.steps} {losses} {rate:.0f} images/s {left:.1f} min left")
        if rank == 0 and (done % CHECKPOINT_EVERY == 0 or done == settings.steps):
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": done}
            torch.save(state, state_file.with_suffix(".partial"))
            state_file.with_suffix(".partial").replace(state_file)
            save_tower(model.tower, work / "base_running.safetensors")
    if rank == 0:
        save_tower(model.tower, base)
    dist.destroy_process_group()


def learning_rate(step: int, steps: int, warmup: int, peak: float) -> float:
    """Linear warm-up, then a cosine to zero."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _optimizer(model: WordModel, settings: PretrainSettings) -> torch.optim.Optimizer:
    decayed = [value for name, value in model.named_parameters() if value.ndim > 1 and name != "embedding"]
    other = [value for name, value in model.named_parameters() if value.ndim <= 1 or name == "embedding"]
    groups = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": other, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.peak_lr, betas=(0.9, 0.98), fused=True)


def set_patch_dropout(tower: nn.Module, share: float) -> None:
    """Drops a share of the patches from now on, another choice for every image."""
    from open_clip.transformer import PatchDropout  # noqa: PLC0415 - one place, beside its use

    # PatchDropout(0) would still keep every patch; Identity is what the configuration builds.
    tower.patch_dropout = PatchDropout(share) if share else nn.Identity()


@torch.no_grad()
def _average(model: WordModel, optimizer: torch.optim.Optimizer, processes: int) -> None:
    """Averages weights and moments over the processes, in one message: many small ones would cost more."""
    tensors = [value.data for value in model.parameters()]
    for state in optimizer.state.values():
        tensors += [state["exp_avg"], state["exp_avg_sq"]]
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    flat /= processes
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


class _Sampler:
    """Draws batches: a fixed share of each group, rare words more often than common ones."""

    def __init__(self, corpus: Corpus) -> None:
        self.corpus = corpus
        counts = np.bincount(corpus.words, minlength=len(corpus.vocabulary))
        # An image counts as its rarest word does; in full proportion, rare words would swamp the common ones.
        rarity = np.maximum.reduceat(counts[corpus.words] ** -0.3, corpus.word_starts[:-1])
        self.members: list[NDArray[np.int64]] = []
        self.cumulative: list[NDArray[np.float64]] = []
        for group in range(len(GROUPS)):
            members = np.flatnonzero(corpus.groups == group)
            self.members.append(members)
            self.cumulative.append(np.cumsum(rarity[members]) / rarity[members].sum())
        shares = np.array([GROUP_SHARES[group] for group in GROUPS])
        self.shares = shares / shares.sum()
        self.kinds = torch.tensor([KINDS[group] for group in GROUPS])

    def batch(self, settings: PretrainSettings, rank: int, step: int) -> tuple[Tensor, Tensor]:
        """Images and targets of one step. [B, 3, H, W], [B, words]."""
        rng = np.random.default_rng([settings.seed, rank, step])
        groups = rng.choice(len(GROUPS), settings.batch, p=self.shares)
        rows = np.array(
            [self.members[g][np.searchsorted(self.cumulative[g], rng.random() * 0.999999)] for g in groups]
        )
        pictures = torch.from_numpy(self.corpus.images[rows]).permute(0, 3, 1, 2)
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        images = compose_pictures(pictures, self.kinds[torch.from_numpy(groups)], generator)
        targets = torch.zeros(settings.batch, len(self.corpus.vocabulary))
        for row, image in enumerate(rows):
            words = self.corpus.words[self.corpus.word_starts[image] : self.corpus.word_starts[image + 1]]
            targets[row, torch.from_numpy(np.unique(words))] = 1.0
        return normalise(images), targets / targets.sum(1, keepdim=True)
