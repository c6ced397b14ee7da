"""Which tensors an artifact's header calls for, and do they fit?"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mass_export.errors import ArtifactError, shortened
from mass_export.router_spec import CalibrationInfo
from mass_export.spec import ArtifactInfo

NOTHING = ("nothing", "stop_nothing")  # older artifacts have none
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_ANY_RANK = -1


def _expected_shapes(info: ArtifactInfo) -> dict[str, tuple[int, ...]]:
    """Every tensor that may be there; a rank is _ANY_RANK."""
    vision = info.vision
    shapes, matrices = vision.parameter_shapes(), set(vision.matrix_names())
    expected = {f"base.{name}": shape for name, shape in shapes.items()}
    if info.merge.base_merge != "zeroshot":
        expected |= {f"merged.{name}": shape for name, shape in shapes.items()}
    for task in info.tasks:
        for name, shape in shapes.items():
            stem = f"tasks.{task.name}.{name}"
            if name in matrices:
                expected[f"{stem}.u"] = (shape[0], _ANY_RANK)
                expected[f"{stem}.s"] = (_ANY_RANK,)
                expected[f"{stem}.vh"] = (_ANY_RANK, shape[1])
            else:
                expected[f"{stem}.delta"] = shape
        for tap in info.taps():
            expected[f"router.{task.name}.{tap.parameter}.vh"] = (_ANY_RANK, vision.width)
        expected[f"heads.{task.name}.weight"] = (len(task.classes), vision.embed_dim)
        expected[f"heads.{task.name}.bias"] = (len(task.classes),)
    if info.calibration is not None:
        table = (len(info.taps()), len(info.tasks))
        expected |= {"calibration.offset": table, "calibration.scale": table}
        if info.calibration.discriminant:
            read = len(info.calibration.discriminant) * vision.width
            expected["calibration.weight"] = (len(info.tasks), read)
            expected["calibration.bias"] = (len(info.tasks),)
        if info.calibration.unknown is not None:
            expected["calibration.whiten"] = (vision.width, vision.width)
            expected["calibration.centres"] = (_ANY_RANK, vision.width)
            expected["calibration.nothing"] = (_ANY_RANK, vision.width)
        expected |= _stop_shapes(info.calibration, expected)
    return expected


def _stop_shapes(
    info: CalibrationInfo, expected: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """Tensors of the early stops: those of the last, for each of them."""
    known = ("whiten", "centres", "nothing") if info.unknown is not None else ()
    names = ("weight", "bias", *known) if info.stops else ()
    return {f"calibration.stop_{name}": (len(info.stops), *expected[f"calibration.{name}"]) for name in names}


def check_layout(tensors: Mapping[str, Tensor], info: ArtifactInfo, where: str) -> None:
    """Compare names, shapes, ranks and dtypes with the header; every problem is named at once.

    Raises:
        ArtifactError: something does not fit.
    """
    expected = _expected_shapes(info)
    optional = {f"heads.{task.name}.bias" for task in info.tasks}
    optional |= {f"calibration.{name}" for name in NOTHING}
    problems = [f"{name} is missing" for name in sorted(set(expected) - set(tensors) - optional)]
    problems += [f"{name} is unexpected" for name in sorted(set(tensors) - set(expected))]
    for name, tensor in tensors.items():
        got, shape = tuple(tensor.shape), expected.get(name, tuple(tensor.shape))
        if len(got) != len(shape) or any(a not in (b, _ANY_RANK) for a, b in zip(shape, got, strict=True)):
            problems.append(f"{name}: expected shape {_shape_text(shape)}, got {list(got)}")
        if tensor.dtype not in DTYPES:
            problems.append(f"{name}: expected float32, float16 or bfloat16, got {tensor.dtype}")
    if not problems:
        problems = _rank_problems(tensors)
    if problems:
        raise ArtifactError(
            f"{where}: the tensors do not fit the header: {shortened(problems, separator='; ')}. "
            "Copy or merge the artifact again."
        )


def _rank_problems(tensors: Mapping[str, Tensor]) -> list[str]:
    problems = []
    for name in tensors:
        if name.startswith("tasks.") and name.endswith(".s"):
            stem = name.removesuffix(".s")
            u, s, vh = (tensors[f"{stem}.{part}"] for part in ("u", "s", "vh"))
            if not u.shape[1] == s.shape[0] == vh.shape[0]:
                problems.append(
                    f"{stem}: u, s and vh have the ranks {u.shape[1]}, {s.shape[0]} and {vh.shape[0]}"
                )
    return problems


def check_values(tensors: Mapping[str, Tensor], where: str) -> None:
    """Refuse NaN and infinity.

    Raises:
        ArtifactError: naming the tensors.
    """
    bad = sorted(name for name, tensor in tensors.items() if not tensor.isfinite().all())
    if bad:
        raise ArtifactError(
            f"{where}: NaN or infinite values in {shortened(bad)}. Merge again from sound checkpoints."
        )


def _shape_text(shape: tuple[int, ...]) -> str:
    return f"[{', '.join('R' if size == _ANY_RANK else str(size) for size in shape)}]"
