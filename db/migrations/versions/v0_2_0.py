"""The ledger's identity; parts of files, windows of channels; workers, runs that pause; reviews."""

import secrets
from collections.abc import Callable
from typing import Any

import sqlalchemy as sa
from alembic import op

from db.migrations.versions import v0_1_0
from db.schema import drop_views, released_views, view_statements
from earmark.core.clips import uri_key, whole_uri_key

#: Every scheme of `earmark.core.signed_urls` has a parameter that ends like this.
SELECT_SIGNED = sa.text(
    "SELECT id, uri FROM clips WHERE id > :last"
    " AND (uri LIKE '%ignature=%' OR uri LIKE '%IGNATURE=%' OR uri LIKE '%sig=%')"
    " ORDER BY id LIMIT 10000"
)
UPDATE_KEY = sa.text(
    "UPDATE clips SET uri_key = :key WHERE id = :clip_id AND NOT EXISTS"
    " (SELECT 1 FROM clips other WHERE other.run_id = clips.run_id AND other.uri_key = :key)"
)

revision = "v0_2_0"
down_revision = "v0_1_0"
#: Columns that may be null, by table and type.
ADDED: tuple[tuple[str, sa.types.TypeEngine[Any], tuple[str, ...]], ...] = (
    ("clips", sa.Double(), ("start_s", "end_s")),
    ("clips", sa.SmallInteger(), ("channel",)),
    ("clips", sa.BigInteger(), ("member_offset", "member_bytes")),
    ("clips", sa.String(), ("member", "packing", "given_back_by")),
    ("clips", sa.String(), ("tags", "recorded_at", "recorded_from")),
    ("clips", sa.Boolean(), ("over_scale", "cancelling")),
    ("runs", sa.String(), ("paused",)),
    ("runs", sa.Integer(), ("pass_id", "follows")),
)
#: The others, each with its value in the rows that are there.
NOT_NULL: tuple[tuple[str, str, sa.types.TypeEngine[Any], str], ...] = (
    ("clips", "unheard", sa.Boolean(), "false"),
    ("runs", "stop_at", sa.Double(), "0.2"),
    ("runs", "resumed_at", sa.Double(), "0"),
)


def upgrade() -> None:
    dialect = op.get_bind().dialect.name
    ledger = op.create_table(
        "ledger", sa.Column("id", sa.String(), nullable=False), sa.PrimaryKeyConstraint("id")
    )
    op.bulk_insert(ledger, [{"id": secrets.token_hex(16)}])
    _replace_views(released_views(down_revision, dialect), [])
    for table, kind, names in ADDED:
        for name in names:
            op.add_column(table, sa.Column(name, kind))
    for table, name, kind, value in NOT_NULL:
        column = sa.Column(name, kind, server_default=sa.text(value), nullable=False)
        op.add_column(table, column)
    _add_workers()
    _add_embeddings()
    _add_reviews()
    _rekey(uri_key)
    if dialect == "sqlite":
        _rebuild_windows(
            ["clip_id", "channel", "start_s"], "clip_id, start_s, end_s, label_ids, scores, 0"
        )
    else:
        op.add_column(
            "window_predictions",
            sa.Column("channel", sa.SmallInteger(), server_default="0", nullable=False),
        )
        _replace_key(["clip_id", "channel", "start_s"])
    _replace_views([], view_statements(dialect))


def downgrade() -> None:
    dialect = op.get_bind().dialect.name
    _replace_views(view_statements(dialect), [])
    op.execute("DELETE FROM window_predictions WHERE channel <> 0")
    if dialect == "sqlite":
        _rebuild_windows(["clip_id", "start_s"], "clip_id, start_s, end_s, label_ids, scores")
    else:
        _replace_key(["clip_id", "start_s"])
        op.drop_column("window_predictions", "channel")
    for table in ("window_embeddings", "workers", "thresholds", "review_log"):
        op.drop_table(table)
    for table, _, names in ADDED:
        for name in names:
            op.drop_column(table, name)
    for table, name, _, _ in NOT_NULL:
        op.drop_column(table, name)
    _rekey(whole_uri_key)
    _replace_views([], released_views(down_revision, dialect))
    op.execute(
        "UPDATE runs SET queue = 'clips'"
        " WHERE queue = 'clips-' || (SELECT substr(id, 1, 8) FROM ledger)"
    )
    op.drop_table("ledger")


