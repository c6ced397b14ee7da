"""The plain ViT of CLIP as a function of its parameters, readable from top to bottom.

Equal to open_clip's `VisionTransformer` (a test compares them), but able to stop at a block, to show what
the router reads, and to run with any parameters in any floating dtype. Parameter names are open_clip's
without `visual.`. Letters: B batch, N tokens (CLS first), D width, E embed_dim, H heads.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from mass_export.router_spec import Tap
from mass_export.spec import Activation, VisionSpec

Parameters = Mapping[str, Tensor]


def embed(params: Parameters, pixel_values: Tensor, spec: VisionSpec) -> Tensor:
    """Patches, CLS token, positions, ln_pre: [B, 3, H, W] -> [B, N, D]."""
    x = F.conv2d(pixel_values, params["conv1.weight"], stride=spec.patch_size)  # [B, D, h, w]
    x = x.flatten(2).transpose(1, 2)  # [B, N-1, D]
    cls = params["class_embedding"].expand(x.shape[0], 1, -1)
    x = torch.cat([cls, x], dim=1) + params["positional_embedding"]  # [B, N, D]
    return _layer_norm(params, "ln_pre", x, spec) if spec.ln_pre else x


def block(params: Parameters, index: int, x: Tensor, spec: VisionSpec) -> Tensor:
    """One residual block: [B, N, D] -> [B, N, D]."""
    x = x + attention(params, index, attention_input(params, index, x, spec), spec)
    return x + mlp(params, index, mlp_input(params, index, x, spec), spec)


def attention_input(params: Parameters, index: int, x: Tensor, spec: VisionSpec) -> Tensor:
    """ln_1 of the block."""
    return _layer_norm(params, f"transformer.resblocks.{index}.ln_1", x, spec)


def mlp_input(params: Parameters, index: int, x: Tensor, spec: VisionSpec) -> Tensor:
    """ln_2 of the block; `x` is the residual stream after its attention."""
    return _layer_norm(params, f"transformer.resblocks.{index}.ln_2", x, spec)


def attention(params: Parameters, index: int, h: Tensor, spec: VisionSpec) -> Tensor:
    """Multi-head self-attention: [B, N, D] -> [B, N, D]."""
    name = f"transformer.resblocks.{index}.attn."
    B, N, D = h.shape
    qkv = F.linear(h, params[f"{name}in_proj_weight"], params[f"{name}in_proj_bias"])
    q, k, v = qkv.view(B, N, 3, spec.heads, D // spec.heads).permute(2, 0, 3, 1, 4)  # [B, H, N, D/H] each
    scores = (q * (D // spec.heads) ** -0.5) @ k.transpose(-2, -1)  # [B, H, N, N]
    mixed = (scores.softmax(dim=-1) @ v).transpose(1, 2).reshape(B, N, D)
    return F.linear(mixed, params[f"{name}out_proj.weight"], params[f"{name}out_proj.bias"])


def mlp(params: Parameters, index: int, h: Tensor, spec: VisionSpec) -> Tensor:
    """Two linear maps with the activation between: [B, N, D] -> [B, N, D]."""
    name = f"transformer.resblocks.{index}.mlp."
    h = F.linear(h, params[f"{name}c_fc.weight"], params[f"{name}c_fc.bias"])
    h = _activate(h, spec.activation)
    return F.linear(h, params[f"{name}c_proj.weight"], params[f"{name}c_proj.bias"])


def encode(params: Parameters, pixel_values: Tensor, spec: VisionSpec) -> Tensor:
    """The L2-normalised image feature: [B, 3, H, W] -> [B, E]."""
    x = embed(params, pixel_values, spec)
    for index in range(spec.layers):
        x = block(params, index, x, spec)
    pooled = _layer_norm(params, "ln_post", x[:, 0], spec)
    return F.normalize(pooled @ params["proj"], dim=-1)


def tap_tokens(
    params: Parameters, pixel_values: Tensor, spec: VisionSpec, taps: Collection[Tap]
) -> dict[Tap, Tensor]:
    """What the router reads at each tap; nothing behind the last one runs. [B, N, D] each"""
    tokens: dict[Tap, Tensor] = {}
    x = embed(params, pixel_values, spec)
    for index in range(max(taps).layer + 1):
        h = attention_input(params, index, x, spec)
        tokens[Tap(index, "attn")] = h
        if max(taps) == Tap(index, "attn"):
            break
        x = x + attention(params, index, h, spec)
        h = mlp_input(params, index, x, spec)
        tokens[Tap(index, "mlp")] = h
        x = x + mlp(params, index, h, spec)
    return {tap: tokens[tap] for tap in taps}


def _activate(h: Tensor, activation: Activation) -> Tensor:
    return F.gelu(h) if activation == "gelu" else h * torch.sigmoid(1.702 * h)


def _layer_norm(params: Parameters, name: str, x: Tensor, spec: VisionSpec) -> Tensor:
    return F.layer_norm(
        x, (x.shape[-1],), params[f"{name}.weight"], params[f"{name}.bias"], spec.layer_norm_eps
    )
