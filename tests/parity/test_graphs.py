"""Eager and exported MASS against the independent numpy reference: every mode, norm and composition."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mass_export.artifact import read_artifact, write_artifact
from mass_export.merge import merge
from mass_export.model import MassModel
from mass_export.onnx_export import export_bundle
from mass_export.progress import Progress
from mass_export.recipe import load_recipe
from runtime.classifier import Classifier, ForwardResult

TASKS, IMAGES = 4, 48
QUIET = Progress(quiet=True)
MODES = {
    "topk": {"mode": "topk", "threshold": 0.2, "temperature": 0.7, "max_tasks": 3},
    "top1": {"mode": "top1"},
    "weighted": {"mode": "weighted", "threshold": 0.26, "temperature": 0.05},
}
SET_SIZES = {"topk": {1, 2, 3}, "top1": {1}, "weighted": {1, 2}}


def load_reference() -> Any:
    path = Path(__file__).with_name("numpy_mass.py")
    spec = importlib.util.spec_from_file_location("numpy_mass_for_graphs", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


numpy_mass = load_reference()


class Case:
    """One recipe, run three ways on the same images."""

    def __init__(self, recipe_path: Path, work: Path, **reference_settings: Any) -> None:
        recipe = load_recipe(recipe_path)
        self.artifact = merge(recipe, QUIET)
        self.exact_artifact = merge(recipe, QUIET, torch.float64)
        self.work = work
        self.images = np.random.default_rng(7).normal(size=(IMAGES, 3, 16, 16)).astype(np.float32)
        folder = recipe_path.parent
        base = self.tower(folder / "base.safetensors")
        finetuned = [self.tower(task.checkpoint) for task in recipe.tasks]
        tensors = {name: t.double().numpy() for name, t in load_file(folder / "heads.safetensors").items()}
        heads = [
            numpy_mass.Head(tensors[task.head.tensor], tensors[task.head.bias] if task.head.bias else None)
            for task in recipe.tasks
        ]
        router = recipe.router
        settings = numpy_mass.Settings(
            **{
                "num_heads": 2,
                "layer": router.layer,
                "site": router.site,
                "token": router.token,
                "norm": router.norm,
                "mode": router.mode,
                "threshold": router.threshold,
                "temperature": router.temperature,
                "max_tasks": router.max_tasks,
                "base_merge": recipe.merge.base_merge,
                "compose": recipe.merge.compose,
                "sum_weights": "mean" if recipe.merge.sum_weights == "uniform" else "gates_normalized",
                "vectors": recipe.merge.vectors,
                "head_choice": recipe.merge.head_choice,
            }
            | reference_settings
        )
        self.expected = numpy_mass.run_mass(base, finetuned, heads, self.images.astype(np.float64), settings)

    @staticmethod
    def tower(path: Path) -> dict[str, np.ndarray]:
        return {name.removeprefix("visual."): t.double().numpy() for name, t in load_file(path).items()}

    def eager(self) -> ForwardResult:
        return MassModel(self.exact_artifact, torch.float64).forward(torch.from_numpy(self.images))

    def onnx(self) -> ForwardResult:
        path = self.work / "merged.safetensors"
        write_artifact(path, self.artifact)
        bundle = export_bundle(read_artifact(path), path, self.work / "bundle", verify=False, progress=QUIET)
        with Classifier(bundle, provider="cpu") as classifier:
            return classifier.forward(self.images)

    def check(self, actual: ForwardResult, residuals: float, gates: float, logits: float) -> None:
        expected = self.expected
        np.testing.assert_allclose(actual.residuals, expected["residuals"], rtol=residuals, atol=residuals)
        np.testing.assert_allclose(actual.gates, expected["gates"], rtol=0, atol=gates)
        np.testing.assert_allclose(
            actual.logits, np.concatenate(expected["logits"], axis=1), rtol=0, atol=logits
        )
        assert [set(np.flatnonzero(row)) for row in actual.selected] == [set(s) for s in expected["sets"]]
        np.testing.assert_array_equal(actual.task_index, expected["tasks"])
        np.testing.assert_array_equal(actual.class_index, expected["classes"])

    def check_everywhere(self) -> None:
        # Gates are float32 by contract; where they scale the deltas their rounding reaches the logits.
        gate_weighted = self.artifact.info.merge.sum_weights == "gates"
        self.check(self.eager(), residuals=1e-9, gates=1e-6, logits=1e-6 if gate_weighted else 1e-9)
        self.check(self.onnx(), residuals=5e-5, gates=3e-4, logits=2e-4)


@pytest.mark.parametrize(
    ("mode", "norm", "compose"), list(itertools.product(MODES, ["l2", "l1", "mahalanobis"], ["tsvm", "sum"]))
)
def test_every_mode_norm_and_composition_equals_the_reference(
    mode: str, norm: str, compose: str, pico_files: Callable[..., Path], tmp_path: Path
) -> None:
    router = MODES[mode] | {"layer": 1, "norm": norm}
    if mode == "weighted":  # the norms have different scales
        router["temperature"] *= {"l2": 1.0, "l1": 4.0, "mahalanobis": 32.0}[norm]
    case = Case(pico_files(tasks=TASKS, compose=compose, router=router), tmp_path)
    assert SET_SIZES[mode] <= {len(s) for s in case.expected["sets"]}
    case.check_everywhere()


@pytest.mark.parametrize(
    "keys",
    [
        {"router": {"layer": 0, "site": "attn"}},
        {"router": {"layer": 2, "site": "attn", "token": "mean"}},
        {"router": {"layer": 2, "site": "mlp", "token": "mean"}},
        {"router": {"layer": 0, "site": "mlp"}},
        {"base_merge": "isotropic"},
        {"base_merge": "mean"},
        {"base_merge": "zeroshot"},
        {"vectors": "base"},
        {"vectors": "base", "compose": "sum"},
        {"compose": "sum", "sum_weights": "gates"},
        {"head_choice": "mean"},
    ],
    ids=str,
)
def test_every_other_setting_equals_the_reference(
    keys: dict[str, Any], pico_files: Callable[..., Path], tmp_path: Path
) -> None:
    keys = {"router": {"layer": 1} | MODES["topk"]} | keys
    keys["router"] = MODES["topk"] | keys["router"]
    Case(pico_files(tasks=TASKS, **keys), tmp_path).check_everywhere()


def test_ranks_by_ratio_and_by_number_equal_the_reference(
    pico_files: Callable[..., Path], tmp_path: Path
) -> None:
    Case(pico_files(tasks=TASKS, rank_ratio=0.4), tmp_path / "a", rank_ratio=0.4)
    case = Case(pico_files(tasks=TASKS, directory=tmp_path / "b", rank=5), tmp_path, ranks=5)
    case.check_everywhere()


def test_a_router_basis_of_its_own_rank_equals_the_reference(
    pico_files: Callable[..., Path], tmp_path: Path
) -> None:
    case = Case(pico_files(tasks=TASKS, router={"layer": 1, "rank": 2}), tmp_path, router_ranks=2)
    case.check_everywhere()


def test_merged_parameters_equal_the_reference(pico_files: Callable[..., Path], tmp_path: Path) -> None:
    case = Case(pico_files(tasks=TASKS, router={"layer": 1} | MODES["topk"]), tmp_path)
    model = MassModel(case.exact_artifact, torch.float64)
    compared = {tuple(sorted(order)): params for order, params in case.expected["merged"].items()}
    assert {len(tasks) for tasks in compared} >= {1, 2, 3}
    for tasks, params in compared.items():
        for name, parameter in model.merged_parameters(tasks).items():
            np.testing.assert_allclose(parameter.numpy(), params[name], rtol=0, atol=1e-9)


def test_forward_on_a_batch_equals_forward_on_its_images_in_any_order(
    pico_files: Callable[..., Path], tmp_path: Path
) -> None:
    case = Case(pico_files(tasks=TASKS, router={"layer": 1} | MODES["topk"]), tmp_path)
    together = case.onnx()
    order = np.random.default_rng(0).permutation(IMAGES)
    with Classifier(tmp_path / "bundle", provider="cpu") as classifier:
        shuffled = classifier.forward(case.images[order])
        alone = [classifier.forward(case.images[i : i + 1]) for i in range(IMAGES)]
    np.testing.assert_allclose(shuffled.logits, together.logits[order], rtol=0, atol=1e-5)
    np.testing.assert_array_equal(shuffled.selected, together.selected[order])
    np.testing.assert_allclose(np.concatenate([r.logits for r in alone]), together.logits, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(np.concatenate([r.selected for r in alone]), together.selected)


def test_the_same_checkpoint_twice_and_a_task_equal_to_the_base_give_finite_answers(
    pico_files: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = pico_files(tasks=TASKS, router={"layer": 1, "threshold": 0.0, "max_tasks": 4})
    folder = recipe.parent
    (folder / "task1.safetensors").write_bytes((folder / "task0.safetensors").read_bytes())
    (folder / "task2.safetensors").write_bytes((folder / "base.safetensors").read_bytes())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the merge says that directions were dropped; tested with merging
        case = Case(recipe, tmp_path)
        result = case.onnx()
        eager = case.eager()
    assert np.isfinite(result.logits).all()
    np.testing.assert_allclose(result.logits, eager.logits, rtol=0, atol=1e-4)
    np.testing.assert_allclose(result.residuals[:, 0], result.residuals[:, 1], rtol=1e-5)
    assert (result.residuals[:, 2] >= result.residuals.max(axis=1) - 1e-5).all()


def standardized(values: np.ndarray) -> np.ndarray:
    return (values - values.mean(axis=1, keepdims=True)) / (values.std(axis=1, ddof=1, keepdims=True) + 1e-6)


@pytest.mark.parametrize("norm", ["l2", "l1"])
@pytest.mark.parametrize("evidence", [0.0, 0.5])
def test_relative_residuals_and_head_evidence_equal_the_reference(
    norm: str, evidence: float, pico_files: Callable[..., Path], tmp_path: Path
) -> None:
    router = {"layers": [1, 2], "standardize": "length", "norm": norm, "evidence": evidence} | MODES["top1"]
    recipe = pico_files(tasks=TASKS, base_merge="zeroshot", router=router)
    case = Case(recipe, tmp_path, layer=1)
    tower = {name: t.numpy() for name, t in case.exact_artifact.base.items()}
    blocks = numpy_mass.vit_forward(tower, case.images.astype(np.float64), 2).mlp_inputs
    shares = []
    for layer in (1, 2):
        z = blocks[layer][:, 0]
        length = np.abs(z).sum(axis=1) if norm == "l1" else np.linalg.norm(z, axis=1)
        single = Case(recipe, tmp_path, layer=layer, site="mlp", norm=norm).expected["residuals"]
        shares.append(single / length[:, None])
    score = 60 * np.mean(shares, axis=0)
    if evidence:
        score = score - evidence * head_claims(case)
    eager, exported = case.eager(), case.onnx()
    np.testing.assert_allclose(eager.residuals, score, rtol=0, atol=1e-9)
    np.testing.assert_allclose(exported.residuals, score, rtol=0, atol=2e-4)
    np.testing.assert_array_equal(eager.selected.argmax(axis=1), score.argmin(axis=1))
    np.testing.assert_array_equal(exported.selected, eager.selected)


@pytest.mark.parametrize("base_merge", ["tsvm", "zeroshot"])
@pytest.mark.parametrize("evidence", [0.0, 0.5])
def test_several_taps_and_head_evidence_equal_the_reference(
    base_merge: str, evidence: float, pico_files: Callable[..., Path], tmp_path: Path
) -> None:
    router = {"layers": [0, 2], "site": "both", "standardize": "tasks", "evidence": evidence} | MODES["top1"]
    recipe = pico_files(tasks=TASKS, base_merge=base_merge, router=router)
    case = Case(recipe, tmp_path, layer=0, site="mlp")
    single = [
        Case(recipe, tmp_path, layer=layer, site=site).expected["residuals"]
        for layer in (0, 2)
        for site in ("attn", "mlp")
    ]
    score = np.mean([standardized(r) for r in single], axis=0)
    if evidence:
        score = score - evidence * standardized(head_claims(case))
    eager, exported = case.eager(), case.onnx()
    np.testing.assert_allclose(eager.residuals, score, rtol=0, atol=1e-9)
    np.testing.assert_allclose(exported.residuals, score, rtol=0, atol=1e-4)
    np.testing.assert_array_equal(eager.selected.argmax(axis=1), score.argmin(axis=1))
    np.testing.assert_array_equal(exported.selected, eager.selected)
    np.testing.assert_allclose(exported.logits, eager.logits, rtol=0, atol=2e-4)


def head_claims(case: Case) -> np.ndarray:
    """logsumexp of each head's logits on the first pass' feature at scale 28, less the log of its size."""
    artifact = case.exact_artifact
    tower = {name: t.numpy() for name, t in (artifact.merged or artifact.base).items()}
    feature = numpy_mass.normalize(numpy_mass.vit_forward(tower, case.images.astype(np.float64), 2).feature)
    claims = []
    for head in artifact.heads:
        bias = 0 if head.bias is None else head.bias.double().numpy()
        weight = head.weight.double().numpy()
        logits = 28 / np.linalg.norm(weight, axis=1).mean() * (feature @ weight.T + bias)
        claims.append(np.log(np.exp(logits).sum(axis=1)) - np.log(logits.shape[1]))
    return np.stack(claims, axis=1)


def test_verified_routes_are_the_better_of_the_two_best_tasks(
    pico_files: Callable[..., Path], tmp_path: Path
) -> None:
    router = {"layers": [0, 1, 2], "standardize": "tasks", "verify_margin": 0.4, "verify_prior": 0.5}
    case = Case(pico_files(tasks=TASKS, router=router | MODES["top1"]), tmp_path, layer=1)
    plain = MassModel(
        dataclasses.replace(
            case.exact_artifact,
            info=dataclasses.replace(
                case.exact_artifact.info,
                router=dataclasses.replace(case.exact_artifact.info.router, verify_margin=0.0),
            ),
        ),
        torch.float64,
    )
    images = torch.from_numpy(case.images)
    first = plain.forward(images)
    singles = [plain.forward(images, tasks=[name]) for name in plain.task_names]
    expected = first.task_index.copy()
    order = np.argsort(first.residuals, axis=1)
    unsure = np.diff(np.take_along_axis(first.residuals, order[:, :2], axis=1))[:, 0] < 0.4
    starts = np.cumsum([0, *(len(t.classes) for t in case.artifact.info.tasks)])
    for b in np.flatnonzero(unsure):
        values = []
        for task in order[b, :2]:
            head = singles[task].logits[b, starts[task] : starts[task + 1]]
            values.append(np.log(np.exp(head).max() / np.exp(head).sum()) - 0.5 * first.residuals[b, task])
        expected[b] = order[b, int(np.argmax(values))]
    assert 0 < unsure.sum() < IMAGES
    assert (expected != first.task_index).any()
    for result in (case.eager(), case.onnx()):
        np.testing.assert_array_equal(result.verified, unsure)
        np.testing.assert_array_equal(result.task_index, expected)
        np.testing.assert_array_equal(result.selected.argmax(axis=1), expected)
