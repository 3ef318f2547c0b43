"""The command line, `sae-pipe`: each command turns its flags into one configuration.

torch and transformers are imported by the commands that need them, so that --help is immediate.
"""

from importlib.metadata import version
from typing import Annotated

import typer

from .cli_compare import compare
from .cli_demo import demo
from .cli_eval import evaluate
from .cli_evalset import app as eval_set
from .cli_fit import fit
from .cli_formats import export, import_
from .cli_harvest import harvest
from .cli_inspect import inspect
from .cli_report import report
from .cli_sae import app as sae
from .cli_selftest import selftest
from .cli_store import app as store
from .cli_sweep import sweep

app = typer.Typer(
    name="sae-pipe",
    help="Harvest a language model's activations once, fit many sparse autoencoders from them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("harvest")(harvest)
app.command("fit")(fit)
app.command("sweep")(sweep)
app.command("eval")(evaluate)
app.command("compare")(compare)
app.command("report")(report)
app.command("selftest")(selftest)
app.command("inspect")(inspect)
app.command("export")(export)
app.command("import")(import_)
app.command("demo")(demo)
app.add_typer(store, name="store")
app.add_typer(eval_set, name="eval-set")
app.add_typer(sae, name="sae")


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


if __name__ == "__main__":  # torchrun -m sae_pipe.pipeline.cli fit ...
    main()
