"""The functional ViT against open_clip's own module."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from open_clip.transformer import QuickGELU, VisionTransformer

from mass_export.router_spec import Tap
from mass_export.spec import VisionSpec
from mass_export.vit import encode, tap_tokens

VARIANTS = {
    "plain": {},
    "quick_gelu": {"activation": "quick_gelu"},
    "no_ln_pre": {"ln_pre": False},
    "odd_patches": {"image_size": (17, 20), "patch_size": (5, 6)},
}


@pytest.fixture(params=VARIANTS)
def spec(request: pytest.FixtureRequest, pico_vision: VisionSpec) -> VisionSpec:
    return dataclasses.replace(pico_vision, **VARIANTS[request.param])


def open_clip_tower(spec: VisionSpec, params: dict[str, torch.Tensor]) -> VisionTransformer:
    tower = VisionTransformer(
        image_size=spec.image_size,
        patch_size=spec.patch_size,
        width=spec.width,
        layers=spec.layers,
        heads=spec.heads,
        mlp_ratio=spec.mlp_width / spec.width,
        output_dim=spec.embed_dim,
        act_layer=QuickGELU if spec.activation == "quick_gelu" else torch.nn.GELU,
        no_ln_pre=not spec.ln_pre,
    )
    tower.load_state_dict(params, strict=True)
    return tower.double()


def test_features_equal_open_clips(
    spec: VisionSpec, pico_tower: Callable[..., dict[str, torch.Tensor]]
) -> None:
    params = pico_tower(0, spec)
    images = torch.randn(3, 3, *spec.image_size, dtype=torch.float64)
    tower = open_clip_tower(spec, params)
    with torch.no_grad():
        expected = torch.nn.functional.normalize(tower(images), dim=-1)
    actual = encode({name: p.double() for name, p in params.items()}, images, spec)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("site", "module"), [("mlp", "mlp"), ("attn", "attn")])
def test_tap_tokens_are_what_open_clips_module_receives(
    site: str, module: str, spec: VisionSpec, pico_tower: Callable[..., dict[str, torch.Tensor]]
) -> None:
    params = pico_tower(1, spec)
    tower = open_clip_tower(spec, params)
    seen: list[torch.Tensor] = []
    block = tower.transformer.resblocks[1]
    getattr(block, module).register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(args[0] if args else kwargs["query"]), with_kwargs=True
    )
    images = torch.randn(2, 3, *spec.image_size, dtype=torch.float64)
    tower(images)  # gradients on: the fused inference path would skip the hook
    tokens = seen[0]
    if tokens.shape[0] == spec.tokens:  # some versions put tokens first
        tokens = tokens.transpose(0, 1)
    tap = Tap(1, site)
    actual = tap_tokens({name: p.double() for name, p in params.items()}, images, spec, [tap])[tap]
    torch.testing.assert_close(actual, tokens.detach(), rtol=0, atol=1e-12)
