"""The settings of a verb, and the database it works with."""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa

from db import access, results, schema, urls
from db.session import connect
from earmark.core.errors import ServiceError, UsageError
from earmark.core.settings import Settings, sqlite_url
from earmark.core.spelling import did_you_mean


def read_settings(db: str | None = None) -> Settings:
    """Return the settings of the environment, with another database if one is given.

    Raises:
        ServiceError: a setting cannot be read.
    """
    return with_database(Settings.read(), db)


def with_database(settings: Settings, db: str | None) -> Settings:
    """Return settings with another database, if its URL or the name of its file is given."""
    if db is None:
        return settings
    url = db if "://" in db else sqlite_url(_file(db))
    return settings.changed(database={"url": url})


def _file(name: str) -> Path:
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise UsageError(reason=f"{name} names the home of a user who has none here.") from error


def connect_to(settings: Settings) -> sa.Engine:
    return connect(settings.database_url, settings.database)


def open_database(settings: Settings, *, create: bool = False) -> sa.Engine:
    """Return the engine of a database at this version's schema.

    A SQLite file is upgraded, or created if asked; a shared database is only checked.

    Raises:
        ServiceError: it is out of reach, at another schema, or cannot be created.
    """
    engine = connect_to(settings)
    if create:
        access.check_writable(engine)
    file = urls.file_of(engine.url)
    if file is None:
        schema.check(engine)
    elif create or file.is_file():
        schema.upgrade(engine)
    else:
        raise ServiceError(reason=f"There is no database at {file} yet: `earmark run` makes one.")
    return engine


def known_labels(settings: Settings, model: str) -> list[str]:
    """Return the labels of a model that some worker has loaded."""
    engine = open_database(settings)
    labels = results.model_labels(engine, model)
    if not labels:
        known = results.models(engine)
        raise UsageError(
            reason=f"No worker has loaded the model {model!r} into this database yet."
            f"{did_you_mean(model, known)}"
        )
    return labels
