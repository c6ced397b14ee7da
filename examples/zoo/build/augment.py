"""Batch augmentation with torch, on the CPU: one random affine map for each image, then its colours.

Two users: pretraining has pictures with an alpha channel and chooses backgrounds, tints and inversions freely;
fine-tuning has finished images, and an `Augmentation` says which changes keep a task's labels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

IMAGE_SIZE = 32


@dataclass(frozen=True)
class Augmentation:
    """What may be done to an image without changing its label.

    Attributes:
        zoom: smallest and largest size factor; above 1 crops, below 1 adds a border
        stretch: largest relative change of the aspect ratio
        rotate: largest angle, degrees
        shear: largest shear, as a share of the image
        shift: largest translation, as a share of the image
        mirror: whether left and right may be swapped
        flip: whether top and bottom may be swapped
        brightness: largest change of brightness and contrast
        saturation: largest change of colour saturation
        hue: largest rotation of the colour circle, degrees
        grey: share of images turned to grey
        blur: share of images blurred or sharpened
        noise: largest standard deviation of pixel noise
        erase: share of images with a rectangle replaced by a flat colour
        padding: what shows outside the image: `border` or `reflection`
    """

    zoom: tuple[float, float] = (0.85, 1.2)
    stretch: float = 0.1
    rotate: float = 8.0
    shear: float = 0.05
    shift: float = 0.08
    mirror: bool = False
    flip: bool = False
    brightness: float = 0.2
    saturation: float = 0.0
    hue: float = 0.0
    grey: float = 0.0
    blur: float = 0.2
    noise: float = 0.02
    erase: float = 0.2
    padding: str = "border"


def augment(images: Tensor, settings: Augmentation, generator: torch.Generator) -> Tensor:
    """Changes each image at random.

    Args:
        images: RGB, 0 .. 255. [B, 3, H, W] uint8
        settings: what may be changed
        generator: source of randomness

    Returns:
        0 .. 1, not normalised. [B, 3, IMAGE_SIZE, IMAGE_SIZE] float32
    """
    draw = _Draw(len(images), generator)
    maps = _affine_maps(draw, settings)
    pixels = _sample(images.float() / 255, maps, settings.padding)
    pixels = _recolour(pixels, draw, settings)
    if settings.erase:
        pixels = _erase(pixels, draw, settings.erase)
    return pixels.clamp(0, 1)


def compose_pictures(pictures: Tensor, kinds: Tensor, generator: torch.Generator) -> Tensor:
    """Turns RGBA pictures into images for pretraining: maps them, chooses colours and a background.

    Args:
        pictures: RGBA, not premultiplied, 0 .. 255. [B, 4, H, W] uint8
        kinds: 0: keeps its orientation (icons, glyphs); 1: may be mirrored; 2: a texture, any flip. [B] int64
        generator: source of randomness

    Returns:
        0 .. 1, not normalised. [B, 3, IMAGE_SIZE, IMAGE_SIZE] float32
    """
    draw = _Draw(len(pictures), generator)
    texture = kinds == 2
    settings = Augmentation(zoom=(0.72, 1.35), stretch=0.2, rotate=14.0, shear=0.1, shift=0.1)
    maps = _affine_maps(draw, settings)
    # A texture has no edge to show: only crops, and both flips.
    inside = _affine_maps(draw, Augmentation(zoom=(1.15, 1.9), stretch=0.15, rotate=6, shear=0, shift=0.05))
    inside[:, :, 1] *= draw.sign(0.5)[:, None]
    maps = torch.where(texture[:, None, None], inside, maps)
    maps[:, :, 0] *= torch.where(kinds > 0, draw.sign(0.5), torch.ones(len(pictures)))[:, None]

    pixels = pictures.float() / 255
    alpha = pixels[:, 3:]
    mono = ((pixels[:, :3] * alpha).amax(dim=(1, 2, 3)) < 0.02) & ~texture
    pixels = torch.cat([pixels[:, :3] * alpha, alpha], dim=1)  # premultiplied, so that edges mix rightly
    pixels = _sample(pixels, maps, "zeros")
    colour, alpha = pixels[:, :3], pixels[:, 3:]

    ink, paper = _ink_and_paper(draw)
    background = torch.where(mono[:, None], paper, _background(draw))[:, :, None, None]
    colour = torch.where(mono[:, None, None, None], ink[:, :, None, None] * alpha, colour)
    images = colour + (1 - alpha) * background
    jitter = Augmentation(brightness=0.35, saturation=0.5, hue=20, grey=0.12, blur=0.25, noise=0.03)
    images = _recolour(images, draw, jitter)
    images = torch.where((draw.uniform(0, 1) < 0.12)[:, None, None, None], 1 - images, images)
    # Grey textures at full contrast, as maps and photographs of bodies often are.
    stretched = texture & (draw.uniform(0, 1) < 0.4)
    images = torch.where(stretched[:, None, None, None], _grey_at_full_contrast(images), images)
    return _erase(images, draw, 0.15).clamp(0, 1)


class _Draw:
    """Random numbers, one for each image of a batch."""

    def __init__(self, count: int, generator: torch.Generator) -> None:
        self.count = count
        self.generator = generator

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(self.count, *shape, generator=self.generator)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(self.count, *shape, generator=self.generator)

    def sign(self, share: float) -> Tensor:
        """-1 for a share of the images, else 1. [B]."""
        return 1 - 2 * (self.uniform(0, 1) < share).float()


def _affine_maps(draw: _Draw, settings: Augmentation) -> Tensor:
    """Maps from output to input coordinates (-1 .. 1). [B, 2, 3] float32."""
    low, high = (math.log(value) for value in settings.zoom)
    zoom = torch.exp(draw.uniform(low, high))
    stretch = torch.exp(draw.uniform(-settings.stretch, settings.stretch) / 2)
    angle = torch.deg2rad(draw.uniform(-settings.rotate, settings.rotate))
    shear = draw.uniform(-settings.shear, settings.shear)
    cos, sin = angle.cos(), angle.sin()
    across, down = stretch / zoom, 1 / (stretch * zoom)
    maps = torch.zeros(draw.count, 2, 3)
    maps[:, 0, 0], maps[:, 0, 1] = across * cos, across * (shear - sin)
    maps[:, 1, 0], maps[:, 1, 1] = down * sin, down * cos
    # Zooming in leaves room to move the crop about; the shift comes on top.
    room = (1 - 1 / zoom).clamp(min=0) * 0.5
    maps[:, 0, 2] = draw.uniform(-1, 1) * (room + 2 * settings.shift)
    maps[:, 1, 2] = draw.uniform(-1, 1) * (room + 2 * settings.shift)
    if settings.mirror:
        maps[:, :, 0] *= draw.sign(0.5)[:, None]
    if settings.flip:
        maps[:, :, 1] *= draw.sign(0.5)[:, None]
    return maps


def _sample(pixels: Tensor, maps: Tensor, padding: str) -> Tensor:
    size = [len(pixels), pixels.shape[1], IMAGE_SIZE, IMAGE_SIZE]
    grid = affine_grid(maps, size, align_corners=False)
    return grid_sample(pixels, grid, mode="bilinear", padding_mode=padding, align_corners=False)


def _recolour(images: Tensor, draw: _Draw, settings: Augmentation) -> Tensor:
    if settings.blur:
        neighbours = torch.nn.functional.avg_pool2d(images, 3, 1, 1, count_include_pad=False)
        strength = draw.uniform(-0.5, 1) * (draw.uniform(0, 1) < settings.blur)
        images = images + strength[:, None, None, None] * (neighbours - images)
    if settings.hue or settings.saturation or settings.grey:
        matrix = _colour_matrices(draw, settings)
        images = torch.einsum("bij,bjhw->bihw", matrix, images)
    if settings.brightness:
        contrast = 1 + draw.uniform(-settings.brightness, settings.brightness)[:, None, None, None]
        offset = draw.uniform(-settings.brightness, settings.brightness)[:, None, None, None] * 0.5
        images = (images - 0.5) * contrast + 0.5 + offset
    if settings.noise:
        level = draw.uniform(0, settings.noise)[:, None, None, None]
        images = images + level * draw.normal(*images.shape[1:])
    return images


def _colour_matrices(draw: _Draw, settings: Augmentation) -> Tensor:
    """Hue rotation about the grey axis times saturation. [B, 3, 3] float32."""
    angle = torch.deg2rad(draw.uniform(-settings.hue, settings.hue))[:, None, None]
    saturation = 1 + draw.uniform(-settings.saturation, settings.saturation)
    saturation = torch.where(draw.uniform(0, 1) < settings.grey, torch.zeros(()), saturation)[:, None, None]
    grey = torch.full((3, 3), 1 / 3)
    third = 1 / math.sqrt(3)
    cross = torch.tensor([[0, -third, third], [third, 0, -third], [-third, third, 0]])
    rotation = angle.cos() * (torch.eye(3) - grey) + angle.sin() * cross
    return grey + saturation * rotation


def _erase(images: Tensor, draw: _Draw, share: float) -> Tensor:
    """Covers a rectangle with a flat colour, in a share of the images."""
    axis = torch.arange(IMAGE_SIZE)
    inside = []
    for _ in range(2):
        length = draw.uniform(4, 14)
        start = draw.uniform(0, 1) * (IMAGE_SIZE - length)
        inside.append((axis >= start[:, None]) & (axis < (start + length)[:, None]))
    chosen = (draw.uniform(0, 1) < share)[:, None, None]
    region = (inside[0][:, :, None] & inside[1][:, None, :] & chosen)[:, None]
    return torch.where(region, draw.uniform(0, 1, 3)[:, :, None, None], images)


def _background(draw: _Draw) -> Tensor:
    """White, black or any colour. [B, 3] float32."""
    kind = draw.uniform(0, 1)[:, None]
    plain = torch.where(kind < 0.4, 1.0, 0.0)
    return torch.where(kind < 0.52, plain, draw.uniform(0, 1, 3))


def _ink_and_paper(draw: _Draw) -> tuple[Tensor, Tensor]:
    """Two colours that differ in lightness: black on white, white on black, or any. [B, 3] each."""
    kind = draw.uniform(0, 1)[:, None]
    ink, paper = draw.uniform(0, 1, 3), draw.uniform(0, 1, 3)
    # Push the two apart where they are too near to be told from each other.
    apart = (ink.mean(1) - paper.mean(1)).abs()[:, None] < 0.3
    paper = torch.where(
        apart, (paper + torch.where(ink.mean(1)[:, None] < 0.5, 0.6, -0.6)).clamp(0, 1), paper
    )
    black_on_white, white_on_black = kind < 0.3, (kind >= 0.3) & (kind < 0.58)
    ink = torch.where(black_on_white, 0.0, torch.where(white_on_black, 1.0, ink))
    paper = torch.where(black_on_white, 1.0, torch.where(white_on_black, 0.0, paper))
    return ink, paper


def _grey_at_full_contrast(images: Tensor) -> Tensor:
    grey = images.mean(1, keepdim=True)
    deviation = grey.std(dim=(2, 3), keepdim=True) + 0.01
    return ((grey - grey.mean(dim=(2, 3), keepdim=True)) / deviation * 0.19 + 0.5).expand_as(images)
