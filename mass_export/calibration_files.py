"""`mass calibrate`: which images, from where, and what came of it in a sentence."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mass_export.artifact import Artifact
from mass_export.calibration_pool import calibrate_pool
from mass_export.calibration_task_images import calibrate_task_images
from mass_export.errors import DataError
from mass_export.image_pool import load_pool
from mass_export.progress import Progress
from mass_export.synthetic_images import synthetic_images


def calibrate_from_files(
    artifact: Artifact,
    *,
    pool: Path | None = None,
    task_images: Sequence[str] = (),
    synthetic: bool = False,
    limit: int | None = None,
    hear_heads: bool = True,
    stop_early: bool = True,
    progress: Progress,
) -> tuple[Artifact, str]:
    """Calibrate by exactly one of the three kinds of images.

    Args:
        artifact: to calibrate.
        pool: folder or array file of unlabelled images.
        task_images: `task=folder` pairs.
        synthetic: make images from noise.
        limit: images per folder, at most.
        hear_heads: see `calibrate_pool`.
        stop_early: see `calibrate_task_images`.
        progress: where to show it.

    Returns:
        the calibrated artifact, and a sentence about it.

    Raises:
        DataError: none or several kinds were given, or the images do not fit.
    """
    if (pool is not None) + bool(task_images) + synthetic != 1:
        raise DataError("calibration: give exactly one of --pool, --task-images and --synthetic.")
    spec = artifact.info.preprocess
    if synthetic:
        images = synthetic_images(artifact)
        calibrated = calibrate_pool(artifact, images, synthetic=True, progress=progress)
        return calibrated, f"residuals scaled on {len(images)} synthetic images"
    if pool is not None:
        images = load_pool(pool, spec, limit)
        calibrated = calibrate_pool(
            artifact, images, hear_heads=hear_heads, source=str(pool), progress=progress
        )
        heard = calibrated.info.router.evidence and not artifact.info.router.evidence
        heads = "; what the heads say agrees with the residuals and is used" if heard else ""
        return calibrated, f"router calibrated on {len(images)} images{heads}"
    folders = dict(_pair(text) for text in task_images)
    if len(folders) < len(task_images):
        raise DataError(f"--task-images: a task is given twice in {', '.join(task_images)}.")
    by_task = {name: load_pool(folder, spec, limit) for name, folder in folders.items()}
    sources = {name: str(folder) for name, folder in folders.items()}
    calibrated, trials = calibrate_task_images(
        artifact, by_task, stop_early=stop_early, sources=sources, progress=progress
    )
    info = calibrated.info.calibration
    assert info is not None
    tap = info.discriminant[-1]
    accuracy = next(trial.accuracy for trial in trials if trial.tap == tap)
    total = sum(info.images.values())
    stops = (
        f"; images that are sure stop before block {' or '.join(map(str, info.stops))}" if info.stops else ""
    )
    return calibrated, (
        f"discriminant on the {tap.site} inputs up to block {tap.layer} from {total} images, "
        f"{accuracy:.1%} routed right in cross-validation{stops}"
    )


def _pair(text: str) -> tuple[str, Path]:
    name, separator, folder = text.partition("=")
    if not separator or not name or not folder:
        raise DataError(f"--task-images: expected TASK=FOLDER, got {text!r}.")
    return name, Path(folder)
