"""Pretrains the base tower from words: which words name a picture?

The words' embeddings play the part of CLIP's text tower: `logits = scale * feature . embedding` over the whole
vocabulary, softmax cross-entropy against a uniform target over the picture's words, as in Joulin et al. 2016
("Learning Visual Features from Large Weakly Supervised Data", section 3) and CatLIP. Half of the patches are
dropped for most of the run (Li et al. 2023, FLIP), which nearly doubles the pictures seen in the same time.

Two processes with one thread each are faster than one process with two threads at this model size; they
average their gradients with gloo. Each step's batch depends on (seed, rank, step) alone, so that an interrupted
run goes on from its last checkpoint as if it had not stopped.
"""

from __future__ import annotations

import math
import tempfile
import time
from dataclasses import dataclass
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
CHECKPOINT_EVERY = 400

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
        seed: of weights, batches and augmentation
    """

    steps: int = 5400
    batch: int = 64
    processes: int = 2
    peak_lr: float = 1.4e-3
    warmup: int = 600
    weight_decay: float = 0.05
    patch_dropout: float = 0.5
    whole_from: float = 0.92
    seed: int = 0


class WordModel(nn.Module):
    """The tower and the word embeddings that supervise it; only the tower is kept."""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.tower = build_tower()
        # Short rows turn faster at the same learning rate, and only their direction counts.
        self.embedding = nn.Parameter(0.3 * torch.randn(words, read_config()["model_cfg"]["embed_dim"]))
        self.bias = nn.Parameter(torch.zeros(words))
        self.log_scale = nn.Parameter(torch.tensor(math.log(14.0)))

    def forward(self, pixel_values: Tensor, targets: Tensor) -> Tensor:
        """Mean loss. pixel_values [B, 3, H, W], targets [B, words], rows sum to 1."""
        features = nn.functional.normalize(self.tower(pixel_values), dim=-1)
        words = nn.functional.normalize(self.embedding, dim=-1)
        logits = self.log_scale.exp().clamp(max=60) * features @ words.T + self.bias
        return nn.functional.cross_entropy(logits, targets)


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
    optimizer = _optimizer(model, settings)
    sampler = _Sampler(corpus)
    state_file = work / "pretrain.pt"
    start = 0
    if state_file.is_file():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    began, running = time.time(), 0.0
    model.train()
    for step in range(start, settings.steps):
        whole = step >= settings.whole_from * settings.steps
        _set_patch_dropout(model, 0.0 if whole else settings.patch_dropout)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings.steps, settings.warmup, settings.peak_lr)
        loss = model(*sampler.batch(settings, rank, step))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        _average_gradients(model, settings.processes)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        running = loss.item() if step == start else 0.98 * running + 0.02 * loss.item()
        done = step + 1
        if rank == 0 and (done % 50 == 0 or done == settings.steps):
            rate = (done - start) * settings.batch * settings.processes / (time.time() - began)
            left = (settings.steps - done) * settings.batch * settings.processes / rate / 60
            line = f"step {done}/{settings.steps} loss {running:.3f} {rate:.0f} images/s {left:.1f} min left"
            console.print(line)
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


def _set_patch_dropout(model: WordModel, share: float) -> None:
    from open_clip.transformer import PatchDropout  # noqa: PLC0415 - one place, beside its use

    # PatchDropout(0) would still keep every patch; Identity is what the configuration builds.
    model.tower.patch_dropout = PatchDropout(share) if share else nn.Identity()


def _average_gradients(model: WordModel, processes: int) -> None:
    """One message for all gradients: many small ones would cost more than they carry."""
    gradients = [value.grad for value in model.parameters() if value.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= processes
    for gradient, part in zip(
        gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True
    ):
        gradient.copy_(part.view_as(gradient))


class _Sampler:
    """Draws batches: a fixed share of each group, rare words more often than common ones."""

    def __init__(self, corpus: Corpus) -> None:
        self.corpus = corpus
        counts = np.bincount(corpus.words, minlength=len(corpus.vocabulary))
        # Square-root sampling: an image counts as its rarest word does.
        rarity = np.maximum.reduceat(counts[corpus.words] ** -0.5, corpus.word_starts[:-1])
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
