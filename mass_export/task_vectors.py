"""Task vectors: what fine-tuning changed in the vision tower."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def compute_task_vector(finetuned: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Fine-tuned minus base, parameter by parameter, in float64 (Ilharco et al., arXiv 2212.04089, section 2).

    Both must hold the same names; `load_checkpoint` sees to that.
    """
    return {name: finetuned[name].double() - parameter.double() for name, parameter in base.items()}


def is_matrix(parameter: Tensor) -> bool:
    """Matrices are factorised; every other parameter is a vector parameter, whose delta is kept whole."""
    return parameter.ndim == 2
