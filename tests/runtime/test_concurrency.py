"""One classifier in many threads, closed while in use, and in a forked process."""

from __future__ import annotations

import itertools
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from runtime import BackendError, Classifier
from runtime.classifier import ForwardResult

fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
forks = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")


def same(a: ForwardResult, b: ForwardResult) -> bool:
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in vars(a))


@pytest.mark.parametrize("compose", ["tsvm", "sum"])
def test_sixteen_threads_with_mixed_tasks_sets_and_batches_get_the_answers_of_one(
    toy_bundle, toy, compose
) -> None:
    bundle = toy_bundle(compose)
    with Classifier(bundle, "cpu", num_threads=2, core_cache_sets=2, threshold=0.05) as classifier:
        names = classifier.tasks
        choices = [None, *([name] for name in names), *map(list, itertools.combinations(names, 2))]
        jobs = [(toy.pixel_values(1 + n % 5, seed=n), choices[n % len(choices)]) for n in range(66)]
        alone = [classifier.forward(pixel_values, tasks) for pixel_values, tasks in jobs]
        start = threading.Barrier(16)

        def work(thread: int) -> list[bool]:
            start.wait()
            order = np.random.default_rng(thread).permutation(len(jobs))
            return [same(classifier.forward(*jobs[i]), alone[i]) for i in order]

        with ThreadPoolExecutor(16) as pool:
            outcomes = list(itertools.chain.from_iterable(pool.map(work, range(16))))
    assert len(outcomes) == 16 * 66
    assert all(outcomes)


def test_closed_while_threads_use_it_each_call_answers_or_says_so(toy_bundle, toy) -> None:
    pixel_values = toy.pixel_values(2)
    for _ in range(10):
        classifier = Classifier(toy_bundle(), "cpu", num_threads=1)
        expected = classifier.forward(pixel_values)
        started, problems = threading.Barrier(5), []

        def use(classifier=classifier, expected=expected, started=started, problems=problems) -> None:
            started.wait()
            for _ in range(200):
                try:
                    if not same(classifier.forward(pixel_values), expected):
                        problems.append("another answer")
                except BackendError as error:
                    if "closed" not in str(error):
                        problems.append(str(error))
                    return

        threads = [threading.Thread(target=use) for _ in range(4)]
        for thread in threads:
            thread.start()
        started.wait()
        classifier.close()
        classifier.close()
        for thread in threads:
            thread.join(timeout=30)
        assert not any(thread.is_alive() for thread in threads)
        assert problems == []


def in_child(work) -> str:
    """What `work` returns in a forked process, which is killed if it takes ten seconds."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        signal.alarm(10)
        try:
            said = str(work())
        except BaseException as error:  # noqa: BLE001 - the parent wants to know
            said = f"{type(error).__name__}: {error}"
        os.write(writing, said.encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    assert os.waitpid(pid, 0)[1] == 0, "the forked process hung"
    return said


@fork
@forks
@pytest.mark.parametrize("num_threads", [1, 2])
def test_a_forked_process_is_told_to_make_its_own_and_does_not_hang(toy_bundle, toy, num_threads) -> None:
    classifier = Classifier(toy_bundle(), "cpu", num_threads=num_threads)
    pixel_values = toy.pixel_values(3)
    before = classifier.forward(pixel_values)
    assert "BackendError: the classifier was made before this process was forked" in in_child(
        lambda: classifier.forward(pixel_values)
    )
    assert in_child(classifier.close) == "None"

    def own() -> bool:
        with Classifier(toy_bundle(), "cpu", num_threads=1) as mine:
            return same(mine.forward(pixel_values), before)

    assert in_child(own) == "True"
    assert same(classifier.forward(pixel_values), before)
    classifier.close()
