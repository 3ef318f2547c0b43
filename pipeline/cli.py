"""The command line, `sae-pipe`: each command turns its flags into one configuration.

torch and transformers are imported by the commands that need them, so that --help is immediate.
"""

from importlib.metadata import version
from typing import Annotated

import typer

from . import cli_demo, cli_fit, cli_harvest, cli_inspect, cli_store

app = typer.Typer(
    name="sae-pipe",
    help="Harvest a language model's activations once, fit many sparse autoencoders from them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("harvest")(cli_harvest.harvest)
app.command("fit")(cli_fit.fit)
app.command("inspect")(cli_inspect.inspect)
app.command("demo")(cli_demo.demo)
app.add_typer(cli_store.app, name="store")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"sae-pipe {version('sae-pipe')}")
        raise typer.Exit


@app.callback()
def _root(
    _version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point of the console script."""
    app()
