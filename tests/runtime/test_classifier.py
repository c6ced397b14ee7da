"""The classifier on a toy bundle: the numbers, the sets, and what it refuses."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from runtime import BackendError, Classifier, InputError, Prediction
from runtime.classifier import ForwardResult
from runtime.routing import answer, gates_from_residuals, select_tasks
from runtime.second_pass import Run, plan_second_pass


@pytest.fixture(scope="module")
def classifier(toy_bundle):
    with Classifier(toy_bundle(), provider="cpu", num_threads=1) as classifier:
        yield classifier


def assert_equal_results(actual, expected):
    for name in vars(expected):
        ours, theirs = getattr(actual, name), getattr(expected, name)
        if ours is None or ours.dtype.kind != "f":
            assert np.array_equal(ours, theirs), name
        else:
            assert np.allclose(ours, theirs, atol=1e-5), name


def row_of(result, rows):
    return ForwardResult(*(None if part is None else part[rows] for part in vars(result).values()))


def test_forward_routes_merges_and_answers_as_the_dense_model_does(classifier, toy):
    pixel_values = toy.pixel_values(48)
    result = classifier.forward(pixel_values)
    residuals = toy.residuals(pixel_values)
    selection = select_tasks(gates_from_residuals(residuals, "topk", 1.0), "topk", 0.2, 3)
    assert {len(tasks) for tasks in selection.sets()} == {1, 2, 3}
    assert np.allclose(result.residuals, residuals, rtol=1e-5)
    assert np.allclose(result.gates, gates_from_residuals(residuals, "topk", 1.0), atol=1e-4)
    assert np.array_equal(result.selected, selection.selected)
    assert np.allclose(result.logits, toy.logits(pixel_values, selection.sets()), atol=1e-4)
    task_index, class_index = answer(result.logits, classifier.manifest.tasks, selection, "max")
    assert np.array_equal(result.task_index, task_index)
    assert np.array_equal(result.class_index, class_index)
    dtypes = [part.dtype for part in vars(result).values() if part is not None]
    assert dtypes == [np.float32, np.float32, np.bool_, np.float32, np.int64, np.int64, np.bool_]


def test_a_batch_equals_its_images_one_by_one_in_any_order(classifier, toy):
    pixel_values = toy.pixel_values(12)
    result = classifier.forward(pixel_values)
    order = np.random.default_rng(1).permutation(12)
    assert_equal_results(classifier.forward(pixel_values[order]), row_of(result, order))
    for row in range(12):
        assert_equal_results(
            classifier.forward(pixel_values[row : row + 1]), row_of(result, slice(row, row + 1))
        )


def test_a_large_batch_is_run_in_parts(toy_bundle, toy, classifier):
    pixel_values = toy.pixel_values(11)
    with Classifier(toy_bundle(), provider="cpu", batch_size=4) as small:
        assert_equal_results(small.forward(pixel_values), classifier.forward(pixel_values))
        known = small.forward(pixel_values, tasks=["birds"])
    assert known.residuals is None
    assert known.logits.shape == (11, 8)


def test_a_view_that_is_not_contiguous_gives_the_same(classifier, toy):
    pixel_values = toy.pixel_values(4)
    flipped = np.ascontiguousarray(pixel_values[:, :, :, ::-1])[:, :, :, ::-1]
    assert_equal_results(classifier.forward(flipped), classifier.forward(pixel_values))


def test_a_known_task_skips_the_first_pass(classifier, toy, monkeypatch):
    monkeypatch.setattr(classifier._first, "run", lambda _feeds: pytest.fail("first pass ran"))
    pixel_values = toy.pixel_values(5)
    result = classifier.forward(pixel_values, tasks=["birds"])
    assert result.residuals is None
    assert result.gates.tolist() == [[0, 1, 0, 0]] * 5
    assert result.selected.tolist() == [[False, True, False, False]] * 5
    assert np.allclose(result.logits, toy.logits(pixel_values, [(1,)] * 5), atol=1e-5)
    assert (result.task_index == 1).all()
    assert np.array_equal(result.class_index, result.logits[:, 2:5].argmax(axis=1))


def test_of_several_given_tasks_only_these_compete(classifier, toy):
    pixel_values = toy.pixel_values(20)
    result = classifier.forward(pixel_values, tasks=["flowers", "cars"])
    assert set(result.task_index) == {0, 3}
    assert not result.selected[:, 1:3].any()
    assert np.allclose(
        result.gates, gates_from_residuals(toy.residuals(pixel_values), "topk", 1.0, [0, 3]), atol=1e-4
    )


@pytest.mark.parametrize("batch_size", [32, 4])
@pytest.mark.parametrize("router", [{}, {"mode": "top1", "verify_margin": 5.0}])
def test_parts_that_ask_for_different_tasks_get_their_own_answers(toy_bundle, toy, batch_size, router):
    asked = [None, ["cars"], ["digits", "birds"], ["cars"], None, ["flowers"]]
    counts = [3, 1, 4, 2, 6, 1]
    pixel_values = toy.pixel_values(sum(counts))
    starts = np.cumsum([0, *counts])
    with Classifier(toy_bundle(**router), provider="cpu", num_threads=1, batch_size=batch_size) as own:
        found = own.forward_parts(pixel_values, list(zip(counts, asked, strict=True)))
        for start, count, tasks, result in zip(starts, counts, asked, found, strict=False):
            assert_equal_results(result, own.forward(pixel_values[start : start + count], tasks))
        assert any(result.verified.any() for result in found) == bool(router)


def test_parts_share_both_passes(classifier, toy, monkeypatch):
    rows = {}
    for name in ("_first", "_second"):
        session = getattr(classifier, name)

        def run(feeds, name=name, real=session.run):
            rows.setdefault(name, []).append(len(feeds["pixel_values"]))
            return real(feeds)

        monkeypatch.setattr(session, "run", run)
    parts = [(1, ["cars"]), (2, ["birds", "cars"]), (2, ["digits"]), (3, ["flowers", "digits"])]
    classifier.forward_parts(toy.pixel_values(8), parts)
    assert rows["_first"] == [5]  # three images have their task already
    assert sum(rows["_second"]) == 8
    assert len(rows["_second"]) <= 2  # one for each size of a set


@pytest.mark.parametrize("parts", [[], [(2, None)], [(4, None), (0, None)], [(4, None), (-1, None)]])
def test_parts_that_do_not_make_up_the_batch_are_refused(classifier, toy, parts):
    with pytest.raises(InputError, match="do not make up a batch of 3"):
        classifier.forward_parts(toy.pixel_values(3), parts)


def test_router_settings_can_be_overridden(toy_bundle, toy):
    pixel_values = toy.pixel_values(30)
    with Classifier(toy_bundle(), "cpu", mode="top1") as top1, Classifier(toy_bundle(), "cpu") as plain:
        assert top1.router.mode == "top1"
        assert plain.router.mode == "topk"
        result = top1.forward(pixel_values)
        assert (result.selected.sum(axis=1) == 1).all()
        assert np.array_equal(result.task_index, result.residuals.argmin(axis=1))
    settings = {
        "mode": "weighted",
        "threshold": 0.25,
        "temperature": 0.5,
        "head_choice": "mean",
        "max_tasks": 1,
    }
    with Classifier(toy_bundle(), "cpu", **settings) as classifier:
        result = classifier.forward(pixel_values)
        gates = gates_from_residuals(result.residuals, "weighted", 0.5)
        selection = select_tasks(gates, "weighted", 0.25, 1)
        assert np.array_equal(result.selected, selection.selected)
        assert selection.selected.sum(axis=1).max() > 1
        task_index, _ = answer(result.logits, classifier.manifest.tasks, selection, "mean")
        assert np.array_equal(result.task_index, task_index)


@pytest.mark.parametrize("sum_weights", ["uniform", "gates"])
def test_sums_weigh_the_set_uniformly_or_by_its_gates(toy_bundle, toy, sum_weights):
    pixel_values = toy.pixel_values(48)
    with Classifier(toy_bundle("sum", sum_weights=sum_weights), "cpu") as classifier:
        result = classifier.forward(pixel_values)
    sets = [tuple(np.flatnonzero(row)) for row in result.selected]
    weights = result.gates if sum_weights == "gates" else np.ones_like(result.gates)
    assert {len(tasks) for tasks in sets} == {1, 2, 3}
    assert np.allclose(result.logits, toy.logits(pixel_values, sets, weights), atol=1e-4)


def test_samples_of_one_set_share_a_run_and_other_sizes_have_their_own():
    assert plan_second_pass([(1, 2), (0,), (1, 2), (0,)]) == [
        Run((1, 3), ((0,),)),
        Run((0, 2), ((1, 2),)),
    ]
    assert plan_second_pass([(0,), (2,), (0, 1, 2)]) == [Run((0, 1), ((0,), (2,))), Run((2,), ((0, 1, 2),))]
    shared = [(0,), (0,), (1, 2), (1, 2)]
    assert plan_second_pass(shared, own_weights=True) == [Run((0, 1), ((0,),)), Run((2, 3), ((1, 2), (1, 2)))]


def images(count):
    rng = np.random.default_rng(3)
    return [rng.integers(0, 256, (9 + i, 14, 3), dtype=np.uint8) for i in range(count)]


def test_predictions_name_the_answer_and_its_alternatives(classifier):
    from runtime.preprocess import pixel_values_from_images

    given = images(5)
    result = classifier.forward(pixel_values_from_images(given, classifier.manifest.preprocess))
    predictions = classifier.predict(given, top_k=2)
    for row, prediction in enumerate(predictions):
        task = classifier.manifest.tasks[result.task_index[row]]
        assert prediction.task == task.name
        assert prediction.label == task.classes[result.class_index[row]]
        assert prediction.alternatives[0] == (prediction.task, prediction.label, prediction.score)
        assert len(prediction.alternatives) == min(2, len(task.classes))
        logits = result.logits[row, task.start : task.stop].astype(np.float64)
        assert prediction.score == pytest.approx(np.exp(logits.max()) / np.exp(logits).sum())
        scores = [score for _, _, score in prediction.alternatives]
        assert scores == sorted(scores, reverse=True)
        assert list(prediction.gates) == list(classifier.tasks)
        assert prediction.residuals["birds"] == pytest.approx(float(result.residuals[row, 1]))


def test_a_prediction_of_a_known_task_has_no_residuals(classifier):
    (prediction,) = classifier.predict(images(1), tasks=["digits"])
    assert prediction.task == "digits"
    assert prediction.residuals is None
    assert prediction.gates == {"cars": 0, "birds": 0, "digits": 1, "flowers": 0}


def test_a_prediction_becomes_plain_json(classifier, prediction_keys):
    (prediction,) = classifier.predict(images(1))
    data = json.loads(json.dumps(prediction.to_dict()))
    assert data["alternatives"][0] == {key: data[key] for key in ("task", "label", "score")}
    assert set(data) == prediction_keys


def test_predict_takes_any_iterable_and_batches_it_lazily(toy_bundle):
    taken = []

    def source():
        for number, image in enumerate(images(7)):
            taken.append(number)
            yield Image.fromarray(image) if number % 2 else image

    with Classifier(toy_bundle(), "cpu", batch_size=3) as classifier:
        lazily = classifier.predict_iter(source())
        first = next(lazily)
        assert taken == [0, 1, 2, 3, 4, 5]  # one batch is being decoded
        rest = list(lazily)
        assert len(taken) == 7
        assert [first, *rest] == classifier.predict(images(7))
        assert classifier.predict(np.stack([images(1)[0]] * 2)) == classifier.predict(images(1) * 2)
        assert classifier.predict([]) == []


def test_what_came_before_a_failing_source_is_answered(toy_bundle):
    def source():
        yield from images(4)
        raise RuntimeError("the disk is gone")

    with Classifier(toy_bundle(), "cpu", batch_size=2) as classifier:
        lazily = classifier.predict_iter(source())
        assert [next(lazily) for _ in range(4)] == classifier.predict(images(4))
        with pytest.raises(RuntimeError, match="disk is gone"):
            next(lazily)


def test_an_unreadable_image_is_named_by_its_place_in_the_whole_input(toy_bundle, tmp_path):
    (tmp_path / "note.jpg").write_text("no image")
    with (
        Classifier(toy_bundle(), "cpu", batch_size=2) as classifier,
        pytest.raises(InputError, match=r"image 3 \(.*note\.jpg\): not an image"),
    ):
        classifier.predict([*images(3), tmp_path / "note.jpg"])


def test_attributes_describe_the_bundle(classifier, toy_bundle):
    assert classifier.tasks == ("cars", "birds", "digits", "flowers")
    assert classifier.classes["birds"] == ("wren", "owl", "tit")
    assert classifier.provider == "cpu"
    assert repr(classifier).startswith(f"Classifier({str(toy_bundle())!r}, provider='cpu', tasks=['cars'")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda x: x.tolist(), "numpy array, got list"),
        (lambda x: x[0], r"shape \[B, 3, 8, 8\], got \[3, 8, 8\]"),
        (lambda x: x[:, :, :7], r"shape \[B, 3, 8, 8\], got \[2, 3, 7, 8\]"),
        (lambda x: x.transpose(0, 2, 3, 1), "shape"),
        (lambda x: x.astype(np.float64), "float32, got float64"),
        (lambda x: x[:0], "batch is empty"),
        (
            lambda x: np.where(np.arange(2)[:, None, None, None] == 1, np.float32("nan"), x),
            "NaN .* in image 1",
        ),
        (lambda x: x + np.float32("inf"), "infinity in image 0"),
    ],
)
def test_pixel_values_that_do_not_fit_are_refused(classifier, toy, change, match):
    with pytest.raises(InputError, match=match):
        classifier.forward(change(toy.pixel_values(2)))


@pytest.mark.parametrize(
    ("tasks", "match"),
    [
        (["cars", "boats"], r"unknown 'boats'; this bundle has cars, birds, digits, flowers"),
        ([], "none given"),
        ("cars", r"write \['cars'\]"),
        (["cars", "cars"], "repeat"),
    ],
)
def test_task_names_that_do_not_fit_are_refused(classifier, toy, tasks, match):
    with pytest.raises(InputError, match=match):
        classifier.forward(toy.pixel_values(1), tasks=tasks)
    with pytest.raises(InputError, match=match):
        classifier.predict_iter(images(1), tasks=tasks)


@pytest.mark.parametrize(
    "single", ["a.png", Path("a.png"), np.zeros((4, 4, 3), np.uint8), Image.new("L", (3, 3)), 5]
)
def test_one_image_instead_of_several_is_refused(classifier, single):
    with pytest.raises(InputError, match="put it into a list"):
        classifier.predict(single)


@pytest.mark.parametrize("top_k", [0, -1, 1.5, True])
def test_top_k_must_be_a_positive_integer(classifier, top_k):
    with pytest.raises(InputError, match="top_k"):
        classifier.predict(images(1), top_k=top_k)


@pytest.mark.parametrize(
    "settings",
    [
        {"mode": "best"}, {"threshold": 1.0}, {"threshold": -0.1}, {"threshold": "high"}, {"temperature": 0},
        {"temperature": float("nan")}, {"max_tasks": 0}, {"max_tasks": 2.0}, {"head_choice": "min"},
        {"verify": "no"}, {"batch_size": 0}, {"core_cache_sets": 0}, {"num_threads": 0}, {"provider": "gpu"},
    ],
)  # fmt: skip
def test_a_setting_out_of_range_is_named(toy_bundle, settings):
    with pytest.raises(InputError, match=next(iter(settings))):
        Classifier(toy_bundle(), **settings)


def test_a_closed_classifier_says_so(toy_bundle, toy):
    classifier = Classifier(toy_bundle(), "cpu")
    lazily = classifier.predict_iter(images(2))
    classifier.close()
    classifier.close()
    for use in (
        lambda: classifier.forward(toy.pixel_values(1)),
        lambda: classifier.predict(images(1)),
        lambda: next(lazily),
    ):
        with pytest.raises(BackendError, match="closed"):
            use()


def test_threads_get_the_answers_of_one_thread(toy_bundle, toy):
    with Classifier(toy_bundle(), "cpu", num_threads=1, core_cache_sets=2) as classifier:
        batches = [toy.pixel_values(6, seed) for seed in range(16)]
        choices = [None, ["birds"], ["cars", "digits"], None] * 4
        expected = [classifier.forward(batch, tasks) for batch, tasks in zip(batches, choices, strict=True)]
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(classifier.forward, batches, choices))
    for actual, wanted in zip(found, expected, strict=True):
        assert_equal_results(actual, wanted)


def test_nan_from_the_graph_is_a_backend_error(toy_bundle, toy, monkeypatch):
    with Classifier(toy_bundle(), "cpu") as classifier:
        residuals = np.full((1, 4), np.nan, np.float32)
        monkeypatch.setattr(classifier._first, "run", lambda _feeds: {"residuals": residuals})
        with pytest.raises(BackendError, match="residuals"):
            classifier.forward(toy.pixel_values(1))


def test_predictions_compare_by_value(classifier):
    assert isinstance(classifier.predict(images(1))[0], Prediction)
    assert classifier.predict(images(2)) == classifier.predict(images(2))
