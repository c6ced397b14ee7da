"""What the routes ask: from images to predictions within the deadline, whatever runs the batches."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.errors import BackendError, InputError, MassRuntimeError
from runtime.prediction import Prediction
from runtime.serving.engine import Engine, Work
from runtime.serving.metrics import Metrics
from runtime.serving.problems import RequestProblem
from runtime.serving.settings import Limits

RunWork = Callable[[Work], Awaitable[list[Prediction]]]
DECODERS = 2


class Service:
    """The model behind the routes of one replica.

    Attributes:
        name: of the model.
        engine: classifier and bundle.
        metrics: figures of this replica.
        limits: of requests.
    """

    def __init__(
        self, name: str, engine: Engine, metrics: Metrics, limits: Limits, run: RunWork, batch_size: int
    ) -> None:
        """Tie them together.

        Args:
            name: of the model.
            engine: classifier and bundle.
            metrics: to write to.
            limits: of requests.
            run: classifies work of at most `batch_size` images, in a batch with others'.
            batch_size: see there.
        """
        self.name, self.engine, self.metrics, self.limits = name, engine, metrics, limits
        self._run = run
        self._batch_size = batch_size
        self._decoders = ThreadPoolExecutor(DECODERS, "decode")

    async def classify(
        self, images: Sequence[tuple[str, bytes]], tasks: Sequence[str], top_k: int
    ) -> list[Prediction]:
        """Classify encoded images, given as (name, content).

        Raises:
            RequestProblem: 422 an image cannot be read or a task is unknown, 500 the model failed, 504 too late.
        """

        async def work() -> Work:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(
                self._decoders, self.engine.work, images, tasks, top_k, self.limits.max_pixels
            )

        return await self._answer(work)

    async def classify_pixels(
        self, pixel_values: NDArray[Any], tasks: Sequence[str], top_k: int
    ) -> list[Prediction]:
        """Classify preprocessed images, of the dtype that the bundle takes [n, ..]; see `classify`."""

        async def work() -> Work:
            wanted = self.engine.classifier.manifest.preprocess.input_shape
            if pixel_values.ndim != 4 or pixel_values.shape[1:] != wanted or not len(pixel_values):
                raise InputError(
                    f"pixel_values: expected shape {['N', *wanted]}, got {list(pixel_values.shape)}."
                )
            if not np.isfinite(pixel_values).all():
                raise InputError("pixel_values: NaN or infinity.")
            return Work(pixel_values, self.engine.known_tasks(tasks), top_k)

        return await self._answer(work)

    async def _answer(self, make: Callable[[], Awaitable[Work]]) -> list[Prediction]:
        try:
            async with asyncio.timeout(self.limits.deadline):
                work = await make()
                parts = await asyncio.gather(*(self._run(part) for part in work.parts(self._batch_size)))
        except TimeoutError as error:
            raise RequestProblem(504, f"no answer within {self.limits.deadline:g} s; try again.") from error
        except InputError as error:
            raise RequestProblem(422, str(error)) from error
        except BackendError as error:
            raise RequestProblem(500, str(error)) from error
        found = [prediction for part in parts for prediction in part]
        self.metrics.predictions(work.tasks, found)
        return found

    def close(self) -> None:
        """End the threads and release the model."""
        self._decoders.shutdown(wait=False, cancel_futures=True)
        self.engine.close()


def run_isolated(engine: Engine, batch: Sequence[Work]) -> list[list[Prediction] | MassRuntimeError]:
    """Classify a batch; if it fails, each work alone, so that a fault stays with its own request."""
    try:
        return list(engine.run(batch))
    except MassRuntimeError as error:
        if len(batch) == 1:
            return [error]
    return [found for work in batch for found in run_isolated(engine, [work])]


def answer_from_prediction(name: str, found: Prediction) -> dict[str, Any]:
    """One element of the JSON list that `python -m runtime --json` prints."""
    return {"image": name, **found.to_dict()}
