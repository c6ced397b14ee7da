"""Signatures of failure that the weights show by themselves. Each check takes a `Source` and says what it found.

Thresholds were set so that the zoo's two suites give no warning; `tests/mass_export/test_diagnosis.py` builds a case
for each.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Mapping

import numpy as np

from mass_export.diagnosis_report import Finding
from mass_export.errors import shortened
from mass_export.inspection_sources import Source
from mass_export.subspaces import mean_overlap

SAME_OVERLAP = 0.99
CLOSE_OVERLAP = 0.8
FLAT_SPECTRUM = 0.6
SHARED_DIRECTIONS = 0.25
HEAD_SCALE_RATIO = 3.0
NORM_RATIO = 4.0
NORM_OF_BASE = 0.5
ROUTER_RANK_RATIO = 2.0


def several_tasks_merge(source: Source) -> bool:
    """Whether a set may hold more than one task."""
    cap = source.router.get("max_tasks") if source.router["mode"] == "topk" else len(source.classes)
    return source.router["mode"] != "top1" and cap != 1 and len(source.classes) > 1


def find_zero_vectors(source: Source) -> list[Finding]:
    """Tasks that equal the base."""
    zero = [name for i, name in enumerate(source.classes) if not any(m.s[i].any() for m in source.matrices)]
    if not zero:
        return []
    seen = f"No matrix of {shortened(zero)} differs from the base."
    advice = (
        "The checkpoint is probably the base itself, or only its head was trained. Give the fine-tuned checkpoint; or "
        "leave the task out, because the router cannot find it: its residual is always the largest."
    )
    return [Finding("zero_vectors", "problem", tuple(zero), seen, advice)]


def _norms(source: Source) -> dict[str, float]:
    """Frobenius norm of each task's kept matrices together."""
    return {
        name: math.sqrt(sum(float(np.square(m.s[i], dtype=np.float64).sum()) for m in source.matrices))
        for i, name in enumerate(source.classes)
    }


def find_large_vectors(source: Source) -> list[Finding]:
    """Task vectors far longer than the others, or not small beside the base: of another base, or diverged."""
    norms, findings = _norms(source), []
    for name, norm in norms.items():
        others = [other for task, other in norms.items() if task != name and other > 0]
        to_others = norm / statistics.median(others) if others else 0.0
        to_base = norm / source.base_norm if source.base_norm else 0.0
        if to_others <= NORM_RATIO and to_base <= NORM_OF_BASE:
            continue
        seen = (
            f"The task vector of {name} is {to_others:.1f} times as long as the others' median and "
            f"{to_base:.0%} of the base's matrices."
        )
        advice = (
            "Check that its checkpoint was fine-tuned from this base, of the same pretraining, and that the training "
            "did not diverge."
        )
        findings.append(Finding("large_vectors", "warning", (name,), seen, advice))
    return findings


def find_low_rank(source: Source) -> list[Finding]:
    """Tasks whose spectrum is still high where it was cut."""
    findings = []
    for i, name in enumerate(source.classes):
        ratios = [
            float(m.s[i][-1] / m.s[i][0])
            for m in source.matrices
            if len(m.s[i]) and m.s[i][0] > 0 and len(m.s[i]) < min(m.u_t[i].shape[1], m.vh[i].shape[1])
        ]
        flat = statistics.median(ratios) if ratios else 0.0
        if flat <= FLAT_SPECTRUM:
            continue
        rank = statistics.median(m.ranks[i] for m in source.matrices)
        seen = (
            f"{name}: at rank {rank:g} the last kept singular value is still {flat:.0%} of the largest (median over "
            "the matrices): much of what was learned is cut off."
        )
        findings.append(
            Finding(
                "low_rank", "warning", (name,), seen, "Merge with a larger rank_ratio, or with rank_budget."
            )
        )
    return findings


def find_same_tasks(source: Source) -> list[Finding]:
    """Pairs of tasks with (nearly) the same subspaces."""
    if len(source.classes) < 2:
        return []
    vh = mean_overlap([m.vh_geometry for m in source.matrices])[0]
    u = mean_overlap([m.u_geometry for m in source.matrices])[0]
    findings = []
    for (i, a), (j, b) in itertools.combinations(enumerate(source.classes), 2):
        overlap = float(min(vh[i, j], u[i, j]))
        if math.isnan(overlap) or overlap < CLOSE_OVERLAP:
            continue
        same = overlap >= SAME_OVERLAP
        seen = f"{a} and {b} share {overlap:.0%} of their directions; the router cannot tell them apart."
        advice = (
            "The same checkpoint was probably given twice; give each task its own, or merge the two class lists into "
            "one task."
            if same
            else "Make them one task with both class lists, or calibrate the router with images of both."
        )
        findings.append(Finding("same_tasks", "problem" if same else "warning", (a, b), seen, advice))
    return findings


