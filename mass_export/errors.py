"""The exceptions of the builder: one base, leaves by what is wrong."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class MassExportError(Exception):
    """Base of every error that this package raises on purpose."""


class RecipeError(MassExportError, ValueError):
    """The recipe (or another setting) is invalid."""


class ModelConfigError(MassExportError, ValueError):
    """The model configuration is unknown, malformed or not a supported ViT."""


class CheckpointError(MassExportError):
    """A checkpoint cannot be read or does not belong to the model."""


class CheckpointFormatError(CheckpointError, ValueError):
    """The file is not in a format that is read, or is damaged."""


class CheckpointKeyError(CheckpointError, KeyError):
    """Tensors are missing or unexpected; all of them are named at once."""

    def __init__(self, where: str, missing: Iterable[str], unexpected: Iterable[str]) -> None:
        missing, unexpected = sorted(missing), sorted(unexpected)
        kinds = {"missing": missing, "unexpected": unexpected}
        parts = [f"{len(names)} {kind} ({shortened(names)})" for kind, names in kinds.items() if names]
        super().__init__(
            f"{where}: the tensors do not fit the model config: {'; '.join(parts)}. "
            "Check that the checkpoint and the model config are of the same architecture."
        )

    def __str__(self) -> str:
        """KeyError would show the repr."""
        return str(self.args[0])


class CheckpointShapeError(CheckpointError, ValueError):
    """A tensor has another shape than the model config says."""

    def __init__(
        self, where: str, mismatches: Iterable[tuple[str, tuple[int, ...], tuple[int, ...]]]
    ) -> None:
        rows = [f"{name}: expected {list(expected)}, got {list(got)}" for name, expected, got in mismatches]
        super().__init__(
            f"{where}: {len(rows)} tensor(s) of the wrong shape ({shortened(rows)}). "
            "Check that the checkpoint and the model config are of the same architecture."
        )


class CheckpointValueError(CheckpointError, ValueError):
    """A tensor holds NaN or infinite values, or is not floating point."""


class HubError(MassExportError, OSError):
    """A repository of the hub cannot be fetched, and is not in its cache."""


class HeadError(MassExportError, ValueError):
    """A head does not fit its classes or the model's embedding."""


class ArtifactError(MassExportError, ValueError):
    """The merged artifact is damaged or of another schema version."""


class ExportError(MassExportError, RuntimeError):
    """The bundle could not be written."""


class VerificationError(MassExportError, AssertionError):
    """The exported graphs do not reproduce the eager model."""


class DataError(MassExportError, ValueError):
    """Evaluation images or labels cannot be read or do not fit the tasks."""


class ReportError(MassExportError, ValueError):
    """A file of scores cannot be read, or a report cannot be written."""


def shortened(names: Sequence[str], limit: int = 8, separator: str = ", ") -> str:
    """The first `limit` names, and how many more there are."""
    more = f"{separator}and {len(names) - limit} more" if len(names) > limit else ""
    return separator.join(names[:limit]) + more
