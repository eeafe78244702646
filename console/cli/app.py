"""The verbs of the command line, put together."""

from __future__ import annotations

import typer

from console.cli import asking, changing, doing, reading

app = typer.Typer(
    name="earmark",
    help="Label a million sound clips: lists in, Hugging Face audio models, results in SQL.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": lambda flag: flag.replace("_", "-"),
    },
)
for some in (doing.verbs, asking.verbs, reading.verbs, changing.verbs):
    app.add_typer(some)
app.add_typer(changing.database, name="db")