def find_ill_conditioned(source: Source) -> list[Finding]:
    """Stacks of all tasks of which many directions are lost; only where stacks are used."""
    if len(source.classes) < 2:
        return []
    stacked = source.merge["base_merge"] == "tsvm" or (
        source.merge["compose"] == "tsvm" and several_tasks_merge(source)
    )
    if not stacked:
        return []
    lost: dict[str, float] = {}
    for matrix in source.matrices:
        for condition in (matrix.u_geometry.condition, matrix.vh_geometry.condition):
            share = condition.below_cutoff / condition.directions if condition.directions else 0.0
            lost[matrix.name] = max(share, lost.get(matrix.name, 0.0))
    bad = {name: share for name, share in lost.items() if share > SHARED_DIRECTIONS}
    if not bad:
        return []
    worst = max(bad, key=bad.__getitem__)
    seen = (
        f"In {len(bad)} of {len(lost)} matrices more than {SHARED_DIRECTIONS:.0%} of the stacked directions depend on "
        f"others and are merged into one, in {worst} {bad[worst]:.0%}."
    )
    advice = (
        "Lower rank_ratio to 1/T or less, so that the stack fits its space; look for tasks that were given twice; "
        "or use router: default, which stacks nothing."
    )
    return [Finding("ill_conditioned", "warning", tuple(bad), seen, advice)]


def find_head_scales(source: Source) -> list[Finding]:
    """Heads of very different scale, of which the loudest wins wherever heads compete."""
    if source.heads is None or len(source.classes) < 2:
        return []
    lengths = {
        name: float(np.linalg.norm(w.astype(np.float64), axis=1).mean()) for name, w in source.heads.items()
    }
    loud, quiet = (pick(lengths, key=lengths.__getitem__) for pick in (max, min))
    if lengths[loud] <= HEAD_SCALE_RATIO * lengths[quiet]:
        return []
    seen = (
        f"Class vectors of {loud} are {lengths[loud]:.3g} long, those of {quiet} {lengths[quiet]:.3g}: its logits are "
        "larger whatever the image."
    )
    advice = (
        f"Scale the head of {quiet} by {lengths[loud] / lengths[quiet]:.3g} (CLIP's zero-shot heads include "
        "exp(logit_scale), about 100)"
    )
    competes = several_tasks_merge(source) or (source.router.get("verify_margin") or 0) > 0
    advice += "." if competes else "; with one task a set, as here, it matters only to verified routes."
    severity = "warning" if competes else "note"
    return [Finding("head_scales", severity, (loud, quiet), seen, advice)]  # type: ignore[arg-type]


def find_router_ranks(source: Source) -> list[Finding]:
    """Router bases of very different rank: the wider one leaves a smaller residual of any image."""
    ranks = {
        name: max((int(np.any(rows[i] != 0, axis=1).sum()) for rows in source.taps.values()), default=0)
        for i, name in enumerate(source.classes)
    }
    known = {name: rank for name, rank in ranks.items() if rank}
    if len(known) < 2 or max(known.values()) <= ROUTER_RANK_RATIO * min(known.values()):
        return []
    wide, narrow = (pick(known, key=known.__getitem__) for pick in (max, min))
    seen = (
        f"The router compares {wide} at rank {known[wide]} with {narrow} at rank {known[narrow]}: a wider subspace "
        "leaves a smaller residual of any image."
    )
    advice = f"Give all tasks one rank in the router, router: {{rank: {known[narrow]}}}, or calibrate it."
    return [Finding("router_ranks", "warning", (wide, narrow), seen, advice)]


def find_router_settings(source: Source) -> list[Finding]:
    """Thresholds of `topk` that no image, or every image, passes: gates of z-scores are bounded."""
    T, router = len(source.classes), source.router
    if router["mode"] != "topk" or T < 2:
        return []
    # One residual far below T - 1 equal ones has the z-score (T-1)/sqrt(T), and they have -1/sqrt(T).
    odds = (T - 1) * math.exp(-T / math.sqrt(T) / router["temperature"])
    highest, threshold = 1 / (1 + odds), router["threshold"]
    if highest <= threshold:
        seen = (
            f"With {T} tasks and temperature {router['temperature']:g} no gate exceeds {highest:.2f}; the threshold is "
            f"{threshold:g}."
        )
        advice = "Lower the threshold or the temperature; as it is, every image gets its best task alone (mode: top1)."
        return [Finding("router_settings", "warning", (), seen, advice)]
    if T == 2:
        seen = (
            f"Two tasks always have the gates {highest:.2f} and {1 - highest:.2f}, however sure the route is."
        )
        advice = "Use mode: top1; where both are to be merged in doubt, mode: weighted."
        return [Finding("router_settings", "note", (), seen, advice)]
    return []


WEIGHT_CHECKS: Mapping[str, Callable[[Source], list[Finding]]] = {
    "zero_vectors": find_zero_vectors,
    "large_vectors": find_large_vectors,
    "low_rank": find_low_rank,
    "same_tasks": find_same_tasks,
    "ill_conditioned": find_ill_conditioned,
    "head_scales": find_head_scales,
    "router_ranks": find_router_ranks,
    "router_settings": find_router_settings,
}
