"""The command line: one short function per verb."""

from __future__ import annotations

import sys

import typer

from console.cli import asking, changing, doing, reading
from earmark.errors import SERVICE_EXIT, USAGE_EXIT, EarmarkError, ServiceError, UsageError

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


def main() -> None:
    """Run the command line; every error of ours becomes one sentence and an exit code."""
    try:
        _check_encoding()
        app()
    except UsageError as error:
        _end(str(error), USAGE_EXIT)
    except EarmarkError as error:
        _end(str(error), SERVICE_EXIT)


def _check_encoding() -> None:
    if sys.getfilesystemencoding() == "ascii":
        raise ServiceError(reason="This locale has ASCII letters only: set PYTHONUTF8=1, or LC_ALL=C.UTF-8.")


def _end(sentence: str, status: int) -> None:
    sys.stderr.write(f"earmark: {sentence}\n")
    raise SystemExit(status)
