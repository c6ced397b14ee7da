"""Where may the first pass stop? At the first block whose discriminant is sure (arXiv 2504.05342 leaves it open).

Most images are told apart after a few blocks, some never before the last. So an image is read up to the first of at
most two early stops at which its best task leads the second by a margin, else to the end. Stops and margin are those
that run the fewest blocks over the calibration images, as cross-validation sees them, while none of these stops
with a wrong task that the end would have got right.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mass_export.router_spec import Tap
from runtime.verification import two_best

MOST_STOPS = 2
# What a stop itself costs, in blocks: the CLS token's attention, and a batch that is divided.
STOP_COST = 0.3
# The share of calibration images that may stop with a wrong task though the end knows better.
HARM = 0.0
MARGINS = 100
# Fewer images than this of each task say too little about how sure is sure.
LEAST_IMAGES = 20


@dataclass(frozen=True)
class EarlyStops:
    """Where images stop.

    Attributes:
        stops: blocks, ascending; none if stopping early is not worth it.
        last: the tap that is read by those that do not stop.
        margin: an image stops where its best task leads by as much. [nats]
        blocks: that are run on average.
        scores: of each image, where it stops. [n, K]
    """

    stops: tuple[int, ...]
    last: Tap
    margin: float
    blocks: float
    scores: NDArray[np.float64]


def no_stops(scores: NDArray[np.float64], fixed: Tap) -> EarlyStops:
    """All images are read up to `fixed`, which scores them so: [n, K]."""
    return EarlyStops((), fixed, 0.0, fixed.layer + STOP_COST, scores)


def choose_stops(
    posteriors: Mapping[Tap, NDArray[np.float64]], labels: NDArray[np.int64], fixed: Tap
) -> EarlyStops:
    """The cheapest stops that do no harm.

    Args:
        posteriors: cross-validated scores by the last tap that is read, up to a constant for each image. [n, K] each
        labels: the tasks. [n]
        fixed: where all images would stop otherwise.

    Returns:
        no stops and `fixed` if they save less than stops cost
    """
    best = no_stops(posteriors[fixed], fixed)
    if np.bincount(labels).min() < LEAST_IMAGES:
        return best
    taps, images = sorted(posteriors), np.arange(len(labels))
    right = {tap: posteriors[tap].argmax(axis=1) == labels for tap in taps}
    leads = {tap: two_best(-posteriors[tap])[1] for tap in taps}
    last = max(taps, key=lambda tap: (right[tap].mean(), -tap.layer))
    earlier = taps[: taps.index(last)]
    for stops in itertools.chain(*(itertools.combinations(earlier, k + 1) for k in range(MOST_STOPS))):
        reached = (*stops, last)
        costs = np.array([tap.layer + (i + 1) * STOP_COST for i, tap in enumerate(reached)])
        is_right = np.stack([right[tap] for tap in reached])
        for margin in np.quantile(leads[stops[0]], np.linspace(0, 1, MARGINS)):
            sure = np.stack([*(leads[tap] >= margin for tap in stops), np.ones(len(labels), np.bool_)])
            where = sure.argmax(axis=0)
            blocks = float(costs[where].mean())
            if blocks < best.blocks and np.mean(right[last] & ~is_right[where, images]) <= HARM:
                scores = np.stack([posteriors[tap] for tap in reached])[where, images]
                best = EarlyStops(tuple(tap.layer for tap in stops), last, float(margin), blocks, scores)
    return best
