"""Run mass-export bundles with numpy, Pillow and ONNX Runtime; no torch.

with Classifier("engines/") as classifier:
    predictions = classifier.predict(["cat.jpg"])
"""

from importlib.metadata import PackageNotFoundError, version

from runtime.classifier import Classifier
from runtime.errors import BackendError, BundleError, InputError, MassRuntimeError
from runtime.prediction import ForwardResult, Prediction

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
