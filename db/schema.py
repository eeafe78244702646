"""The schema's versions: bring a database to ours, or say in a sentence that it is not."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory

from db.session import reading, writing
from earmark.errors import ServiceError

if TYPE_CHECKING:
    import sqlalchemy as sa

MIGRATIONS = Path(__file__).with_name("migrations")
VIEWS = Path(__file__).with_name("views.sql")


def upgrade(engine: sa.Engine) -> None:
    """Bring the database to this version's schema."""
    with writing(engine) as connection:
        command.upgrade(_config(connection), "head")


def check(engine: sa.Engine) -> None:
    """Raise ServiceError unless the database has this version's schema."""
    with reading(engine) as connection:
        found = MigrationContext.configure(connection).get_current_revision()
    script = ScriptDirectory.from_config(_config(None))
    wanted = script.get_current_head()
    where = engine.url.render_as_string(hide_password=True)
    if found is None:
        raise ServiceError(reason=f"The database {where} has no Earmark tables yet: run `earmark db upgrade`.")
    if found != wanted and found in {revision.revision for revision in script.walk_revisions()}:
        raise ServiceError(reason=f"The database {where} is at {found}, this is {wanted}: run `earmark db upgrade`.")
    if found != wanted:
        raise ServiceError(reason=f"The database {where} is at {found}, newer than this Earmark: upgrade Earmark.")


def view_statements(dialect: str) -> list[str]:
    """Return the statements that create the public views on a dialect."""
    opening, closing = ("to_timestamp(", ")") if dialect == "postgresql" else ("datetime(", ", 'unixepoch')")
    statements = VIEWS.read_text(encoding="utf-8").replace("{time(}", opening).replace("{)}", closing)
    return [statement for statement in statements.split(";") if statement.strip()]


def _config(connection: sa.Connection | None) -> Config:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config
