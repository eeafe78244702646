"""The command line: `main` is what `earmark` runs."""

from __future__ import annotations

import sys

from earmark.errors import SERVICE_EXIT, USAGE_EXIT, EarmarkError, UsageError
from earmark.processes import isolate_imports


def main() -> None:
    """Run the command line; every error of ours becomes one sentence and an exit code."""
    try:
        isolate_imports()
        # Imported here because until then a module of the user's could stand in for one of ours.
        from console.cli.app import app

        app()
    except UsageError as error:
        _end(str(error), USAGE_EXIT)
    except EarmarkError as error:
        _end(str(error), SERVICE_EXIT)


def _end(sentence: str, status: int) -> None:
    sys.stderr.write(f"earmark: {sentence}\n")
    raise SystemExit(status)
