"""What a backend must offer to run one of the two graphs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from numpy.typing import NDArray

from runtime.cores import CoreCache


class Session(Protocol):
    """A loaded graph. `run` may be called from several threads at once."""

    @property
    def provider(self) -> str:
        """Where it runs: `cpu`, `cuda` or `tensorrt`."""
        ...

    @property
    def max_batch(self) -> int | None:
        """Largest batch that it takes; None for any."""
        ...

    def stage(self, pixel_values: Any) -> Any:
        """Bring images to where both passes read them, once.

        Args:
            pixel_values: of the host, or of another library on this GPU. [B, 3, H, W] float32

        Returns:
            what `run` takes as pixel_values; has `shape` and can be indexed by rows.
        """
        ...

    def core_feeds(self, sets: Sequence[tuple[int, ...]], cores: CoreCache) -> Mapping[str, Any]:
        """Cores as inputs of the second pass: one set for the batch, or one for each sample.

        Args:
            sets: task indices of each set, ascending; all of one size.
            cores: of the bundle.

        Returns:
            input name -> cores [S, K*R, K*R] float32, for `run`.
        """
        ...

    def run(self, feeds: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
        """Run the graph on inputs by name; outputs by name.

        Raises:
            BackendError: the backend failed, or the session is closed.
        """
        ...

    def close(self) -> None:
        """Release the graph; runs that are under way finish. Closing twice is harmless."""
        ...
