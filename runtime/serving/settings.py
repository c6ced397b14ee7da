"""What can be set: frozen dataclasses, from whose fields both command lines take their options."""

from __future__ import annotations

import argparse
import dataclasses
import math
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from runtime.errors import InputError
from runtime.machine import processors
from runtime.provider import Provider

MIB = 1 << 20

_T = TypeVar("_T")


def option(
    default: Any, text: str, *, metavar: str | None = None, choices: Sequence[str] | None = None
) -> Any:
    """A field that is an option of the command line, too.

    Args:
        default: its value if it is not given; `dataclasses.MISSING` makes it required.
        text: its help.
        metavar: how its value is called there.
        choices: the values that it may take.
    """
    metadata = {"help": text, "metavar": metavar, "choices": choices}
    return dataclasses.field(default=default, metadata=metadata, kw_only=True)


@dataclass(frozen=True)
class Limits:
    """What a request may ask for; everything beyond is refused before it costs anything."""

    max_body_mib: float = option(32.0, "Largest request.", metavar="MIB")
    max_pixels: int = option(50_000_000, "Pixels of an image, at most.", metavar="N")
    max_images: int = option(64, "Images in a request, at most.", metavar="N")
    max_ongoing: int = option(64, "Requests that a replica has in work.", metavar="N")
    max_queued: int = option(128, "Further requests that wait; others get 429.", metavar="N")
    deadline: float = option(30.0, "An answer takes no longer; else 504.", metavar="SECONDS")
    body_timeout: float = option(
        10.0, "A client sends its request within this time; else 408.", metavar="SECONDS"
    )

    def __post_init__(self) -> None:
        for name in ("max_pixels", "max_images", "max_ongoing"):
            require_count(name, getattr(self, name))
        if self.max_queued != -1:
            require_count("max_queued", self.max_queued)
        for name in ("max_body_mib", "deadline", "body_timeout"):
            require_positive(name, getattr(self, name))

    @property
    def max_body_bytes(self) -> int:
        """The largest request, in bytes."""
        return int(self.max_body_mib * MIB)


