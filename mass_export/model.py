"""Eager MASS: the PyTorch model that the exported graphs are measured against.

Read top to bottom it is the method: residuals of the first pass, gates and sets, weights merged densely for
every set, one pass per set, heads. It is written to be right, not fast. Numbers: arXiv 2504.05342.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mass_export.artifact import Artifact, Calibration
from mass_export.head_evidence import evidence_scales
from mass_export.merging import merge_sum, merge_tsvm
from mass_export.router_spec import Tap
from mass_export.routing import (
    combine_taps,
    feature_length,
    head_evidence,
    is_sure,
    log_posterior,
    projection_residuals,
    routing_feature,
    standardize_over_tasks,
    unknown_score,
    whitened_distance,
)
from mass_export.second_pass import head_biases
from mass_export.vit import encode, tap_tokens
from runtime.bundle import TaskSpec
from runtime.classifier import ForwardResult
from runtime.routing import Selection, answer, gates_from_residuals, select_tasks
from runtime.verification import verify_routes

CACHED_SETS = 16
CACHED_BYTES = 2 << 30  # of merged models; one is kept whatever its size


class MassModel:
    """The merged model.

    Attributes:
        artifact: what it was made from.
        dtype: of all computation, float32 or float64.
    """

    def __init__(self, artifact: Artifact, dtype: torch.dtype = torch.float32) -> None:
        self.artifact = artifact
        self.dtype = dtype
        self._first_pass = {name: p.to(dtype) for name, p in (artifact.merged or artifact.base).items()}
        self._bases = [{name: vh.to(dtype) for name, vh in bases.items()} for bases in artifact.routing_bases]
        self._calibration = _cast(artifact.calibration, dtype)
        self._head_weight = torch.cat([head.weight for head in artifact.heads]).to(dtype)
        self._head_bias = torch.from_numpy(head_biases(artifact.heads)).to(dtype)
        self._evidence_scales = evidence_scales(artifact.heads).to(dtype)
        self._merged: OrderedDict[tuple[object, ...], dict[str, Tensor]] = OrderedDict()

    @property
    def task_names(self) -> list[str]:
        """Names in order."""
        return [task.name for task in self.artifact.info.tasks]

    def residuals(self, pixel_values: Tensor) -> Tensor:
        """First pass: distance of the routing features to each task's subspaces. [B, 3, H, W] -> [B, T]"""
        return self.first_pass(pixel_values)[0]

    @torch.inference_mode()
    def first_pass(self, pixel_values: Tensor) -> tuple[Tensor, Tensor | None]:
        """Residuals, and how unknown each image is, if that can be said.

        Args:
            pixel_values: normalised images. [B, 3, H, W]

        Returns:
            residuals [B, T], unknown [B] or None
        """
        info = self.artifact.info
        router, spec, calibration = info.router, info.vision, self._calibration
        pixel_values = pixel_values.to(self.dtype)
        tokens = tap_tokens(self._first_pass, pixel_values, spec, info.read_taps())
        features = {tap: routing_feature(t, router.token) for tap, t in tokens.items()}
        score = torch.zeros(len(pixel_values), len(info.tasks), dtype=self.dtype)
        by_tap, evidence = [], None
        if info.calibration is None or info.calibration.residual_weight:
            by_tap = [
                projection_residuals(features[tap], [b[tap.parameter] for b in self._bases], router.norm)
                for tap in info.taps()
            ]
            lengths = torch.stack([feature_length(features[tap], router.norm) for tap in info.taps()], dim=1)
            score = combine_taps(torch.stack(by_tap, dim=1), router.standardize, calibration, lengths)
        if info.calibration is not None and calibration is not None:
            score = info.calibration.residual_weight * score
            if info.calibration.discriminant:
                assert calibration.weight is not None
                assert calibration.bias is not None
                z = torch.cat([features[tap] for tap in info.calibration.discriminant], dim=1)
                posterior = log_posterior(z, calibration.weight, calibration.bias)
                score = score - info.calibration.discriminant_weight * posterior
        if router.evidence:
            assert router.evidence != "auto"
            evidence = self.evidence(pixel_values)
            lead = evidence if router.standardize == "length" else standardize_over_tasks(evidence)
            score = score - router.evidence * lead
        unknown = None
        if info.calibration is not None and info.calibration.unknown is not None:
            assert calibration is not None
            assert calibration.whiten is not None
            assert calibration.centres is not None
            unknown = whitened_distance(
                features[info.calibration.unknown],
                calibration.whiten,
                calibration.centres,
                calibration.nothing,
            )
        elif by_tap:
            unknown = unknown_score(features[info.taps()[-1]], by_tap[-1], router.norm, evidence)
        if info.calibration is not None and info.calibration.stops:
            return self._stopped(features, score, unknown)
        return score, unknown

    @torch.inference_mode()
    def evidence(self, pixel_values: Tensor) -> Tensor:
        """What each head makes of the first pass' own feature, see `head_evidence`. [B, 3, H, W] -> [B, T]"""
        feature = encode(self._first_pass, pixel_values.to(self.dtype), self.artifact.info.vision)
        logits = feature @ self._head_weight.T + self._head_bias
        return head_evidence(
            logits * self._evidence_scales, [len(t.classes) for t in self.artifact.info.tasks]
        )

    def _stopped(
        self, features: Mapping[Tap, Tensor], score: Tensor, unknown: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The answers of the first stop that is sure, image by image; of the last where none is."""
        info, calibration = self.artifact.info.calibration, self._calibration
        assert info is not None
        assert calibration is not None
        assert calibration.stop_weight is not None
        assert calibration.stop_bias is not None
        for index in reversed(range(len(info.stops))):
            taps = info.taps_before(info.stops[index])
            z = torch.cat([features[tap] for tap in taps], dim=1)
            weight = calibration.stop_weight[index, :, : z.shape[1]]
            early = -info.discriminant_weight * log_posterior(z, weight, calibration.stop_bias[index])
            sure = is_sure(early, info.stop_margin)
            score = torch.where(sure[:, None], early, score)
            if unknown is not None:
                known = calibration.known_at_stop(index)
                assert known is not None
                unknown = torch.where(sure, whitened_distance(features[taps[-1]], *known), unknown)
        return score, unknown

    def route(
        self, residuals: NDArray[np.floating], allowed: Sequence[int] | None = None
    ) -> tuple[NDArray[np.float32], Selection]:
        """Gates before selection [B, T], and the selected sets."""
        router = self.artifact.info.router
        gates = gates_from_residuals(residuals, router.mode, router.temperature, allowed)
        return gates, select_tasks(gates, router.mode, router.threshold, router.max_tasks)

    def merged_parameters(
        self, tasks: tuple[int, ...], gates: tuple[float, ...] | None = None
    ) -> dict[str, Tensor]:
        """Base plus the merged delta of a set of tasks, dense (MASS.md section 4).

        Args:
            tasks: indices, ascending.
            gates: of those tasks; only `compose: sum` with `sum_weights: gates` uses them.
        """
        settings = self.artifact.info.merge
        weights = _sum_weights(len(tasks), gates if settings.sum_weights == "gates" else None)
        key = (tasks, weights if settings.compose == "sum" else None)
        if key not in self._merged:
            params = {}
            factors = [self.artifact.tasks[i] for i in tasks]
            for name, parameter in self.artifact.base.items():
                if name in factors[0].matrices:
                    matrices = [f.matrices[name] for f in factors]
                    delta = (
                        merge_tsvm(matrices, name)
                        if settings.compose == "tsvm"
                        else merge_sum(matrices, weights)
                    )
                elif settings.vectors == "mean":
                    delta = torch.stack([f.vectors[name].double() for f in factors]).mean(dim=0)
                else:
                    delta = torch.zeros(())
                params[name] = (parameter.double() + delta).to(self.dtype)
            self._merged[key] = params
            size = sum(parameter.numel() * parameter.element_size() for parameter in params.values())
            while len(self._merged) > min(CACHED_SETS, max(1, CACHED_BYTES // size)):
                self._merged.popitem(last=False)
        self._merged.move_to_end(key)
        return self._merged[key]

    @torch.inference_mode()
    def logits(
        self, pixel_values: Tensor, tasks: tuple[int, ...], gates: tuple[float, ...] | None = None
    ) -> Tensor:
        """Second pass for one set: every head on its feature. [B, 3, H, W] -> [B, sum C]"""
        params = self.merged_parameters(tasks, gates)
        feature = encode(params, pixel_values.to(self.dtype), self.artifact.info.vision)
        return feature @ self._head_weight.T + self._head_bias

    def forward(self, pixel_values: Tensor, tasks: Sequence[str] | None = None) -> ForwardResult:
        """Both passes; the same result as `runtime.Classifier.forward`.

        Args:
            pixel_values: normalised images. [B, 3, H, W]
            tasks: only these may answer; one alone needs no first pass. None: all.
        """
        T, B = len(self.artifact.tasks), len(pixel_values)
        allowed = range(T) if tasks is None else sorted(self.task_names.index(name) for name in tasks)
        residuals = unknown = None
        if tasks is not None and len(allowed) == 1:
            gates = np.zeros((B, T), np.float32)
            gates[:, allowed[0]] = 1
            selection = select_tasks(gates, "top1", 0.0, 1)
        else:
            scores, distance = self.first_pass(pixel_values)
            residuals, unknown = scores.numpy(), None if distance is None else distance.numpy()
            gates, selection = self.route(residuals, allowed)
        logits = self._logits_by_set(pixel_values, gates, selection.sets())
        verified = np.zeros(B, np.bool_)
        if residuals is not None:
            selection, verified = verify_routes(
                selection,
                logits,
                residuals,
                allowed=None if tasks is None else allowed,
                settings=self.artifact.info.router,
                tasks=self._task_specs(),
                run=lambda rows, sets: self._logits_by_set(pixel_values[rows], gates[rows], sets),
            )
        task_index, class_index = answer(
            logits, self._task_specs(), selection, self.artifact.info.merge.head_choice
        )
        return ForwardResult(
            residuals=residuals,
            gates=gates,
            selected=selection.selected,
            logits=logits,
            task_index=task_index,
            class_index=class_index,
            verified=verified,
            unknown=unknown,
        )

    def _logits_by_set(
        self, pixel_values: Tensor, gates: NDArray[np.float32], sets: Sequence[tuple[int, ...]]
    ) -> NDArray[np.floating]:
        settings = self.artifact.info.merge
        per_sample_gates = settings.compose == "sum" and settings.sum_weights == "gates"
        groups: dict[tuple[tuple[int, ...], tuple[float, ...] | None], list[int]] = {}
        for b, tasks in enumerate(sets):
            key = tuple(float(g) for g in gates[b, list(tasks)]) if per_sample_gates else None
            groups.setdefault((tasks, key), []).append(b)
        logits = np.empty(
            (len(pixel_values), self._head_weight.shape[0]), torch.empty(0, dtype=self.dtype).numpy().dtype
        )
        for (tasks, set_gates), rows in groups.items():
            logits[rows] = self.logits(pixel_values[rows], tasks, set_gates).numpy()
        return logits

    def _task_specs(self) -> list[TaskSpec]:
        specs, start = [], 0
        for task in self.artifact.info.tasks:
            specs.append(TaskSpec(task.name, task.classes, start, start + len(task.classes)))
            start += len(task.classes)
        return specs


def _sum_weights(count: int, gates: tuple[float, ...] | None) -> tuple[float, ...]:
    """Uniform 1/K, or the set's gates renormalised."""
    if gates is None:
        return (1 / count,) * count
    return tuple(g / sum(gates) for g in gates)


def _cast(calibration: Calibration | None, dtype: torch.dtype) -> Calibration | None:
    if calibration is None:
        return None
    return Calibration(**{name: tensor.to(dtype) for name, tensor in calibration.tensors().items()})
