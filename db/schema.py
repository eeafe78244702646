"""Versions of the schema: upgrade a database, check it, and create the views and triggers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import sqlalchemy as sa

from db import access, urls
from db.dialects import DIALECTS, spelled
from db.session import reading, writing
from earmark.core.errors import ServiceError

if TYPE_CHECKING:
    from alembic.config import Config

MIGRATIONS = Path(__file__).with_name("migrations")
VIEWS = Path(__file__).with_name("views.sql")
#: Rights of a worker's role, besides those to add its model, which it does as it starts.
WORKER_RIGHTS = {
    "clips": ("SELECT", "UPDATE"),
    "leases": ("SELECT", "INSERT", "UPDATE", "DELETE"),
    "ledger": ("SELECT",),
    "run_counts": ("SELECT", "INSERT", "UPDATE"),
    "runs": ("SELECT", "UPDATE"),
    "window_embeddings": ("SELECT", "INSERT"),
    "window_predictions": ("SELECT", "INSERT"),
    "workers": ("SELECT", "INSERT", "UPDATE", "DELETE"),
}


def upgrade(engine: sa.Engine) -> None:
    """Bring the database to this version's schema.

    Raises:
        ServiceError: it is at a newer one, or may not be changed here.
    """
    version = current(engine)
    if version == versions()[-1]:
        return
    if version and version not in versions():
        check(engine)
    _check_writable(engine, version)
    # Imported here because it takes a third of a second, which every look at a status would pay.
    from alembic import command

    with writing(engine) as connection:
        access.check_may_create(connection)
        if engine.dialect.name == "postgresql":
            connection.execute(sa.text("SELECT pg_advisory_xact_lock(hashtext('earmark schema'))"))
        command.upgrade(_config(connection), "head")


def _check_writable(engine: sa.Engine, version: str | None) -> None:
    try:
        access.check_writable(engine)
    except ServiceError as error:
        if version is None:
            raise
        raise ServiceError(
            reason=f"{error} Whoever may write it has to upgrade it from {version} to"
            f" {versions()[-1]}: `earmark db upgrade`."
        ) from error


def check(engine: sa.Engine) -> None:
    """Raise ServiceError unless the database has this version's schema."""
    version, ours = current(engine), versions()[-1]
    if version == ours:
        return
    problem = f"is at {version}, this is {ours}: run `earmark db upgrade`"
    if version is None:
        problem = "has no Earmark tables yet: run `earmark db upgrade`"
    elif version not in versions():
        problem = f"is at {version}, newer than this Earmark: upgrade Earmark"
    raise ServiceError(reason=f"The database {urls.shown(engine.url)} {problem}.")


def check_rights(engine: sa.Engine) -> None:
    """Raise ServiceError unless a worker's role may write what workers write; PostgreSQL only."""
    if engine.dialect.name != "postgresql":
        return
    lacking = []
    with reading(engine) as connection:
        for table, rights in WORKER_RIGHTS.items():
            for right in rights:
                if not _allowed(connection, table, right):
                    lacking.append(f"{right} on {table}")  # noqa: PERF401 - three levels deep
    if lacking:
        raise ServiceError(
            reason=f"The role of {urls.shown(engine.url)} may not do what workers do: GRANT it"
            f" {', '.join(lacking)}, or make it the tables' owner."
        )


def _allowed(connection: sa.Connection, table: str, right: str) -> bool:
    return bool(connection.scalar(sa.select(sa.func.has_table_privilege(table, right))))


def current(engine: sa.Engine) -> str | None:
    """Return the schema version a database is at, None where there are no tables of ours."""
    with reading(engine) as connection:
        if not sa.inspect(connection).has_table("alembic_version"):
            return None
        version: str | None = connection.scalar(sa.text("SELECT version_num FROM alembic_version"))
        return version


def versions() -> list[str]:
    """Return the schema versions, oldest first: each migration's file is named after its own."""
    names = [file.stem for file in (MIGRATIONS / "versions").glob("v*.py")]
    return sorted(names, key=lambda name: list(map(int, name[1:].split("_"))))


def view_statements(dialect: str) -> list[str]:
    """Return the statements that create the public views on a dialect."""
    return _statements(spelled(VIEWS.read_text(encoding="utf-8"), DIALECTS[dialect]))


def view_query(view: str, dialect: str) -> str:
    """Return the SELECT that a public view stands for on a dialect."""
    begin = f"CREATE VIEW {view} AS\n"
    for statement in view_statements(dialect):
        _, found, query = statement.partition(begin)
        if found:
            return query
    raise KeyError(view)


def released_views(version: str, dialect: str) -> list[str]:
    """Return the statements that create the views of a released version on a dialect."""
    file = MIGRATIONS / "versions" / f"{version}_{dialect}.sql"
    return _statements(file.read_text(encoding="utf-8"))


def drop_views(created: list[str]) -> list[str]:
    """Return the statements that drop these views, those that are made of others first."""
    names = re.findall(r"CREATE VIEW (\w+)", ";".join(created))
    return [f"DROP VIEW {name}" for name in reversed(names)]


def view_names() -> list[str]:
    """Return the public views, those that others are made of first."""
    return re.findall(r"CREATE VIEW (\w+)", VIEWS.read_text(encoding="utf-8"))


def view_columns(engine: sa.Engine) -> dict[str, list[str]]:
    """Return the columns of each public view."""
    inspector = sa.inspect(engine)
    names = {}
    for view in view_names():
        columns = inspector.get_columns(view)
        names[view] = [str(column["name"]) for column in columns]
    return names


def _statements(text: str) -> list[str]:
    return [statement for statement in text.split(";") if statement.strip()]


def trigger_statements(dialect: str) -> list[str]:
    """Return the statements that create the triggers behind `run_counts` on a dialect."""
    text = VIEWS.with_name(f"triggers_{dialect}.sql").read_text(encoding="utf-8")
    return re.split(r"(?<=;)\n\n", text)


def _config(connection: sa.Connection) -> Config:
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config