def _replace_views(old: list[str], new: list[str]) -> None:
    for statement in drop_views(old) + new:
        op.execute(statement)


def _add_workers() -> None:
    op.create_table(
        "workers",
        sa.Column("name", sa.String(), primary_key=True),
        *_filled(sa.String(), "queue"),
        *_filled(sa.Double(), "seen_at"),
        *_filled(v0_1_0.JSON, "file_roots"),
        sa.Column("paused", sa.String()),
        sa.Column("paused_at", sa.Double()),
        sa.Column("paused_run_id", sa.Integer()),
    )


def _rekey(key_of: Callable[[str], bytes]) -> None:
    """Give clips with a signed URL their new key, so that their list adds nothing when it is
    submitted again. Of clips that would now be one, the first takes the key.
    """
    connection = op.get_bind()
    last = 0
    while rows := connection.execute(SELECT_SIGNED, {"last": last}).all():
        last = rows[-1].id
        keys = [{"clip_id": row.id, "key": key_of(row.uri)} for row in rows]
        connection.execute(UPDATE_KEY, keys)


def _add_embeddings() -> None:
    op.create_table(
        "window_embeddings",
        sa.Column("clip_id", v0_1_0.ID, sa.ForeignKey("clips.id"), primary_key=True),
        sa.Column("number", sa.Integer(), primary_key=True),
        *_filled(sa.LargeBinary(), "vector"),
    )


def _add_reviews() -> None:
    op.create_table(
        "review_log",
        sa.Column("id", v0_1_0.ID, primary_key=True),
        sa.Column("clip_id", v0_1_0.ID, sa.ForeignKey("clips.id"), nullable=False),
        *_filled(sa.Integer(), "run_id"),
        *_filled(sa.Double(), "at"),
        *_filled(sa.String(), "label", "verdict", "reviewer"),
        sa.Column("start_s", sa.Double()),
        sa.Column("end_s", sa.Double()),
        sa.Column("channel", sa.SmallInteger()),
        sa.Column("sample_low", sa.Double()),
        sa.Column("sample_high", sa.Double()),
    )
    op.create_index("review_log_clip", "review_log", ["clip_id", "label"])
    op.create_index("review_log_run", "review_log", ["run_id", "label"])
    op.create_table(
        "thresholds",
        sa.Column("run_id", sa.Integer(), sa.ForeignKey("runs.id"), primary_key=True),
        sa.Column("label", sa.String(), primary_key=True),
        *_filled(sa.Double(), "precision", "confidence", "at"),
        sa.Column("min_score", sa.REAL()),
        *_filled(sa.Integer(), "clips", "reviews", "right"),
    )


def _filled(kind: sa.types.TypeEngine[Any], *names: str) -> list[sa.Column[Any]]:
    return [sa.Column(name, kind, nullable=False) for name in names]


def _rebuild_windows(key: list[str], columns: str) -> None:
    # SQLite cannot change the primary key of a table.
    channel = sa.Column("channel", sa.SmallInteger(), server_default="0", nullable=False)
    op.create_table(
        "new_windows",
        sa.Column("clip_id", v0_1_0.ID, autoincrement=False, nullable=False),
        sa.Column("start_s", sa.Double(), nullable=False),
        sa.Column("end_s", sa.Double(), nullable=False),
        sa.Column("label_ids", v0_1_0.IDS, nullable=False),
        sa.Column("scores", v0_1_0.SCORES, nullable=False),
        *([channel] if "channel" in key else []),
        sa.ForeignKeyConstraint(["clip_id"], ["clips.id"]),
        sa.PrimaryKeyConstraint(*key),
        sqlite_with_rowid=False,
    )
    op.execute(f"INSERT INTO new_windows SELECT {columns} FROM window_predictions")  # noqa: S608
    op.drop_table("window_predictions")
    op.rename_table("new_windows", "window_predictions")


def _replace_key(columns: list[str]) -> None:
    op.drop_constraint("window_predictions_pkey", "window_predictions")
    op.create_primary_key("window_predictions_pkey", "window_predictions", columns)
