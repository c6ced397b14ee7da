"""The numpy reference checked against first principles and against open_clip's own vision tower."""

import importlib.util
import math
import sys
from pathlib import Path

import numpy as np
import pytest


def load_reference():
    path = Path(__file__).with_name("numpy_mass.py")
    spec = importlib.util.spec_from_file_location("numpy_mass_reference", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


nm = load_reference()

D, M, E, P, SIZE, BLOCKS, HEADS, T = 16, 24, 12, 4, 8, 3, 4, 4
LAYER = 1


def random_params(rng, scale=0.3):
    shapes = {
        "class_embedding": (D,),
        "positional_embedding": ((SIZE // P) ** 2 + 1, D),
        "proj": (D, E),
        "conv1.weight": (D, 3, P, P),
    }
    for i in range(BLOCKS):
        block = f"transformer.resblocks.{i}"
        shapes |= {
            f"{block}.attn.in_proj_weight": (3 * D, D),
            f"{block}.attn.in_proj_bias": (3 * D,),
            f"{block}.attn.out_proj.weight": (D, D),
            f"{block}.attn.out_proj.bias": (D,),
            f"{block}.mlp.c_fc.weight": (M, D),
            f"{block}.mlp.c_fc.bias": (M,),
            f"{block}.mlp.c_proj.weight": (D, M),
            f"{block}.mlp.c_proj.bias": (D,),
        }
    norms = [f"transformer.resblocks.{i}.ln_{j}" for i in range(BLOCKS) for j in (1, 2)]
    params = {name: scale * rng.standard_normal(shape) for name, shape in shapes.items()}
    for norm in ["ln_pre", *norms, "ln_post"]:
        params[f"{norm}.weight"] = 1 + 0.1 * rng.standard_normal(D)
        params[f"{norm}.bias"] = 0.1 * rng.standard_normal(D)
    return params


def perturb(rng, params, scale=0.1):
    return {name: value + scale * rng.standard_normal(value.shape) for name, value in params.items()}


def largest_gap(a, b):
    assert a.keys() == b.keys()
    return max(np.abs(a[name] - b[name]).max() for name in a)


@pytest.fixture(scope="module")
def world():
    rng = np.random.default_rng(7)
    base = random_params(rng)
    finetuned = [perturb(rng, base) for _ in range(T)]
    heads = [
        nm.Head(10 * rng.standard_normal((c, E)), rng.standard_normal(c) if c % 2 else None)
        for c in (3, 4, 5, 2)
    ]
    images = rng.standard_normal((6, 3, SIZE, SIZE))
    return base, finetuned, heads, images


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_forward_equals_open_clip(activation):
    torch = pytest.importorskip("torch")
    transformer = pytest.importorskip("open_clip.transformer")
    act = torch.nn.GELU if activation == "gelu" else transformer.QuickGELU
    torch.manual_seed(0)
    tower = (
        transformer.VisionTransformer(
            image_size=SIZE,
            patch_size=P,
            width=D,
            layers=BLOCKS,
            heads=HEADS,
            mlp_ratio=M / D,
            output_dim=E,
            act_layer=act,
        )
        .double()
        .eval()
    )
    rng = np.random.default_rng(1)
    params = random_params(rng)
    # strict loading also proves that the names and shapes are those of open_clip
    tower.load_state_dict({name: torch.from_numpy(value) for name, value in params.items()}, strict=True)
    seen = {}
    for i, block in enumerate(tower.transformer.resblocks):
        for name in ("ln_1", "ln_2"):
            getattr(block, name).register_forward_hook(
                lambda _m, _i, out, key=(name, i): seen.__setitem__(key, out.detach().numpy()),
            )
    images = rng.standard_normal((3, 3, SIZE, SIZE))
    with torch.inference_mode():
        expected = tower(torch.from_numpy(images)).numpy()
    ours = nm.vit_forward(params, images, HEADS, activation)
    assert np.abs(ours.feature - expected).max() < 1e-9
    for i in range(BLOCKS):
        for name, tokens in (("ln_1", ours.attn_inputs[i]), ("ln_2", ours.mlp_inputs[i])):
            reference = seen[name, i]
            if reference.shape != tokens.shape:  # sequence-first versions
                reference = reference.transpose(1, 0, 2)
            assert np.abs(tokens - reference).max() < 1e-9


def test_activations_differ(world):
    base, _, _, images = world
    gelu = nm.vit_forward(base, images, HEADS, "gelu").feature
    assert np.abs(gelu - nm.vit_forward(base, images, HEADS, "quick_gelu").feature).max() > 1e-4


def test_full_rank_single_task_is_the_finetuned_model(world):
    base, finetuned, _, _ = world
    tasks = nm.make_task_vectors(base, finetuned, rank_ratio=1.0)
    for i in range(T):
        for compose in ("tsvm", "sum"):
            assert largest_gap(nm.merge_set(base, tasks, [i], compose), finetuned[i]) < 1e-12


def test_matrix_and_vector_split(world):
    base, finetuned, _, _ = world
    task = nm.make_task_vectors(base, finetuned)[0]
    projections = ("in_proj_weight", "out_proj.weight", "c_fc.weight", "c_proj.weight")
    suffixes = (*projections, "positional_embedding", "proj")
    assert {name for name in base if name.endswith(suffixes)} == set(task.matrices)
    assert {"class_embedding", "conv1.weight", "ln_pre.weight"} <= set(task.vectors)
    assert not set(task.matrices) & set(task.vectors)


def test_single_task_set_is_base_plus_truncated_delta(world):
    base, finetuned, _, _ = world
    tasks = nm.make_task_vectors(base, finetuned)
    merged = nm.merge_set(base, tasks, [2])
    for name, start in base.items():
        delta = finetuned[2][name] - start
        if start.ndim == 2:
            rank = max(1, int(min(start.shape) / T))
            gram_values, gram_vectors = np.linalg.eigh(delta.T @ delta)
            top = gram_vectors[:, np.argsort(gram_values)[::-1][:rank]]
            delta = delta @ top @ top.T  # best approximation of that rank
        assert np.abs(merged[name] - start - delta).max() < 1e-10


def test_ranks_per_task():
    rng = np.random.default_rng(3)
    base = {"w": rng.standard_normal((8, 6))}
    models = [perturb(rng, base) for _ in range(3)]

    def ranks_of(**kwargs):
        return [len(t.matrices["w"].s) for t in nm.make_task_vectors(base, models, **kwargs)]

    assert ranks_of() == [2, 2, 2]
    assert ranks_of(rank_ratio=[0.1, 0.5, 1.0]) == [1, 3, 6]
    assert ranks_of(ranks=[1, 4, 99]) == [1, 4, 6]


def inverse_root(gram):
    values, vectors = np.linalg.eigh(gram)
    return vectors / np.sqrt(values) @ vectors.T


@pytest.mark.parametrize("selected", [(0, 1), (0, 2, 3), (1, 0)])
def test_tsvm_equals_the_small_core_identity(world, selected):
    base, finetuned, _, _ = world
    tasks = nm.make_task_vectors(base, finetuned)
    merged = nm.merge_set(base, tasks, selected)
    for name in tasks[0].matrices:
        parts = [tasks[i].matrices[name] for i in selected]
        U, VH = np.hstack([f.u for f in parts]), np.vstack([f.vh for f in parts])
        core = inverse_root(U.T @ U) @ np.diag(np.hstack([f.s for f in parts])) @ inverse_root(VH @ VH.T)
        assert np.abs(merged[name] - base[name] - U @ core @ VH).max() < 1e-9


def test_orthogonal_tasks_add_up():
    rng = np.random.default_rng(5)
    q, _ = np.linalg.qr(rng.standard_normal((8, 8)))
    p, _ = np.linalg.qr(rng.standard_normal((6, 6)))
    deltas = [q[:, :2] @ np.diag([3.0, 1.0]) @ p[:2], q[:, 2:4] @ np.diag([2.0, 0.5]) @ p[2:4]]
    factors = [nm.truncate(d, 2) for d in deltas]
    assert np.abs(nm.tsvm_delta(factors) - sum(deltas)).max() < 1e-12


def test_same_checkpoint_twice_and_a_zero_delta(world):
    base, finetuned, heads, images = world
    models = [finetuned[0], finetuned[0], base, finetuned[1]]
    tasks = nm.make_task_vectors(base, models)
    assert largest_gap(nm.merge_set(base, tasks, [0, 1]), nm.merge_set(base, tasks, [0])) < 1e-12
    assert largest_gap(nm.merge_set(base, tasks, [2]), base) == 0
    with_zero, without = nm.merge_set(base, tasks, [2, 3]), nm.merge_set(base, tasks, [3])
    assert max(np.abs(with_zero[n] - without[n]).max() for n in tasks[0].matrices) < 1e-12
    out = nm.run_mass(base, models, heads, images, nm.Settings(HEADS, LAYER))
    arrays = [out["residuals"], out["gates"], out["features"], *out["logits"]]
    assert all(np.isfinite(x).all() for x in arrays)
    assert np.abs(out["residuals"][:, 2] - np.linalg.norm(out["z"], axis=1)).max() < 1e-12
    assert np.array_equal(out["residuals"][:, 0], out["residuals"][:, 1])


def test_base_merges(world):
    base, finetuned, _, _ = world
    tasks = nm.make_task_vectors(base, finetuned)
    assert largest_gap(nm.merge_fixed(base, tasks, "zeroshot"), base) == 0
    mean = {name: np.mean([f[name] for f in finetuned], axis=0) for name in base}
    assert largest_gap(nm.merge_fixed(base, tasks, "mean"), mean) < 1e-12
    everything = nm.merge_set(base, tasks, range(T))
    assert largest_gap(nm.merge_fixed(base, tasks, "tsvm"), everything) == 0
    isotropic = nm.merge_fixed(base, tasks, "isotropic")
    for name in base:
        delta = isotropic[name] - base[name]
        if base[name].ndim == 2:
            summed = sum(f[name] - base[name] for f in finetuned)
            values = np.linalg.svd(delta, compute_uv=False)
            assert np.abs(values - np.linalg.svd(summed, compute_uv=False).mean()).max() < 1e-9
            # the polar factor Q of A makes Q^T A symmetric
            assert np.abs(delta.T @ summed - (delta.T @ summed).T).max() < 1e-9
        else:
            assert np.abs(isotropic[name] - mean[name]).max() < 1e-12


def test_sum_weights(world):
    base, finetuned, _, _ = world
    tasks = nm.make_task_vectors(base, finetuned)
    gates = np.array([0.5, 0.1, 0.3, 0.1])
    name = "proj"
    a, b = tasks[0].matrices[name].dense(), tasks[2].matrices[name].dense()
    expected = {
        "sum": a + b,
        "mean": (a + b) / 2,
        "gates": 0.5 * a + 0.3 * b,
        "gates_normalized": (5 * a + 3 * b) / 8,
    }
    for kind, delta in expected.items():
        merged = nm.merge_set(base, tasks, [0, 2], "sum", vectors="base", sum_weights=kind, gates=gates)
        assert np.abs(merged[name] - base[name] - delta).max() < 1e-12
        assert np.array_equal(merged["ln_post.bias"], base["ln_post.bias"])
    vectors = nm.merge_set(base, tasks, [0, 2], "sum")["ln_post.bias"]
    assert np.abs(vectors - (finetuned[0]["ln_post.bias"] + finetuned[2]["ln_post.bias"]) / 2).max() < 1e-12


def test_residuals():
    rng = np.random.default_rng(11)
    z = rng.standard_normal((5, 8))
    vh = np.linalg.qr(rng.standard_normal((8, 3)))[0].T
    least_squares = z.T - vh.T @ np.linalg.lstsq(vh.T, z.T, rcond=None)[0]
    l2 = nm.router_residuals(z, [vh])[:, 0]
    assert np.abs(l2 - np.linalg.norm(least_squares, axis=0)).max() < 1e-12
    assert np.abs(l2**2 - (z**2).sum(1) + ((z @ vh.T) ** 2).sum(1)).max() < 1e-12
    assert np.abs(nm.router_residuals(z, [vh], "l1")[:, 0] - np.abs(least_squares).sum(0)).max() < 1e-12
    for rows in (3, 1):
        basis = vh[:rows]
        mahalanobis = nm.router_residuals(z, [basis], "mahalanobis")
        assert np.abs(mahalanobis * math.sqrt(1e-3) - nm.router_residuals(z, [basis])).max() < 1e-9


def test_mahalanobis_formula_off_the_subspace():
    rng = np.random.default_rng(12)
    r, vh = rng.standard_normal((4, 6)), rng.standard_normal((3, 6))
    inverse = np.linalg.inv(np.cov(vh, rowvar=False) + 1e-3 * np.eye(6))
    expected = np.sqrt(np.einsum("bi,ij,bj->b", r, inverse, r))
    assert np.abs(nm.residual_norm(r, vh, "mahalanobis") / expected - 1).max() < 1e-9


def test_gates_by_hand():
    r = np.array([[1.0, 2.0, 3.0]])
    assert np.array_equal(nm.router_gates(r, "top1"), [[1, 0, 0]])
    e = np.exp(np.array([-1.0, -2.0, -3.0]) / 2)
    assert np.abs(nm.router_gates(r, "weighted", 2.0) - e / e.sum()).max() < 1e-12
    e = np.exp(np.array([1.0, 0.0, -1.0]) / (1 + 1e-6))  # the sample std of 1, 2, 3 is 1
    assert np.abs(nm.router_gates(r, "topk") - e / e.sum()).max() < 1e-12
    assert np.array_equal(nm.router_gates(np.array([[2.5]]), "topk"), [[1.0]])


def test_selection_order():
    gates = np.array([0.22, 0.21, 0.3, 0.27])
    assert nm.select_tasks(gates) == (2, 3, 0)  # four pass, the cap cuts: descending gate
    assert nm.select_tasks(gates, max_tasks=4) == (0, 1, 2, 3)  # nothing cut: ascending index
    assert nm.select_tasks(gates, threshold=0.215) == (0, 2, 3)
    assert nm.select_tasks(gates, mode="weighted") == (0, 1, 2, 3)  # no cap
    assert nm.select_tasks(gates, threshold=0.9) == (2,)
    assert nm.select_tasks(gates, mode="top1") == (2,)
    assert nm.select_tasks(np.array([0.2, 0.2, 0.6]), threshold=0.2) == (2,)  # strictly larger


def test_head_choice():
    logits = [np.array([0.0, 5.0, 0.0]), np.array([4.0, 4.5]), np.array([5.0, -9.0])]
    assert nm.choose_head(logits, (0, 1, 2)) == (0, 1)
    assert nm.choose_head(logits, (2, 0)) == (2, 0)  # a tie goes to the first in selection order
    assert nm.choose_head(logits, (0, 1, 2), "mean") == (1, 1)


def test_permuting_tasks_permutes_everything(world):
    base, finetuned, heads, images = world
    order = [2, 0, 3, 1]
    settings = nm.Settings(HEADS, LAYER, threshold=0.3)
    plain = nm.run_mass(base, finetuned, heads, images, settings)
    moved = nm.run_mass(base, [finetuned[i] for i in order], [heads[i] for i in order], images, settings)
    assert np.abs(moved["residuals"] - plain["residuals"][:, order]).max() < 1e-9
    assert np.abs(moved["gates"] - plain["gates"][:, order]).max() < 1e-9
    assert [frozenset(order[i] for i in chosen) for chosen in moved["sets"]] == plain["sets"]
    assert np.array_equal(np.array(order)[moved["tasks"]], plain["tasks"])
    assert np.array_equal(moved["classes"], plain["classes"])
    for i, j in enumerate(order):
        assert np.abs(moved["logits"][i] - plain["logits"][j]).max() < 1e-9


@pytest.mark.parametrize("mode", ["topk", "top1", "weighted"])
@pytest.mark.parametrize("compose", ["tsvm", "sum"])
def test_run_is_the_sum_of_its_parts(world, mode, compose):
    base, finetuned, heads, images = world
    settings = nm.Settings(
        HEADS,
        LAYER,
        mode=mode,
        compose=compose,
        site="attn",
        token="mean",  # noqa: S106
        norm="l1",
    )
    out = nm.run_mass(base, finetuned, heads, images, settings)
    tasks = nm.make_task_vectors(base, finetuned)
    for b, order in enumerate(out["orders"]):
        params = nm.merge_set(base, tasks, order, compose)
        feature = nm.vit_forward(params, images[b : b + 1], HEADS).feature
        assert np.abs(out["features"][b] - feature[0]).max() < 1e-12
        assert out["tasks"][b] in out["sets"][b]
        best = max(out["logits"][i][b].max() for i in order)
        assert out["logits"][out["tasks"][b]][b, out["classes"][b]] == best


def test_first_pass_override_and_router_rank(world):
    base, finetuned, heads, images = world

    def residuals(first_pass=None, **kwargs):
        settings = nm.Settings(HEADS, LAYER, **kwargs)
        return nm.run_mass(base, finetuned, heads, images, settings, first_pass=first_pass)["residuals"]

    assert np.array_equal(residuals(base_merge="zeroshot"), residuals(first_pass=base))
    assert residuals(router_rank_ratio=1.0).max() < 1e-9  # the whole space leaves no residual
    assert (residuals(router_ranks=8) < residuals()).all()


def test_known_task(world):
    base, finetuned, heads, images = world
    settings = nm.Settings(HEADS, LAYER, rank_ratio=1.0)
    out = nm.run_mass(base, finetuned, heads, images, settings, task=[0, 1, 2, 3, 0, 1])
    assert out["tasks"].tolist() == [0, 1, 2, 3, 0, 1]
    for b, i in enumerate(out["tasks"]):
        feature = nm.vit_forward(finetuned[i], images[b : b + 1], HEADS).feature
        assert np.abs(out["features"][b] - feature[0]).max() < 1e-9
    assert np.isnan(out["residuals"]).all()
