"""docs/cli.md, generated from the commands: python -m sae_pipe.pipeline.reference > docs/cli.md"""

from collections.abc import Iterator
from typing import Any

import typer.main

from .cli import app


def markdown() -> str:
    """The command-line reference. tests/test_cli.py checks that docs/cli.md is this."""
    root = typer.main.get_command(app)
    lines = [
        "# Command-line reference",
        "",
        "Generated from the commands by `python -m sae_pipe.pipeline.reference`; do not edit.",
        "",
        "Exit codes: 0 done; 2 something to put right, said in one sentence on stderr; 3 not",
        "harvested, because the catalogue holds that store; 130 interrupted, and the same command",
        "goes on.",
        "",
    ]
    for name, command in commands(root, "sae-pipe"):
        lines += [f"## {name}", "", *_help(command), *_parameters(command)]
    return "\n".join(lines).rstrip() + "\n"


def commands(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Every command that does something, with its full name."""
    members = getattr(command, "commands", None)
    if members is None:
        yield name, command
        return
    for member, child in members.items():
        yield from commands(child, f"{name} {member}")


def _help(command: Any) -> list[str]:
    paragraphs = (command.help or "").strip().split("\n\n")
    lines: list[str] = []
    for paragraph in paragraphs:
        lines += [" ".join(paragraph.split()), ""]
    return lines


def _parameters(command: Any) -> list[str]:
    lines = ["| | | default |", "| --- | --- | --- |"]
    for parameter in command.params:
        if parameter.name == "help":
            continue
        names = ", ".join(f"`{name}`" for name in _names(parameter))
        about = " ".join((getattr(parameter, "help", None) or "").split()).replace("|", "\\|")
        lines.append(f"| {names} | {about} | {_default(parameter)} |")
    return [*lines, ""]


def _names(parameter: Any) -> list[str]:
    if parameter.param_type_name == "argument":
        return [parameter.name.upper()]
    return [*parameter.opts, *parameter.secondary_opts]


def _default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    if parameter.default is None or parameter.default is False:
        return ""
    if isinstance(parameter.default, list | tuple):
        return ", ".join(str(value) for value in parameter.default)
    return f"`{parameter.default}`"


if __name__ == "__main__":
    print(markdown(), end="")
