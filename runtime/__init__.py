"""Run mass-export bundles with numpy, Pillow and ONNX Runtime; no torch.

with Classifier("engines/") as classifier:
    predictions = classifier.predict(["cat.jpg"])
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from runtime.errors import BackendError, BundleError, InputError, MassRuntimeError

if TYPE_CHECKING:
    from runtime.classifier import Classifier
    from runtime.prediction import ForwardResult, Prediction

# Imported when first asked for, so that command lines can print their help without numpy and ONNX Runtime.
_LAZY = {
    "Classifier": "runtime.classifier",
    "ForwardResult": "runtime.prediction",
    "Prediction": "runtime.prediction",
}

try:
    __version__ = version("mass-export")
except PackageNotFoundError:  # copied to a device without its metadata
    __version__ = "0+unknown"

__all__ = [
    "BackendError",
    "BundleError",
    "Classifier",
    "ForwardResult",
    "InputError",
    "MassRuntimeError",
    "Prediction",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
