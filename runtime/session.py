"""What a backend must offer to run one of the two graphs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from numpy.typing import NDArray


class Session(Protocol):
    """A loaded graph. `run` may be called from several threads at once."""

    @property
    def provider(self) -> str:
        """Where it runs: `cpu`, `cuda` or `tensorrt`."""
        ...

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run the graph on inputs by name; outputs by name.

        Raises:
            BackendError: the backend failed, or the session is closed.
        """
        ...

    def close(self) -> None:
        """Release the graph; runs that are under way finish. Closing twice is harmless."""
        ...
