"""The exceptions of the runtime: one base, leaves by whose mistake it is."""


class MassRuntimeError(Exception):
    """Base of every error that this package raises on purpose."""


class BundleError(MassRuntimeError, ValueError):
    """The bundle directory is missing, damaged, unsafe or of another schema version."""


class BackendError(MassRuntimeError, RuntimeError):
    """The execution backend is not installed, not available or failed; carries its own text."""


class EngineError(BackendError):
    """TensorRT is missing, or cannot build the engine that was asked for."""


class InputError(MassRuntimeError, ValueError):
    """An image, array, task name or setting given by the caller cannot be used."""
