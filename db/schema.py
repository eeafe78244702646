"""The schema's versions: bring a database to ours, or say in a sentence that it is not."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import sqlalchemy as sa

from db import access, urls
from db.session import reading, writing
from earmark.core.errors import ServiceError

if TYPE_CHECKING:
    from alembic.config import Config

MIGRATIONS = Path(__file__).with_name("migrations")
VIEWS = Path(__file__).with_name("views.sql")
WITH_RANKS = "WITH ORDINALITY AS p(value, score, key)"
#: What is spelled differently on SQLite and on PostgreSQL, whose sums are decimals unless cast.
SPELLINGS = {
    "{time:}": ("datetime(", "to_timestamp("),
    "{:time}": (", 'unixepoch')", ")"),
    "{sum:}": ("coalesce(sum(", "CAST(coalesce(sum("),
    "{:sum}": ("), 0)", "), 0) AS bigint)"),
    "{find}": ("instr", "strpos"),
    "{hex}": ("lower(hex(c.sha256))", "encode(c.sha256, 'hex')"),
    "{rank}": ("p.key + 1", "p.key"),
    "{score of c}": ("c.scores ->> p.key", "p.score"),
    "{score of w}": ("w.scores ->> p.key", "p.score"),
    "{each of c}": ("json_each(c.label_ids) p", f"unnest(c.label_ids, c.scores) {WITH_RANKS}"),
    "{each of w}": ("json_each(w.label_ids) p", f"unnest(w.label_ids, w.scores) {WITH_RANKS}"),
    "{host}": (
        "CASE instr(uri, '://') WHEN 0 THEN '' ELSE substr(uri, instr(uri, '://') + 3,"
        " instr(substr(uri, instr(uri, '://') + 3) || '/', '/') - 1) END",
        "split_part(split_part(uri, '://', 2), '/', 1)",
    ),
}


#: What a worker's role must be allowed, besides adding its model, which it does as it starts.
WORKER_RIGHTS = {
    "clips": ("SELECT", "UPDATE"),
    "leases": ("SELECT", "INSERT", "UPDATE", "DELETE"),
    "ledger": ("SELECT",),
    "run_counts": ("SELECT", "INSERT", "UPDATE"),
    "runs": ("SELECT", "UPDATE"),
    "window_predictions": ("SELECT", "INSERT"),
}


def upgrade(engine: sa.Engine) -> None:
    """Bring the database to this version's schema.

    Raises:
        ServiceError: it is at a newer one, or may not be changed here.
    """
    found = current(engine)
    if found == versions()[-1]:
        return
    if found and found not in versions():
        check(engine)
    _check_writable(engine, found)
    # Imported here because it takes a third of a second, which every look at a status would pay.
    from alembic import command

    with writing(engine) as connection:
        access.check_may_create(connection)
        if engine.dialect.name == "postgresql":
            connection.execute(sa.text("SELECT pg_advisory_xact_lock(hashtext('earmark schema'))"))
        command.upgrade(_config(connection), "head")


def _check_writable(engine: sa.Engine, found: str | None) -> None:
    try:
        access.check_writable(engine)
    except ServiceError as error:
        if found is None:
            raise
        cure = f"Whoever may write it has to upgrade it from {found} to {versions()[-1]}: `earmark db upgrade`."
        raise ServiceError(reason=f"{error} {cure}") from error


def check(engine: sa.Engine) -> None:
    """Raise ServiceError unless the database has this version's schema."""
    found, wanted = current(engine), versions()[-1]
    where = urls.shown(engine.url)
    if found is None:
        raise ServiceError(
            reason=f"The database {where} has no Earmark tables yet: run `earmark db upgrade`."
        )
    if found not in versions():
        raise ServiceError(
            reason=f"The database {where} is at {found}, newer than this Earmark: upgrade Earmark."
        )
    if found != wanted:
        raise ServiceError(
            reason=f"The database {where} is at {found}, this is {wanted}: run `earmark db upgrade`."
        )


def check_rights(engine: sa.Engine) -> None:
    """Raise ServiceError unless a worker's role may write what workers write; PostgreSQL only."""
    if engine.dialect.name != "postgresql":
        return
    rights = [(table, right) for table, needed in WORKER_RIGHTS.items() for right in needed]
    with reading(engine) as connection:
        lacking = [
            f"{right} on {table}"
            for table, right in rights
            if not _allowed(connection, table, right)
        ]
    if lacking:
        raise ServiceError(
            reason=f"The role of {urls.shown(engine.url)} may not do what workers do: GRANT it {', '.join(lacking)},"
            " or make it the tables' owner."
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
    """Return the schema versions there have been, oldest first: each migration's file is named after its own."""
    names = [file.stem for file in (MIGRATIONS / "versions").glob("v*.py")]
    return sorted(names, key=lambda name: [int(part) for part in name[1:].split("_")])


def view_statements(dialect: str) -> list[str]:
    """Return the statements that create the public views on a dialect."""
    statements = VIEWS.read_text(encoding="utf-8")
    for spelling, own in SPELLINGS.items():
        statements = statements.replace(spelling, own[dialect == "postgresql"])
    return _statements(statements)


def view_query(view: str, dialect: str) -> str:
    """Return the SELECT that a public view stands for on a dialect."""
    begin = f"CREATE VIEW {view} AS\n"
    return next(
        statement.partition(begin)[2]
        for statement in view_statements(dialect)
        if begin in statement
    )


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