@dataclass(frozen=True)
class ServeSettings(Limits):
    """`serve`: where, how many, how batched.

    The key of `MASS_API_KEY` is asked of every client if that variable is set; it is no option, so that it does not
    show in lists of processes.
    """

    bundle: str = option(dataclasses.MISSING, "The directory that mass-export wrote.", metavar="DIR")
    host: str = option("127.0.0.1", "Address to listen at.", metavar="ADDRESS")
    port: int = option(8000, "Port to listen at.", metavar="PORT")
    replicas: int = option(1, "Copies of the model.", metavar="N")
    autoscale: str | None = option(None, "Copies as the load asks for them, instead.", metavar="MIN:MAX")
    batch_size: int = option(32, "Images in a batch, at most.", metavar="N")
    batch_wait: float = option(0.005, "A batch waits this long for others.", metavar="SECONDS")
    provider: str = option("auto", "Where the bundle runs.", choices=typing.get_args(Provider))
    threads: int | None = option(
        None, "Threads of a replica; by default its share of the processors.", metavar="N"
    )
    name: str = option("mass", "The model's name in the Open Inference Protocol.", metavar="NAME")
    watch: float | None = option(None, "Look for a new bundle in DIR this often.", metavar="SECONDS")
    haproxy: bool = option(
        default=False, text="HAProxy before the replicas: cheaper requests; Linux, one machine."
    )
    address: str | None = option(None, "Join this Ray cluster instead of starting one.", metavar="ADDRESS")
    log_dir: str | None = option(None, "Write the logs (JSON lines) here.", metavar="DIR")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("replicas", "batch_size"):
            require_count(name, getattr(self, name))
        if self.threads is not None:
            require_count("threads", self.threads)
        if not 0 <= self.port < 1 << 16:
            raise InputError(f"port: expected 0..65535, got {self.port}.")
        if not 0 <= self.batch_wait <= 1:
            raise InputError(f"batch_wait: expected 0..1 seconds, got {self.batch_wait}.")
        if self.watch is not None:
            require_positive("watch", self.watch)
        if not self.name.isidentifier():
            raise InputError(f"name: expected letters, digits and _, got {self.name!r}.")
        if self.autoscale is not None:
            _ = self.replica_range
        if self.haproxy and self.address is not None:
            raise InputError(
                "haproxy: its rules lie on this machine alone; without it a cluster can be joined."
            )

    @property
    def replica_range(self) -> tuple[int, int]:
        """Fewest and most replicas."""
        if self.autoscale is None:
            return self.replicas, self.replicas
        least, separator, most = self.autoscale.partition(":")
        if not separator or not least.isdigit() or not most.isdigit() or not 1 <= int(least) <= int(most):
            raise InputError(f"autoscale: expected MIN:MAX with 1 <= MIN <= MAX, got {self.autoscale!r}.")
        return int(least), int(most)

    def replica_threads(self) -> int:
        """Threads of one replica: what was asked for, or its share of this machine's processors."""
        return self.threads or max(1, processors() // self.replica_range[1])


@dataclass(frozen=True)
class BatchSettings:
    """`batch`: from many images to one table."""

    bundle: str = option(dataclasses.MISSING, "The directory that mass-export wrote.", metavar="DIR")
    input: str = option(
        dataclasses.MISSING,
        "A folder of images, a Parquet file or folder (--column), or WebDataset shards (.tar).",
        metavar="PATH",
    )
    output: str = option(dataclasses.MISSING, "The Parquet file to write.", metavar="FILE")
    column: str = option(
        "image", "Of a Parquet input: bytes, or {bytes, path} as of Hugging Face.", metavar="NAME"
    )
    tasks: str | None = option(None, "Only these tasks may answer.", metavar="NAME,NAME")
    top_k: int = option(5, "Labels for each image.", metavar="N")
    workers: int = option(1, "Actors that hold a classifier each.", metavar="N")
    threads: int | None = option(
        None, "Threads of a worker; by default its share of the processors.", metavar="N"
    )
    batch_size: int = option(32, "Images in a batch.", metavar="N")
    chunk: int = option(1000, "Images of a part, the unit that is redone after a fault.", metavar="N")
    max_pixels: int = option(50_000_000, "Pixels of an image, at most.", metavar="N")
    provider: str = option("auto", "Where the bundle runs.", choices=typing.get_args(Provider))
    address: str | None = option(None, "Join this Ray cluster instead of starting one.", metavar="ADDRESS")
    quiet: bool = option(default=False, text="No progress bar.")

    def __post_init__(self) -> None:
        for name in ("top_k", "workers", "batch_size", "chunk", "max_pixels"):
            require_count(name, getattr(self, name))
        if self.threads is not None:
            require_count("threads", self.threads)

    @property
    def task_names(self) -> list[str] | None:
        """The tasks that may answer; None for all."""
        return None if self.tasks is None else [name.strip() for name in self.tasks.split(",")]

    def worker_threads(self) -> int:
        """Threads of one worker: what was asked for, or its share of this machine's processors."""
        return self.threads or max(1, processors() // self.workers)


def option_fields(kind: type[Any]) -> list[tuple[dataclasses.Field[Any], type[Any]]]:
    """The options of a settings class with the type of their values, required ones first."""
    hints = typing.get_type_hints(kind)
    fields = [(field, _plain(hints[field.name])) for field in dataclasses.fields(kind)]
    return sorted(fields, key=lambda pair: pair[0].default is not dataclasses.MISSING)


def add_arguments(parser: argparse.ArgumentParser, kind: type[Any]) -> None:
    """Give a parser the options of a settings class."""
    for field, value_type in option_fields(kind):
        flag, text = f"--{field.name.replace('_', '-')}", field.metadata["help"]
        if value_type is bool:
            parser.add_argument(flag, action="store_true", help=text)
            continue
        shown = "" if field.default in (None, dataclasses.MISSING) else f" (default {field.default})"
        parser.add_argument(
            flag,
            type=value_type,
            default=None if field.default is dataclasses.MISSING else field.default,
            required=field.default is dataclasses.MISSING,
            metavar=field.metadata["metavar"],
            choices=field.metadata["choices"],
            help=text.replace("%", "%%") + shown,
        )


def settings_from(kind: type[_T], values: dict[str, Any]) -> _T:
    """Make settings of plain values, such as those of a Ray Serve configuration file.

    Raises:
        InputError: a value is out of range, or a name is unknown or missing.
    """
    fields = {field.name: field for field, _ in option_fields(kind)}
    unknown = sorted(set(values) - set(fields))
    missing = [
        name for name, field in fields.items() if field.default is dataclasses.MISSING and name not in values
    ]
    if unknown or missing:
        raise InputError(f"settings: missing {missing}, unknown {unknown}; known are {', '.join(fields)}.")
    return kind(**values)


def require_count(name: str, value: object) -> None:
    """Refuse what is no integer from 1 on."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"{name}: expected an integer >= 1, got {value!r}.")


def require_positive(name: str, value: object) -> None:
    """Refuse what is no finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise InputError(f"{name}: expected a finite number > 0, got {value!r}.")


def _plain(hint: Any) -> type[Any]:
    """`int` of `int | None`."""
    kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
    found: type[Any] = kinds[0] if kinds else hint
    return found
