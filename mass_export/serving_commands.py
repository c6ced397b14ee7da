"""`mass serve` and `mass batch`: the commands of `runtime.serving`, with the same options."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import click

from runtime.serving.settings import BatchSettings, ServeSettings, option_fields, settings_from


def setting_options(kind: type[Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator: the fields of a settings class as options of a command."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for field, value_type in reversed(option_fields(kind)):
            given = field.default is not dataclasses.MISSING
            choices = field.metadata["choices"]
            options: dict[str, Any] = {"help": field.metadata["help"], "required": not given}
            if value_type is bool:
                options["is_flag"] = True
            else:
                options["type"] = click.Choice(choices) if choices else value_type
                options["metavar"] = field.metadata["metavar"]
            if given:
                options |= {"default": field.default, "show_default": field.default is not None}
            command = click.option(f"--{field.name.replace('_', '-')}", **options)(command)
        return command

    return decorate


def add_serving_commands(group: click.Group, example: Callable[..., str]) -> None:
    """Register both.

    Args:
        group: of all commands.
        example: writes the end of a help text.
    """

    @group.command(
        epilog=example(
            "mass serve --bundle engines/",
            "mass serve --bundle engines/ --replicas 2 --watch 10",
        )
    )
    @setting_options(ServeSettings)
    def serve(**options: Any) -> None:
        """Answer requests over HTTP, batched, on Ray Serve.

        A page is at /, the API at /v1/classify and /v2 (Open Inference Protocol). With MASS_API_KEY set, clients
        must send that key. Needs the extra `serve`.
        """
        from runtime.serving.__main__ import serve_command  # noqa: PLC0415

        serve_command(settings_from(ServeSettings, options))

    @group.command(
        epilog=example(
            "mass batch --bundle engines/ --input photos/ --output answers.parquet",
            "mass batch --bundle engines/ --input shards/ --output answers.parquet --workers 2",
        )
    )
    @setting_options(BatchSettings)
    def batch(**options: Any) -> None:
        """Classify many images into one Parquet file, on Ray Data.

        Every image is one row; one that cannot be read has its error there. A job that was interrupted goes on when
        the same command is given again. Needs the extra `serve`.
        """
        from runtime.serving.__main__ import batch_command  # noqa: PLC0415

        batch_command(settings_from(BatchSettings, options))
