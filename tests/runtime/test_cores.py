"""Cores reproduce the dense TSV-M merge, and are computed once per set."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from runtime import cores
from runtime.bundle import MatrixBases, StoredArray
from runtime.cores import CoreCache, compute_core

D_OUT, D_IN, R = 14, 11, 3


def bases_of(tasks, seed=0, rank=R):
    """Orthonormal bases, descending singular values: u_t [T, R, D_out], s [T, R], vh [T, R, D_in] float64."""
    rng = np.random.default_rng(seed)
    u_t = np.stack([np.linalg.qr(rng.normal(size=(D_OUT, rank)))[0].T for _ in range(tasks)])
    vh = np.stack([np.linalg.qr(rng.normal(size=(D_IN, rank)))[0].T for _ in range(tasks)])
    return u_t, np.sort(rng.random((tasks, rank)), axis=1)[:, ::-1] + 0.1, vh


def polar(stack):
    p, sigma, qh = np.linalg.svd(stack, full_matrices=False)
    kept = sigma > 1e-6 * sigma[0]
    return (p * kept) @ qh


def dense_merge(u_t, s, vh):
    u = np.concatenate(u_t).T
    return polar(u) @ np.diag(np.concatenate(s)) @ polar(np.concatenate(vh))


def delta_of(core, u_t, vh):
    return np.concatenate(u_t).T @ core.astype(np.float64) @ np.concatenate(vh)


@pytest.mark.parametrize("tasks", [1, 2, 3])
def test_the_core_between_the_bases_is_the_dense_merge(tasks):
    u_t, s, vh = bases_of(tasks)
    core = compute_core(u_t, s, vh)
    assert core.dtype == np.float32
    assert core.shape == (tasks * R, tasks * R)
    assert np.allclose(delta_of(core, u_t, vh), dense_merge(u_t, s, vh), atol=1e-6)


def test_a_single_task_has_its_singular_values_on_the_diagonal_exactly():
    u_t, s, vh = bases_of(1)
    assert np.array_equal(compute_core(u_t, s, vh), np.diag(s[0].astype(np.float32)))


def test_the_same_task_twice_counts_once():
    u_t, s, vh = bases_of(1)
    core = compute_core([u_t[0], u_t[0]], [s[0], s[0]], [vh[0], vh[0]])
    assert np.allclose(delta_of(core, [u_t[0]] * 2, [vh[0]] * 2), delta_of(np.diag(s[0]), u_t, vh), atol=1e-6)


def test_a_nearly_equal_task_stays_finite_and_close():
    u_t, s, vh = (part.astype(np.float32) for part in bases_of(1))
    noise = np.random.default_rng(1).normal(size=u_t[0].shape).astype(np.float32)
    nearly = u_t[0] + 1e-6 * noise
    core = compute_core([u_t[0], nearly], [s[0], s[0]], [vh[0], vh[0]])
    assert np.abs(core).max() < 10
    assert np.allclose(
        delta_of(core, [u_t[0], nearly], [vh[0]] * 2), delta_of(np.diag(s[0]), u_t, vh), atol=1e-4
    )


def test_a_zero_task_contributes_nothing():
    u_t, s, vh = bases_of(2)
    u_t[1], s[1], vh[1] = 0, 0, 0
    core = compute_core(u_t, s, vh)
    assert np.allclose(core[:R, :R], np.diag(s[0]), atol=1e-6)
    assert not core[R:].any()
    assert not core[:, R:].any()
    assert not compute_core(u_t * 0, s * 0, vh * 0).any()


def test_rows_of_padding_change_nothing():
    u_t, s, vh = bases_of(2)
    expected = dense_merge([u_t[0], u_t[1][:2]], [s[0], s[1][:2]], [vh[0], vh[1][:2]])
    u_t[1, 2], s[1, 2], vh[1, 2] = 0, 0, 0
    assert np.allclose(delta_of(compute_core(u_t, s, vh), u_t, vh), expected, atol=1e-6)


def test_more_directions_than_dimensions_give_the_dense_merge():
    u_t, s, vh = bases_of(3, rank=5)
    assert D_OUT < 3 * 5
    assert np.allclose(delta_of(compute_core(u_t, s, vh), u_t, vh), dense_merge(u_t, s, vh), atol=1e-5)


@pytest.fixture
def stored(tmp_path):
    """Two matrices of four tasks in a file."""
    matrices, arrays, data = [], [], b"padding!"
    for number in range(2):
        parts = [part.astype("<f4") for part in bases_of(4, seed=number)]
        specs = []
        for part in parts:
            specs.append(StoredArray("weights.bin", len(data), "float32", part.shape))
            data += part.tobytes()
        matrices.append(MatrixBases(f"m{number}", f"cores.m{number}", (R,) * 4, *specs))
        arrays.append(parts)
    (tmp_path / "weights.bin").write_bytes(data)
    return tmp_path, matrices, arrays


def test_the_cache_returns_the_cores_of_a_set_by_input_name(stored):
    directory, matrices, arrays = stored
    found = CoreCache(directory, matrices, 2).get((1, 3))
    assert set(found) == {"cores.m0", "cores.m1"}
    for (u_t, s, vh), core in zip(arrays, found.values(), strict=True):
        assert np.array_equal(core, compute_core(u_t[[1, 3]], s[[1, 3]], vh[[1, 3]]))
        assert not core.flags.writeable


def counted(monkeypatch, delay_s=0.0, *, fail_first=False):
    calls = []
    true = compute_core

    def compute(u_t, s, vh):
        calls.append(len(s))
        time.sleep(delay_s)
        if fail_first and len(calls) == 1:
            raise MemoryError
        return true(u_t, s, vh)

    monkeypatch.setattr(cores, "compute_core", compute)
    return calls


def test_the_cache_forgets_the_set_used_longest_ago(stored, monkeypatch):
    directory, matrices, _ = stored
    calls = counted(monkeypatch)
    cache = CoreCache(directory, matrices[:1], 2)
    for tasks in [(0,), (1,), (0,), (2,), (0,)]:
        cache.get(tasks)
    assert len(calls) == 3
    assert len(cache) == 2
    cache.get((1,))
    assert len(calls) == 4


def test_threads_that_ask_at_once_share_one_computation(stored, monkeypatch):
    directory, matrices, _ = stored
    calls = counted(monkeypatch, delay_s=0.01)
    cache = CoreCache(directory, matrices[:1], 4)
    start = threading.Barrier(8)

    def ask(_):
        start.wait()
        return cache.get((0, 2))

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(ask, range(8)))
    assert len(calls) == 1
    assert all(each is found[0] for each in found)


def test_a_failed_computation_is_tried_again(stored, monkeypatch):
    directory, matrices, _ = stored
    calls = counted(monkeypatch, fail_first=True)
    cache = CoreCache(directory, matrices[:1], 4)
    with pytest.raises(MemoryError):
        cache.get((0, 1))
    assert np.isfinite(cache.get((0, 1))["cores.m0"]).all()
    assert len(calls) == 2
