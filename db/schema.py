"""The schema's versions: bring a database to ours, or say in a sentence that it is not."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import sqlalchemy as sa

from db.session import reading, writing
from earmark.errors import ServiceError

if TYPE_CHECKING:
    from alembic.config import Config

MIGRATIONS = Path(__file__).with_name("migrations")
VIEWS = Path(__file__).with_name("views.sql")


def upgrade(engine: sa.Engine) -> None:
    """Bring the database to this version's schema."""
    if current(engine) == versions()[-1]:
        return
    # Imported here because it takes a third of a second, which every look at a status would pay.
    from alembic import command

    with writing(engine) as connection:
        command.upgrade(_config(connection), "head")


def check(engine: sa.Engine) -> None:
    """Raise ServiceError unless the database has this version's schema."""
    found, wanted = current(engine), versions()[-1]
    where = engine.url.render_as_string(hide_password=True)
    if found is None:
        raise ServiceError(reason=f"The database {where} has no Earmark tables yet: run `earmark db upgrade`.")
    if found not in versions():
        raise ServiceError(reason=f"The database {where} is at {found}, newer than this Earmark: upgrade Earmark.")
    if found != wanted:
        raise ServiceError(reason=f"The database {where} is at {found}, this is {wanted}: run `earmark db upgrade`.")


def current(engine: sa.Engine) -> str | None:
    """Return the schema version a database is at, None where there are no tables of ours."""
    with reading(engine) as connection:
        if not sa.inspect(connection).has_table("alembic_version"):
            return None
        return str(connection.scalar(sa.text("SELECT version_num FROM alembic_version")))


def versions() -> list[str]:
    """Return the schema versions there have been, oldest first: each migration's file is named after its own."""
    return sorted(file.stem for file in (MIGRATIONS / "versions").glob("v*.py"))


def view_statements(dialect: str) -> list[str]:
    """Return the statements that create the public views on a dialect."""
    opening, closing = ("to_timestamp(", ")") if dialect == "postgresql" else ("datetime(", ", 'unixepoch')")
    statements = VIEWS.read_text(encoding="utf-8").replace("{time(}", opening).replace("{)}", closing)
    return [statement for statement in statements.split(";") if statement.strip()]


def _config(connection: sa.Connection) -> Config:
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config
