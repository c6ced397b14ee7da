"""`python -m runtime.serving serve|batch`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from runtime.errors import MassRuntimeError
from runtime.serving.settings import BatchSettings, ServeSettings, add_arguments, settings_from


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m runtime.serving",
        description="Serve a mass-export bundle, or classify many images with it, on Ray.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    serve = commands.add_parser("serve", help="answer requests over HTTP")
    add_arguments(serve, ServeSettings)
    batch = commands.add_parser("batch", help="classify many images into a Parquet file")
    add_arguments(batch, BatchSettings)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0, or 1 after one `error:` line (2 for wrong usage)."""
    values = vars(_parser().parse_args(argv))
    command = values.pop("command")
    try:
        if command == "serve":
            serve_command(settings_from(ServeSettings, values))
        else:
            batch_command(settings_from(BatchSettings, values))
    except MassRuntimeError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 1
    return 0


def serve_command(settings: ServeSettings) -> None:
    """Serve until stopped; see `runtime.serving.server.run_server`."""
    from runtime.serving.server import run_server  # noqa: PLC0415 - Ray takes seconds to import

    run_server(settings)


def batch_command(settings: BatchSettings) -> None:
    """Classify everything, then say so; see `runtime.serving.batch.run_batch`."""
    from runtime.serving.batch import run_batch  # noqa: PLC0415

    done = run_batch(settings)
    print(done.sentence(settings.output))  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())
