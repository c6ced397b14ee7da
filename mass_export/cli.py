"""The command line: `mass merge`, `mass export`, `mass classify` and more.

Commands are thin and import what they need as they run.
"""

from __future__ import annotations

import click

from mass_export import build_commands, look_commands
from mass_export.command_group import Group, example
from mass_export.serving_commands import add_serving_commands


@click.group(
    cls=Group,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=example(
        "mass merge recipe.yaml --out merged.safetensors",
        "mass export --artifact merged.safetensors --out engines/",
        "mass classify --bundle engines/ photos/",
    )
    + "\n\n\b\n"
    + "Exit codes: 0 done; 1 an input or the machine is at fault, and one Error: line says what to do;\n"
    + "2 wrong usage; 3 `mass doctor` found problems.",
)
@click.version_option(package_name="mass-export")
def main() -> None:
    """Merge fine-tuned CLIP vision models into one classifier (MASS) and ship it."""


@main.command(epilog=example("mass completion bash"))
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion of commands and options for SHELL.

    For bash and zsh put `eval "$(mass completion bash)"` into ~/.bashrc or ~/.zshrc, for fish write what is printed to
    ~/.config/fish/completions/mass.fish.
    """
    from click.shell_completion import get_completion_class  # noqa: PLC0415

    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(main, {}, "mass", "_MASS_COMPLETE").source())


for _command in (*build_commands.COMMANDS, *look_commands.COMMANDS):
    main.add_command(_command)
add_serving_commands(main, example)


def merge_main() -> None:
    """`mass-merge`: the merge command by itself."""
    build_commands.merge.main(prog_name="mass-merge")


def export_main() -> None:
    """`mass-export`: the export command by itself."""
    build_commands.export.main(prog_name="mass-export")


if __name__ == "__main__":
    main()
