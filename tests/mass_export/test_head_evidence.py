"""The test of the heads: whether they know their task, judged by class vectors alone."""

import dataclasses

import pytest
import torch

from mass_export.head_evidence import evidence_scales, judge_heads, with_evidence_decided
from mass_export.heads import Head
from mass_export.router_spec import RouterSettings, default_router


def heads_with_task_component(share: float, scale: float = 14.0) -> list[Head]:
    """Three heads of eight classes; a share of each class vector is common to its task."""
    generator = torch.Generator().manual_seed(0)
    heads = []
    for _ in range(3):
        classes = torch.randn(8, 64, generator=generator)
        classes -= classes.mean(dim=0)
        common = torch.randn(64, generator=generator)
        vectors = share * common / common.norm() + classes / classes.norm(dim=1, keepdim=True)
        heads.append(Head(scale * vectors / vectors.norm(dim=1, keepdim=True)))
    return heads


@pytest.mark.parametrize(("share", "helps"), [(0.0, False), (1.0, True), (2.0, True)])
@pytest.mark.parametrize("scale", [1.0, 14.0, 100.0])
def test_heads_are_judged_by_what_their_classes_share(share: float, helps: object, scale: float) -> None:
    heads = heads_with_task_component(share, scale)
    assert judge_heads(heads).helps is helps
    router = with_evidence_decided(default_router(2), heads)
    assert router.evidence == (1.0 if helps else 0.0)
    by_tasks = dataclasses.replace(default_router(2), standardize="tasks")
    assert with_evidence_decided(by_tasks, heads).evidence == (2.0 if helps else 0.0)


def test_a_given_weight_stays() -> None:
    router = RouterSettings(evidence=0.3)
    assert with_evidence_decided(router, heads_with_task_component(0.0)) is router


def test_heads_compete_on_one_scale() -> None:
    small, large = heads_with_task_component(1.0, 1.0), heads_with_task_component(1.0, 100.0)
    scaled = [
        torch.cat([head.weight for head in heads]) * evidence_scales(heads)[:, None]
        for heads in (small, large)
    ]
    torch.testing.assert_close(scaled[0], scaled[1], rtol=1e-6, atol=1e-6)
    assert scaled[0].norm(dim=1).mean() == pytest.approx(28.0)


def test_one_head_or_one_class_cannot_be_judged() -> None:
    heads = heads_with_task_component(2.0)
    assert not judge_heads(heads[:1]).helps
    assert not judge_heads([*heads[:2], Head(heads[2].weight[:1])]).helps
