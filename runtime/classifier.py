"""The classifier: images in, tasks and labels out."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from runtime.backends import open_sessions
from runtime.bundle import GateMode, HeadChoice, Verify
from runtime.cores import CoreCache
from runtime.device_array import DeviceArray, is_foreign_device_array
from runtime.errors import BackendError, InputError
from runtime.integrity import check_bundle, extra_files, hashed_meanwhile, require_unchanged
from runtime.manifest import read_manifest
from runtime.one_task import OneTaskPass
from runtime.options import allowed_tasks, overridden, require_choice, require_count, require_pixel_values
from runtime.prediction import ForwardResult, Prediction, joined, predictions_from_result
from runtime.preprocess import ImageSource, pixel_values_from_images
from runtime.provider import Provider
from runtime.routing import Selection, answer, gates_from_residuals, select_tasks
from runtime.second_pass import TaskSet, batches_of_parts, run_second_pass, spans
from runtime.verification import verify_routes

__all__ = ["Classifier", "ForwardResult", "Prediction"]

_LOG = logging.getLogger(__name__)


class Classifier:
    """One model for all tasks of a bundle. Thread-safe; a context manager. A forked process must make its own.

    Example:
        >>> with Classifier("engines/", provider="cpu") as classifier:
        ...     (prediction,) = classifier.predict(["cat.jpg"])
        ...     given = classifier.predict(["cat.jpg"], tasks=[classifier.tasks[0]])
        >>> prediction.task in classifier.tasks and prediction.label in classifier.classes[prediction.task]
        True
        >>> given[0].task == classifier.tasks[0]
        True

    Attributes:
        provider: where it runs: `cpu`, `cuda` or `tensorrt`.
        tasks: names, in the order of every T axis.
        classes: labels of each task, in the order of its head's logits.
        router: settings in use.
        manifest: of the bundle.
    """

    def __init__(
        self,
        bundle_dir: str | os.PathLike[str],
        provider: Provider = "auto",
        *,
        num_threads: int | None = None,
        verify: Verify = "full",
        mode: GateMode | None = None,
        threshold: float | None = None,
        temperature: float | None = None,
        max_tasks: int | None = None,
        head_choice: HeadChoice | None = None,
        unknown_threshold: float | None = None,
        batch_size: int = 32,
        core_cache_sets: int = 64,
        share_base: bool = True,
        cuda_graphs: bool = False,
        build_engines: bool = True,
    ) -> None:
        """Load and check a bundle.

        Args:
            bundle_dir: directory that mass-export wrote.
            provider: `auto` takes TensorRT where it is installed and there is a GPU, then CUDA, then the CPU; any
                other is taken or is an error.
            num_threads: threads within an operator on the CPU, and of those that hash; None lets the backend choose.
            verify: compare `full` checksums, or only the `size` of each file.
            mode: of the gates, `topk`, `top1` or `weighted`; this and the next five replace the bundle's.
            threshold: a task is kept when its gate is greater, in [0, 1).
            temperature: divides the (standardised) residuals before the softmax, > 0.
            max_tasks: cap of `topk`, >= 1.
            head_choice: heads of a set compete by their `max` or `mean` logit.
            unknown_threshold: images whose `unknown` is greater are of no known task.
            batch_size: images that are in work at a time.
            core_cache_sets: distinct sets of tasks whose cores are kept, see `CoreCache`.
            share_base: on the CPU, where the first pass runs on the base: hold its weights once for both passes. Else
                the first pass is a graph of its own, a little faster and larger by its weights.
            cuda_graphs: TensorRT alone: record the kernels of each batch size and replay them.
            build_engines: TensorRT alone: where the bundle has no engines for this GPU, build them once and keep them
                below `MASS_CACHE` or `~/.cache`; that takes minutes.

        Raises:
            BundleError: the bundle is missing, damaged or of another version.
            BackendError: the provider is not available or refuses the graphs.
            InputError: a setting is out of range.
        """
        directory = Path(bundle_dir)
        for name, count in {"batch_size": batch_size, "core_cache_sets": core_cache_sets}.items():
            require_count(name, count)
        if num_threads is not None:
            require_count("num_threads", num_threads)
        require_choice("provider", provider, Provider)
        require_choice("verify", verify, Verify)
        self.manifest = read_manifest(directory)
        self.router = overridden(
            self.manifest.router,
            mode=mode,
            threshold=threshold,
            temperature=temperature,
            max_tasks=max_tasks,
            head_choice=head_choice,
            unknown_threshold=unknown_threshold,
        )
        if extra := extra_files(directory, self.manifest):
            _LOG.warning("%s: holds files that are not of the bundle: %s", directory, ", ".join(extra))
        self.tasks = tuple(task.name for task in self.manifest.tasks)
        self.classes = {task.name: task.classes for task in self.manifest.tasks}
        self._directory = directory
        self._one_task = None
        opened = dataclasses.replace(self.manifest, router=self.router)
        if opened.one_task is not None and not share_base:
            opened = dataclasses.replace(opened, one_task=dataclasses.replace(opened.one_task, routers=()))
        with hashed_meanwhile(directory, self.manifest, verify, num_threads):
            check_bundle(directory, self.manifest, "size")
            matrices = self.manifest.matrices if self.manifest.compose == "tsvm" else ()
            self._cores = CoreCache(directory, matrices, core_cache_sets)
            self._first, self._second = open_sessions(
                directory,
                opened,
                provider,
                num_threads,
                core_cache_sets=core_cache_sets,
                cuda_graphs=cuda_graphs,
                build_engines=build_engines,
                max_batch=batch_size,
            )
            if opened.one_task is not None and self._second.provider == "cpu":
                self._one_task = OneTaskPass(directory, opened, num_threads)
        limits = (session.max_batch for session in (self._first, self._second))
        self._batch_size = min([batch_size, *(limit for limit in limits if limit is not None)])
        self.provider = self._second.provider
        self._closed = False
        self._process = os.getpid()
        require_unchanged(directory, self.manifest)

    def __repr__(self) -> str:
        return f"Classifier({str(self._directory)!r}, provider={self.provider!r}, tasks={list(self.tasks)})"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the graphs. Later calls raise; those under way in other threads may still finish."""
        self._closed = True
        self._first.close()
        self._second.close()
        if self._one_task is not None:
            self._one_task.close()

    def predict(
        self, images: Iterable[ImageSource], tasks: Iterable[str] | None = None, top_k: int = 5
    ) -> list[Prediction]:
        """Classify images, `batch_size` at a time.

        Args:
            images: any iterable of paths, Pillow images, or uint8 arrays [H, W], [H, W, 3] or [H, W, 4].
            tasks: names of the tasks that may answer, None for all. With one there is no first pass.
            top_k: alternatives for each image, at most.

        Returns:
            One prediction for each image, in order; none for no images.

        Raises:
            InputError: an image cannot be read (it is named), or a task or `top_k` is unknown or unfit.
            BackendError: the backend failed, or the classifier is closed.
        """
        return list(self.predict_iter(images, tasks, top_k))

    def predict_iter(
        self, images: Iterable[ImageSource], tasks: Iterable[str] | None = None, top_k: int = 5
    ) -> Iterator[Prediction]:
        """Like `predict`, but lazy: one batch is decoded while the one before it is classified."""
        self._require_open()
        single = isinstance(images, str | os.PathLike) or (isinstance(images, np.ndarray) and images.ndim < 4)
        if single or not isinstance(images, Iterable):
            raise InputError(
                f"images: expected several, got one {type(images).__name__}; put it into a list."
            )
        require_count("top_k", top_k)
        return self._predictions(iter(images), allowed_tasks(tasks, self.tasks), top_k)

    def _predictions(
        self, images: Iterator[ImageSource], allowed: TaskSet | None, top_k: int
    ) -> Iterator[Prediction]:
        with ThreadPoolExecutor(1, "mass-decode") as pool:
            coming, done = self._decoded(pool, images, 0)
            while coming is not None:
                pixel_values = coming.result()
                coming, done = self._decoded(pool, images, done)
                (result,) = self._forward(pixel_values, [(len(pixel_values), allowed)])
                yield from predictions_from_result(
                    result, self.manifest.tasks, top_k, allowed=allowed, router=self.router
                )

    def _decoded(
        self, pool: ThreadPoolExecutor, images: Iterator[ImageSource], done: int
    ) -> tuple[Future[NDArray[Any]] | None, int]:
        """The next batch in the making, None at the end, and how many images have been taken then."""
        try:
            batch = list(islice(images, self._batch_size))
        except Exception as error:  # noqa: BLE001 - the caller's own; due when the batch before has been answered
            failed: Future[NDArray[Any]] = Future()
            failed.set_exception(error)
            return failed, done
        if not batch:
            return None, done
        coming = pool.submit(pixel_values_from_images, batch, self.manifest.preprocess, first_index=done)
        return coming, done + len(batch)

    def forward(self, pixel_values: Any, tasks: Iterable[str] | None = None) -> ForwardResult:
        """Run the model on preprocessed images; a sample's result does not depend on its batch.

        Args:
            pixel_values: normalised RGB, finite; a numpy array, or with TensorRT also a contiguous array of another
                library on the GPU (`__cuda_array_interface__`, DLPack), which is used where it is and not searched
                for NaN. [B, 3, H, W] float32; of a bundle that takes bytes [B, H, W, 3] uint8, 0..255 RGB
            tasks: names of the tasks that may answer, None for all. With one there is no first pass.

        Raises:
            InputError: another type, shape or dtype, an empty batch, NaN or infinity, or an unknown task.
            BackendError: the backend failed, or the classifier is closed.
        """
        images = self._checked(pixel_values)
        return self._forward_parts(images, [(len(images), tasks)])[0]

    def forward_parts(
        self, pixel_values: Any, parts: Sequence[tuple[int, Iterable[str] | None]]
    ) -> list[ForwardResult]:
        """Like `forward` for images that ask for different tasks: they share both passes.

        Args:
            pixel_values: see `forward`. [B, 3, H, W] float32
            parts: of the batch, in order: how many images, and the tasks that may answer those.

        Returns:
            one result for each part

        Raises:
            InputError: see `forward`; or the parts do not make up the batch.
            BackendError: see `forward`.
        """
        return self._forward_parts(self._checked(pixel_values), parts)

    def _checked(self, pixel_values: Any) -> Any:
        self._require_open()
        if is_foreign_device_array(pixel_values) and self.provider == "tensorrt":
            pixel_values = self._first.stage(pixel_values)
        require_pixel_values(pixel_values, self.manifest.preprocess)
        return pixel_values

    def _forward_parts(
        self, pixel_values: Any, parts: Sequence[tuple[int, Iterable[str] | None]]
    ) -> list[ForwardResult]:
        counts = [count for count, _ in parts]
        if sum(counts) != len(pixel_values) or min(counts) < 1:
            raise InputError(f"parts: {counts} images do not make up a batch of {len(pixel_values)}.")
        allowed = [allowed_tasks(tasks, self.tasks) for _, tasks in parts]
        found: list[list[ForwardResult]] = [[] for _ in parts]
        for rows, members in batches_of_parts(counts, self._batch_size):
            results = self._forward(pixel_values[rows], [(count, allowed[part]) for part, count in members])
            for (part, _), result in zip(members, results, strict=True):
                found[part].append(result)
        return [results[0] if len(results) == 1 else joined(results) for results in found]

    def _forward(self, images: Any, parts: Sequence[tuple[int, TaskSet | None]]) -> list[ForwardResult]:
        self._require_open()
        pixel_values = self._first.stage(_contiguous(images))
        rows = [slice(start, start + count) for start, count in spans([count for count, _ in parts])]
        scores = self._scores(pixel_values, rows, [allowed for _, allowed in parts])
        gates, selections = [], []
        for (count, allowed), found in zip(parts, scores, strict=True):
            weights, selection = self._selected(count, allowed, found.get("residuals"))
            gates.append(weights)
            selections.append(selection)
        sets = [tasks for selection in selections for tasks in selection.sets()]
        logits = self._second_pass(pixel_values, sets, np.concatenate(gates))
        return [
            self._answered(pixel_values, rows[i], logits, gates[i], selections[i], allowed, scores[i])
            for i, (_, allowed) in enumerate(parts)
        ]

    def _scores(
        self, pixel_values: Any, rows: Sequence[slice], allowed: Sequence[TaskSet | None]
    ) -> list[dict[str, NDArray[np.float32]]]:
        """What the first pass says of each part; nothing where one task is given."""
        asked = [tasks is None or len(tasks) > 1 for tasks in allowed]
        if not any(asked):
            return [{} for _ in rows]
        if not all(asked):
            kept = [range(part.start, part.stop) for part, ask in zip(rows, asked, strict=True) if ask]
            pixel_values = pixel_values[[row for part in kept for row in part]]
        given = self._first_pass(pixel_values)
        found = {name: given[name].astype(np.float32) for name in ("residuals", "unknown") if name in given}
        for name, values in found.items():
            _require_finite(name, values)
        counts = [part.stop - part.start if ask else 0 for part, ask in zip(rows, asked, strict=True)]
        return [
            {name: values[start : start + count] for name, values in found.items()} if count else {}
            for start, count in spans(counts)
        ]

    def _selected(
        self, count: int, allowed: TaskSet | None, residuals: NDArray[np.float32] | None
    ) -> tuple[NDArray[np.float32], Selection]:
        router, tasks = self.router, len(self.tasks)
        if residuals is not None:
            gates = gates_from_residuals(residuals, router.mode, router.temperature, allowed)
            return gates, select_tasks(gates, router.mode, router.threshold, router.max_tasks)
        assert allowed is not None
        gates = np.zeros((count, tasks), np.float32)
        gates[:, allowed] = 1
        order = [*allowed, *(i for i in range(tasks) if i not in allowed)]
        return gates, Selection(gates > 0, np.broadcast_to(order, gates.shape))

    def _answered(
        self,
        pixel_values: Any,
        rows: slice,
        logits: NDArray[np.float32],
        gates: NDArray[np.float32],
        selection: Selection,
        allowed: TaskSet | None,
        scores: dict[str, NDArray[np.float32]],
    ) -> ForwardResult:
        """The result of one part: unsure routes verified, heads compared."""
        logits, residuals = logits[rows], scores.get("residuals")
        verified = np.zeros(len(logits), np.bool_)
        if residuals is not None:
            selection, verified = verify_routes(
                selection,
                logits,
                residuals,
                allowed=allowed,
                settings=self.router,
                tasks=self.manifest.tasks,
                run=lambda some, sets: self._second_pass(pixel_values[some + rows.start], sets, gates[some]),
            )
        task_index, class_index = answer(logits, self.manifest.tasks, selection, self.router.head_choice)
        return ForwardResult(
            residuals,
            gates,
            selection.selected,
            logits,
            task_index,
            class_index,
            verified,
            scores.get("unknown"),
        )

    def _first_pass(self, pixel_values: Any) -> dict[str, NDArray[Any]]:
        if self._one_task is not None and self._one_task.routes:
            return self._one_task.first_pass(pixel_values)
        return self._first.run({self.manifest.preprocess.input_name: pixel_values})

    def _second_pass(
        self, pixel_values: Any, sets: Sequence[TaskSet], gates: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        logits = run_second_pass(
            self._second,
            self.manifest,
            self._cores,
            pixel_values=pixel_values,
            sets=sets,
            gates=gates,
            one_task=self._one_task,
        )
        _require_finite("logits", logits)
        return logits

    def _require_open(self) -> None:
        if os.getpid() != self._process:
            raise BackendError(
                "the classifier was made before this process was forked, and its threads are not here; make a new one "
                "in this process."
            )
        if self._closed:
            raise BackendError("the classifier is closed; make a new one.")


def _contiguous(images: Any) -> Any:
    return images if isinstance(images, DeviceArray) else np.ascontiguousarray(images)


def _require_finite(name: str, values: NDArray[np.float32]) -> None:
    if not np.isfinite(values).all():
        raise BackendError(f"the model gave NaN or infinity in its {name}; run it in a wider precision.")
