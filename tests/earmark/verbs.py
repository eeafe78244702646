"""The command line in this process: many verbs in the time of one start."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, NamedTuple
from unittest.mock import patch

from typer.testing import CliRunner

from db.session import connect
from earmark import database
from earmark.cli.app import app
from earmark.core.errors import SERVICE_EXIT, USAGE_EXIT, EarmarkError, UsageError

if TYPE_CHECKING:
    import sqlalchemy as sa

    from earmark.core.settings import Database


class Ended(NamedTuple):
    """What a verb exits with, and all that it prints."""

    status: int
    text: str


def verb(*words: str) -> Ended:
    """Run a verb as `earmark.cli.main` does.

    An error of ours is a sentence; any other error fails the test.
    """
    with ExitStack() as engines:

        def connect_for_now(url: str, settings: Database) -> sa.Engine:
            engine = connect(url, settings)
            engines.callback(engine.dispose)
            return engine

        # The end of a process would close its connections.
        with patch.object(database, "connect", connect_for_now):
            result = CliRunner().invoke(app, list(words))
    error = result.exception
    if isinstance(error, EarmarkError):
        status = USAGE_EXIT if isinstance(error, UsageError) else SERVICE_EXIT
        return Ended(status, result.output + str(error))
    if error is not None and not isinstance(error, SystemExit):
        raise error
    return Ended(result.exit_code, result.output)
