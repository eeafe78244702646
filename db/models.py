"""The tables: runs, models and their labels, clips with their state, counts of those, predictions."""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    JSON,
    REAL,
    BigInteger,
    CheckConstraint,
    Double,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    SmallInteger,
    UniqueConstraint,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from earmark.clips import STATES

# SQLite counts rows only in a column that is exactly INTEGER.
Id = BigInteger().with_variant(Integer, "sqlite")
Json = JSON().with_variant(JSONB, "postgresql")


def _index(name: str, *columns: str, where: str) -> Index:
    return Index(name, *columns, sqlite_where=text(where), postgresql_where=text(where))


class Base(DeclarativeBase):
    """Maps the tables; `metadata` is what the migrations must arrive at.

    Times are seconds since 1970, UTC, on the database's clock.
    """

    type_annotation_map = {dict[str, Any]: Json, float: Double()}  # noqa: RUF012 - read by SQLAlchemy


class Model(Base):
    """A checkpoint as it was loaded: the same name with other weights is another model."""

    __tablename__ = "models"
    __table_args__ = (UniqueConstraint("name", "revision", "sha256"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    #: The resolved commit of a hub model, else empty.
    revision: Mapped[str]
    sha256: Mapped[str]
    sample_rate: Mapped[int]
    function_to_apply: Mapped[str]
    window_s: Mapped[float]
    created_at: Mapped[float]


class Label(Base):
    """One label of a model, at its position in the model's scores."""

    __tablename__ = "labels"
    __table_args__ = (UniqueConstraint("model_id", "position"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    model_id: Mapped[int] = mapped_column(ForeignKey("models.id"))
    position: Mapped[int]
    #: Indexed, or SQLite would go through a run's clips instead of through a label's.
    name: Mapped[str] = mapped_column(index=True)


class Run(Base):
    """One submission: a list and its options."""

    __tablename__ = "runs"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    #: What the first worker of the run loaded.
    model_id: Mapped[int | None] = mapped_column(ForeignKey("models.id"))
    options: Mapped[dict[str, Any]]
    #: The conveyor that carries its chunks.
    queue: Mapped[str]
    chunk_size: Mapped[int]
    #: Its share of the conveyor, in proportion to the other runs'.
    priority: Mapped[int] = mapped_column(server_default="1")
    #: A URL that a comparable run has a result of is not downloaded again.
    reuse_urls: Mapped[bool] = mapped_column(server_default=text("false"))
    created_at: Mapped[float]


class Clip(Base):
    """One URL or path of a run, and how far it has come."""

    __tablename__ = "clips"
    __table_args__ = (
        UniqueConstraint("run_id", "uri_key"),
        CheckConstraint(f"state IN {STATES}", name="clips_state"),
        # The order in which the feeder picks.
        _index("clips_pending", "run_id", "not_before", "id", where="state = 'pending'"),
        # What has to be taken back.
        _index("clips_leased", "lease_until", where="state IN ('queued', 'running')"),
        Index("clips_state", "run_id", "state"),
        # A label from a score up, and how often each label came first, without a look at the rows.
        Index("clips_label", "run_id", "label_id", "score"),
        _index("clips_finished", "run_id", "finished_at", where="finished_at IS NOT NULL"),
        _index("clips_sha256", "sha256", where="state = 'done'"),
    )

    id: Mapped[int] = mapped_column(Id, primary_key=True)
    run_id: Mapped[int] = mapped_column(ForeignKey("runs.id"))
    uri: Mapped[str]
    display_uri: Mapped[str]
    #: Hash of the normalised URI: what makes a clip the same clip within a run.
    uri_key: Mapped[bytes] = mapped_column(LargeBinary(16))
    meta: Mapped[dict[str, Any] | None]
    state: Mapped[str]
    #: Tries that ended by the clip's own doing; crashes and drained tries are not among them.
    attempts: Mapped[int] = mapped_column(SmallInteger, server_default="0")
    #: Worker deaths while holding this clip.
    crashes: Mapped[int] = mapped_column(SmallInteger, server_default="0")
    reused: Mapped[bool] = mapped_column(server_default=text("false"))
    not_before: Mapped[float] = mapped_column(server_default="0")
    #: Until when the queue (queued) or a worker (running) may keep the clip.
    lease_until: Mapped[float | None]
    lease_token: Mapped[int | None] = mapped_column(BigInteger)
    worker: Mapped[str | None]
    error_code: Mapped[str | None]
    error_stage: Mapped[str | None]
    error: Mapped[str | None]
    #: The best label and its score: rank 1 of the predictions, here too because most questions are about it.
    label_id: Mapped[int | None] = mapped_column(ForeignKey("labels.id"))
    score: Mapped[float | None] = mapped_column(REAL)
    sha256: Mapped[str | None]
    bytes: Mapped[int | None] = mapped_column(BigInteger)
    duration_s: Mapped[float | None]
    source_sample_rate: Mapped[int | None]
    channels: Mapped[int | None] = mapped_column(SmallInteger)
    codec: Mapped[str | None]
    truncated: Mapped[bool | None]
    silent: Mapped[bool | None]
    fetch_ms: Mapped[float | None] = mapped_column(REAL)
    decode_ms: Mapped[float | None] = mapped_column(REAL)
    classify_ms: Mapped[float | None] = mapped_column(REAL)
    finished_at: Mapped[float | None]


class RunCount(Base):
    """How many clips of a run are in a state: the sum over writers, kept by triggers as clips move.

    Each PostgreSQL connection adds to rows of its own, so that no writer ever waits for another\'s count.
    """

    __tablename__ = "run_counts"
    __table_args__ = ({"sqlite_with_rowid": False},)

    run_id: Mapped[int] = mapped_column(ForeignKey("runs.id"), primary_key=True, autoincrement=False)
    state: Mapped[str] = mapped_column(primary_key=True)
    writer: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    clips: Mapped[int] = mapped_column(BigInteger)
    audio_s: Mapped[float]


class Prediction(Base):
    """One of a clip's top-k labels; rank 1 is the best."""

    __tablename__ = "predictions"
    __table_args__ = ({"sqlite_with_rowid": False},)

    # The widest column first: PostgreSQL pads each to its own width, and this is the largest table.
    clip_id: Mapped[int] = mapped_column(Id, ForeignKey("clips.id"), primary_key=True, autoincrement=False)
    label_id: Mapped[int] = mapped_column(ForeignKey("labels.id"))
    score: Mapped[float] = mapped_column(REAL)
    rank: Mapped[int] = mapped_column(SmallInteger, primary_key=True, autoincrement=False)


class WindowPrediction(Base):
    """One of the top-k labels of one window of a clip that has several."""

    __tablename__ = "window_predictions"
    __table_args__ = ({"sqlite_with_rowid": False},)

    clip_id: Mapped[int] = mapped_column(Id, ForeignKey("clips.id"), primary_key=True, autoincrement=False)
    start_s: Mapped[float] = mapped_column(primary_key=True)
    end_s: Mapped[float]
    label_id: Mapped[int] = mapped_column(ForeignKey("labels.id"))
    score: Mapped[float] = mapped_column(REAL)
    rank: Mapped[int] = mapped_column(SmallInteger, primary_key=True, autoincrement=False)
