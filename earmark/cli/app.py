"""The verbs of the command line, put together."""

from __future__ import annotations

from typing import Annotated

import typer

from earmark import terminal
from earmark.cli import compare, decide, inspect, learn, manage, results, run
from earmark.core.settings import Settings

HELP = "Label a million sound clips: lists in, Hugging Face audio models, results in SQL."
app = typer.Typer(
    name="earmark",
    help=HELP,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": lambda flag: flag.replace("_", "-"),
    },
)
GROUPS = (run, inspect, results, compare, learn, decide, manage)
for group in GROUPS:
    app.add_typer(group.commands)
app.add_typer(manage.database, name="db")


def _print_version(wanted: bool) -> None:
    if wanted:
        import earmark

        typer.echo(earmark.__version__)
        raise typer.Exit


@app.callback(help=HELP)
def main(
    version: Annotated[  # noqa: ARG001 - its callback does the work
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_print_version, help="Print the version."
        ),
    ] = False,
) -> None:
    """Take the options that stand before a verb, and name variables that no verb reads."""
    terminal.tell_all(Settings.misspelt())
