"""The first schema."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import ARRAY, JSONB

from db.schema import drop_views, released_views, trigger_statements

revision = "v0_1_0"
down_revision = None

ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
JSON = sa.JSON().with_variant(JSONB(), "postgresql")
IDS = sa.JSON().with_variant(ARRAY(sa.Integer()), "postgresql")
SCORES = sa.JSON().with_variant(ARRAY(sa.REAL()), "postgresql")


def upgrade() -> None:
    op.create_table(
        "models",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("revision", sa.String(), nullable=False),
        sa.Column("sha256", sa.String(), nullable=False),
        sa.Column("sample_rate", sa.Integer(), nullable=False),
        sa.Column("function_to_apply", sa.String(), nullable=False),
        sa.Column("window_s", sa.Double(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("name", "revision", "sha256"),
    )
    op.create_table(
        "labels",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("model_id", sa.Integer(), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.ForeignKeyConstraint(["model_id"], ["models.id"]),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("model_id", "position"),
    )
    op.create_index("ix_labels_name", "labels", ["name"])
    op.create_table(
        "runs",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("model_id", sa.Integer()),
        sa.Column("options", JSON, nullable=False),
        sa.Column("queue", sa.String(), nullable=False),
        sa.Column("chunk_size", sa.Integer(), nullable=False),
        sa.Column("priority", sa.Integer(), server_default="1", nullable=False),
        sa.Column("reuse_urls", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["model_id"], ["models.id"]),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("name"),
    )
    op.create_table(
        "clips",
        sa.Column("id", ID, nullable=False),
        sa.Column("bytes", sa.BigInteger()),
        sa.Column("duration_s", sa.Double()),
        sa.Column("finished_at", sa.Double()),
        sa.Column("not_before", sa.Double(), server_default="0"),
        sa.Column("run_id", sa.Integer(), nullable=False),
        sa.Column("label_id", sa.Integer()),
        sa.Column("score", sa.REAL()),
        sa.Column("source_sample_rate", sa.Integer()),
        sa.Column("fetch_ms", sa.REAL()),
        sa.Column("decode_ms", sa.REAL()),
        sa.Column("classify_ms", sa.REAL()),
        sa.Column("attempts", sa.SmallInteger(), server_default="0", nullable=False),
        sa.Column("crashes", sa.SmallInteger(), server_default="0", nullable=False),
        sa.Column("channels", sa.SmallInteger()),
        sa.Column("reused", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("truncated", sa.Boolean()),
        sa.Column("silent", sa.Boolean()),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("uri", sa.String(), nullable=False),
        sa.Column("display_uri", sa.String()),
        sa.Column("uri_key", sa.LargeBinary(length=11), nullable=False),
        sa.Column("meta", JSON),
        sa.Column("worker", sa.String()),
        sa.Column("error_code", sa.String()),
        sa.Column("error_stage", sa.String()),
        sa.Column("error", sa.String()),
        sa.Column("codec", sa.String()),
        sa.Column("sha256", sa.LargeBinary(length=32)),
        sa.Column("label_ids", IDS),
        sa.Column("scores", SCORES),
        sa.CheckConstraint(
            "state IN ('pending', 'done', 'failed', 'cancelled')", name="clips_state"
        ),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("run_id", "uri_key"),
    )
    for name, columns, where in (
        ("clips_pending", ["run_id", "not_before", "id"], "state = 'pending'"),
        ("clips_failed", ["run_id"], "state = 'failed'"),
        ("clips_finished", ["run_id", "finished_at"], "finished_at IS NOT NULL"),
        ("clips_label", ["run_id", "label_id", "score"], "state = 'done'"),
        ("clips_sha256", [sa.text("substr(sha256, 1, 7)")], "state = 'done'"),
    ):
        op.create_index(
            name, "clips", columns, sqlite_where=sa.text(where), postgresql_where=sa.text(where)
        )
    op.create_index("clips_run", "clips", ["run_id"])
    op.create_table(
        "leases",
        sa.Column("clip_id", ID, autoincrement=False, nullable=False),
        sa.Column("until", sa.Double(), nullable=False),
        sa.Column("token", sa.BigInteger()),
        sa.Column("run_id", sa.Integer(), nullable=False),
        sa.Column("worker", sa.String()),
        sa.PrimaryKeyConstraint("clip_id"),
    )
    op.create_index("ix_leases_until", "leases", ["until"])
    op.create_table(
        "run_counts",
        sa.Column("run_id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("writer", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("clips", sa.BigInteger(), nullable=False),
        sa.Column("audio_s", sa.Double(), nullable=False),
        sa.Column("finished_at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"]),
        sa.PrimaryKeyConstraint("run_id", "state", "writer"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "window_predictions",
        sa.Column("clip_id", ID, autoincrement=False, nullable=False),
        sa.Column("start_s", sa.Double(), nullable=False),
        sa.Column("end_s", sa.Double(), nullable=False),
        sa.Column("label_ids", IDS, nullable=False),
        sa.Column("scores", SCORES, nullable=False),
        sa.ForeignKeyConstraint(["clip_id"], ["clips.id"]),
        sa.PrimaryKeyConstraint("clip_id", "start_s"),
        sqlite_with_rowid=False,
    )
    dialect = op.get_bind().dialect.name
    if dialect == "postgresql":
        op.execute("ALTER TABLE leases SET UNLOGGED")
    for statement in trigger_statements(dialect) + released_views(revision, dialect):
        op.execute(statement)


def downgrade() -> None:
    for statement in drop_views(released_views(revision, op.get_bind().dialect.name)):
        op.execute(statement)
    for table in (
        "window_predictions",
        "run_counts",
        "leases",
        "clips",
        "runs",
        "labels",
        "models",
    ):
        op.drop_table(table)
    if op.get_bind().dialect.name == "postgresql":
        op.execute("DROP FUNCTION count_clips, count_clip")
