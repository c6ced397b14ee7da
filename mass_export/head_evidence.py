"""Do the heads know their task? A test that needs no image and no label, and the scale on which heads compete.

The evidence of a head is `logsumexp(k / s_i * logits_i) - log C_i`: s_i is the mean length of its class vectors, so
that a head at CLIP's scale (x100) does not shout others down, and k = 28 sets how much the best class counts.

It tells tasks apart only where class vectors share what is common to their task, as embeddings of CLIP's prompts do
and probes trained with softmax need not. So the class vectors themselves are put to the test, each in place of an
image's feature: the other classes of its head must claim it (leave one out), and it must lie closer to these than to
the classes of other heads.

Heads that fail may still know something of their task. Unlabelled images can tell (`mass calibrate --pool`): evidence
that agrees with the residuals far more often than by chance is used, with half the weight.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mass_export.heads import Head
from mass_export.router_spec import RouterSettings

EVIDENCE_SCALE = 28.0
EVIDENCE_WEIGHT = {"length": 1.0, "tasks": 2.0, "none": 2.0}
LEAST_ACCURACY = 0.8
LEAST_GAP = 0.1
LEAST_AGREEMENT = 0.6
HEARD_WEIGHT = 0.5


@dataclass(frozen=True)
class EvidenceTest:
    """Outcome of the test.

    Attributes:
        accuracy: share of class vectors that the rest of their own head claims most strongly, averaged over tasks.
        gap: mean cosine within a head less that with other heads, averaged over tasks.
    """

    accuracy: float
    gap: float

    @property
    def helps(self) -> bool:
        """Whether evidence should be used."""
        return self.accuracy >= LEAST_ACCURACY and self.gap >= LEAST_GAP


def evidence_scales(heads: Sequence[Head]) -> Tensor:
    """What each logit is multiplied by before heads compete: k / s_i for every class of head i. [sum C] float64"""
    scales = [EVIDENCE_SCALE / max(float(h.weight.double().norm(dim=1).mean()), 1e-12) for h in heads]
    return torch.cat(
        [
            torch.full((len(head.weight),), scale, dtype=torch.float64)
            for head, scale in zip(heads, scales, strict=True)
        ]
    )


def judge_heads(heads: Sequence[Head]) -> EvidenceTest:
    """Put the class vectors of all heads to the test; a head of one class cannot be judged and fails."""
    T = len(heads)
    if T < 2 or min(len(head.weight) for head in heads) < 2:
        return EvidenceTest(0.0, 0.0)
    units = [torch.nn.functional.normalize(head.weight.double(), dim=1) for head in heads]
    shares, within, across = [], [], []
    for task, vectors in enumerate(units):
        claims, means = [], []
        for other, classes in enumerate(units):
            cosines = vectors @ classes.T
            C = len(classes)
            if other == task:
                means.append((cosines.sum() - C) / (C * (C - 1)))
                cosines = cosines.masked_fill(torch.eye(C, dtype=torch.bool), -torch.inf)
                C -= 1
            else:
                means.append(cosines.mean())
            claims.append((EVIDENCE_SCALE * cosines).logsumexp(dim=1) - torch.tensor(float(C)).log())
        shares.append((torch.stack(claims).argmax(dim=0) == task).double().mean())
        within.append(means.pop(task))
        across.append(torch.stack(means).mean())
    return EvidenceTest(
        float(torch.stack(shares).mean()), float((torch.stack(within) - torch.stack(across)).mean())
    )


def agreement(answers: NDArray[np.int64], others: NDArray[np.int64]) -> float:
    """How often two give the same answer, beyond what their shares of answers make likely: Cohen's kappa.

    Args:
        answers: of some images. [n]
        others: of the same. [n]

    Returns:
        1 if always, 0 as by chance
    """
    names = np.unique(np.concatenate([answers, others]))
    by_chance = float(sum((answers == name).mean() * (others == name).mean() for name in names))
    return (float((answers == others).mean()) - by_chance) / max(1 - by_chance, 1e-12)


def with_evidence_decided(router: RouterSettings, heads: Sequence[Head]) -> RouterSettings:
    """`evidence: auto` replaced by a weight or 0, as the test of these heads says; other settings as they are."""
    if router.evidence != "auto":
        return router
    return dataclasses.replace(
        router, evidence=EVIDENCE_WEIGHT[router.standardize] if judge_heads(heads).helps else 0.0
    )
