"""The command line: `main` is what `earmark` runs."""

from __future__ import annotations

import sys

from earmark.core.errors import SERVICE_EXIT, USAGE_EXIT, EarmarkError, ServiceError, UsageError
from earmark.core.processes import isolate_imports


def main() -> None:
    """Run the command line; every error of ours becomes one sentence and an exit code."""
    try:
        isolate_imports()
        _check_encoding()
        # Imported here: before isolate_imports, a module of the user's could replace one of ours.
        from earmark.cli.app import app

        app()
    except UsageError as error:
        _end(str(error), USAGE_EXIT)
    except EarmarkError as error:
        _end(str(error), SERVICE_EXIT)


def _check_encoding() -> None:
    if sys.getfilesystemencoding() == "ascii":
        raise ServiceError(
            reason="This locale has ASCII letters only: set PYTHONUTF8=1, or LC_ALL=C.UTF-8."
        )


def _end(sentence: str, status: int) -> None:
    sys.stderr.write(f"earmark: {sentence}\n")
    raise SystemExit(status)
