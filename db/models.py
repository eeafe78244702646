"""The tables: ledger identity, runs, models, labels, clips, leases, counts, windows, workers,
reviews and thresholds.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, column_property, mapped_column

from earmark.core.clips import KEY_BYTES, State

# SQLite counts rows only in a column that is exactly INTEGER.
Id = sa.BigInteger().with_variant(sa.Integer, "sqlite")
Json = sa.JSON().with_variant(JSONB, "postgresql")
# A clip's top-k, best first, in two lists of its row: rows of their own would take five times the
# disk and the writing.
Ids = sa.JSON().with_variant(ARRAY(sa.Integer), "postgresql")
Scores = sa.JSON().with_variant(ARRAY(sa.REAL), "postgresql")
#: The builtin by another name, since a column is called `bytes`.
Digest = bytes
#: The start of a digest, for an index: enough to find a file, in a quarter of the room.
DIGEST_START = sa.text("substr(sha256, 1, 7)")
#: The state of a clip that has a lease.
SELECT_LEASED_STATE = (
    "(SELECT CASE WHEN token IS NULL THEN 'queued' ELSE 'running' END FROM leases"
    " WHERE clip_id = clips.id AND clips.state = 'pending')"
)


def _partial_index(name: str, *columns: str | sa.TextClause, where: str) -> sa.Index:
    return sa.Index(name, *columns, sqlite_where=sa.text(where), postgresql_where=sa.text(where))


class Base(DeclarativeBase):
    """Maps the tables. The migrations must arrive at its `metadata`.

    Times are seconds since 1970, UTC, on the database's clock.
    """

    type_annotation_map = {  # noqa: RUF012 - read by SQLAlchemy
        dict[str, Any]: Json,
        float: sa.Double(),
    }


class LedgerIdentity(Base):
    """One row with the identity of this ledger, by which it knows its own messages."""

    __tablename__ = "ledger"

    id: Mapped[str] = mapped_column(primary_key=True)


class Model(Base):
    """A checkpoint as it was loaded: the same name with other weights is another model."""

    __tablename__ = "models"
    __table_args__ = (sa.UniqueConstraint("name", "revision", "sha256"),)

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
    __table_args__ = (sa.UniqueConstraint("model_id", "position"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    model_id: Mapped[int] = mapped_column(sa.ForeignKey("models.id"))
    position: Mapped[int]
    #: Indexed, or SQLite would go through a run's clips instead of through a label's.
    name: Mapped[str] = mapped_column(index=True)


class Run(Base):
    """One submission: a list and its options."""

    __tablename__ = "runs"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    #: What the first worker of the run loaded.
    model_id: Mapped[int | None] = mapped_column(sa.ForeignKey("models.id"))
    options: Mapped[dict[str, Any]]
    #: The Celery queue of its chunks.
    queue: Mapped[str]
    #: Clips in a message; 0: as many as the workers' devices score at once.
    chunk_size: Mapped[int]
    #: Its share of the queue, in proportion to the other runs'.
    priority: Mapped[int] = mapped_column(server_default="1")
    #: Take the result that a comparable run has for the same URL, without a download.
    reuse_urls: Mapped[bool] = mapped_column(server_default=sa.text("false"))
    created_at: Mapped[float]
    #: The run pauses if more than this share of its last clips fail on every worker; 1: never.
    stop_at: Mapped[float] = mapped_column(server_default="0.2")
    #: Why the run is paused; null while it is not.
    paused: Mapped[str | None]
    #: Clips that ended before this are no reason to pause the run.
    resumed_at: Mapped[float] = mapped_column(server_default="0")
    #: Runs with the same number hear the same clips, which are fetched once for all of them.
    pass_id: Mapped[int | None]
    #: The run of its pass that lets clips through to this one; see `RunOptions.then_label`.
    follows: Mapped[int | None]


class Clip(Base):
    """One URL or path of a run, or a part of it, with its state and its result."""

    __tablename__ = "clips"
    __table_args__ = (
        sa.UniqueConstraint("run_id", "uri_key"),
        sa.CheckConstraint(
            "state IN ('pending', 'done', 'failed', 'cancelled')", name="clips_state"
        ),
        # The order in which the feeder picks.
        _partial_index("clips_pending", "run_id", "not_before", "id", where="state = 'pending'"),
        # A run's clips in the order of their ids, which is that of the file.
        sa.Index("clips_run", "run_id"),
        # The clips that ended last, for the pace of a run.
        _partial_index("clips_finished", "run_id", "finished_at", where="finished_at IS NOT NULL"),
        _partial_index("clips_failed", "run_id", where="state = 'failed'"),
        # A label from a score up, and how often each label came first, without a look at the rows.
        _partial_index("clips_label", "run_id", "label_id", "score", where="state = 'done'"),
        _partial_index("clips_sha256", DIGEST_START, where="state = 'done'"),
    )

    # The widest columns first: PostgreSQL pads each to its own width.
    id: Mapped[int] = mapped_column(Id, primary_key=True)
    bytes: Mapped[int | None] = mapped_column(sa.BigInteger)
    duration_s: Mapped[float | None]
    finished_at: Mapped[float | None]
    #: Null once a clip is final.
    not_before: Mapped[float | None] = mapped_column(server_default="0")
    # Only the ledger writes these. A foreign key would add a third to the cost of submitting.
    run_id: Mapped[int] = mapped_column(info={"of": "runs"})
    #: The best label and its score: the first of label_ids and scores, repeated for the index.
    label_id: Mapped[int | None] = mapped_column(info={"of": "labels"})
    score: Mapped[float | None] = mapped_column(sa.REAL)
    source_sample_rate: Mapped[int | None]
    #: To fetch and decode: of clips that share a file, each has the whole file's time.
    fetch_ms: Mapped[float | None] = mapped_column(sa.REAL)
    decode_ms: Mapped[float | None] = mapped_column(sa.REAL)
    classify_ms: Mapped[float | None] = mapped_column(sa.REAL)
    #: Tries that ended by the clip's own doing; crashes and drained tries are not among them.
    attempts: Mapped[int] = mapped_column(sa.SmallInteger, server_default="0")
    #: Worker deaths while holding this clip.
    crashes: Mapped[int] = mapped_column(sa.SmallInteger, server_default="0")
    channels: Mapped[int | None] = mapped_column(sa.SmallInteger)
    reused: Mapped[bool] = mapped_column(server_default=sa.text("false"))
    #: Done without a label, as the run that this one follows did not let it through.
    unheard: Mapped[bool] = mapped_column(server_default=sa.text("false"))
    truncated: Mapped[bool | None]
    silent: Mapped[bool | None]
    over_scale: Mapped[bool | None]
    cancelling: Mapped[bool | None]
    #: `pending` until it is final. While a clip is queued or running, it has a lease instead.
    state: Mapped[str] = mapped_column()
    uri: Mapped[str] = mapped_column()
    _display_uri: Mapped[str | None] = mapped_column("display_uri")
    #: Hash of the normalised URI and the named part: unique within a run.
    uri_key: Mapped[Digest] = mapped_column(sa.LargeBinary(KEY_BYTES))
    meta: Mapped[dict[str, Any] | None]
    worker: Mapped[str | None]
    error_code: Mapped[str | None]
    error_stage: Mapped[str | None]
    error: Mapped[str | None]
    codec: Mapped[str | None]
    sha256: Mapped[Digest | None] = mapped_column(sa.LargeBinary(32))
    label_ids: Mapped[list[int] | None] = mapped_column(Ids)
    scores: Mapped[list[float] | None] = mapped_column(Scores)
    #: The channel that has these labels, 1-based; null for the mix of all.
    channel: Mapped[int | None] = mapped_column(sa.SmallInteger)
    #: The span of the file that the list's row names, in seconds; null for the whole file.
    start_s: Mapped[float | None]
    end_s: Mapped[float | None]
    #: The member of a container file, such as a ZIP.
    member: Mapped[str | None]
    #: Where the container has the member's bytes.
    member_offset: Mapped[int | None] = mapped_column(sa.BigInteger)
    member_bytes: Mapped[int | None] = mapped_column(sa.BigInteger)
    #: `deflate`; or the way in which the whole container is packed, to be undone first.
    packing: Mapped[str | None]
    #: Workers that gave the clip back, as the cause of their error may be their own: at most two.
    given_back_by: Mapped[str | None]
    #: What the file says of itself: a JSON object.
    tags: Mapped[str | None]
    #: ISO 8601: in UTC with a Z, else local. The source is a tag, or the file's name.
    recorded_at: Mapped[str | None]
    recorded_from: Mapped[str | None]
    #: The column is null where it would only repeat the URI.
    display_uri: Mapped[str] = column_property(sa.func.coalesce(_display_uri, uri))
    #: The state, with `queued` and `running` taken from the lease.
    state_now: Mapped[str] = column_property(
        sa.func.coalesce(sa.literal_column(SELECT_LEASED_STATE), state).label("state_now"),
        deferred=True,
    )


class Lease(Base):
    """The right of the queue, or with a token of a worker, to an unfinished clip until some time.

    Leases are written often and deleted soon. On PostgreSQL the table is UNLOGGED: after a crash of
    the server, clips in flight are fed again.
    """

    __tablename__ = "leases"

    clip_id: Mapped[int] = mapped_column(
        Id, primary_key=True, autoincrement=False, info={"of": "clips"}
    )
    until: Mapped[float] = mapped_column(index=True)
    token: Mapped[int | None] = mapped_column(sa.BigInteger)
    run_id: Mapped[int] = mapped_column(info={"of": "runs"})
    worker: Mapped[str | None]


class RunCount(Base):
    """Clips of a run by state (leased ones are `pending`): the sum over writers, kept by triggers.

    Each PostgreSQL connection adds to rows of its own, so that writers never wait for each other.
    """

    __tablename__ = "run_counts"
    __table_args__ = ({"sqlite_with_rowid": False},)

    run_id: Mapped[int] = mapped_column(sa.ForeignKey("runs.id"), primary_key=True)
    state: Mapped[str] = mapped_column(primary_key=True)
    writer: Mapped[int] = mapped_column(primary_key=True)
    clips: Mapped[int] = mapped_column(sa.BigInteger)
    audio_s: Mapped[float]
    #: When the last of them became final; 0 where none did.
    finished_at: Mapped[float]


class WindowPrediction(Base):
    """The top-k labels of one window of a clip that has several, best first."""

    __tablename__ = "window_predictions"
    __table_args__ = ({"sqlite_with_rowid": False},)

    clip_id: Mapped[int] = mapped_column(Id, sa.ForeignKey("clips.id"), primary_key=True)
    start_s: Mapped[float] = mapped_column(primary_key=True)
    end_s: Mapped[float]
    label_ids: Mapped[list[int]] = mapped_column(Ids)
    scores: Mapped[list[float]] = mapped_column(Scores)
    #: 1-based; 0 for the mix, since a primary key cannot be null.
    channel: Mapped[int] = mapped_column(sa.SmallInteger, primary_key=True, server_default="0")


class WindowEmbedding(Base):
    """The vector of one window before the model's last layer; see `earmark.core.vectors`."""

    __tablename__ = "window_embeddings"

    clip_id: Mapped[int] = mapped_column(Id, sa.ForeignKey("clips.id"), primary_key=True)
    #: From 0, by channel and start, as the clip's `window_predictions` if there are several. With
    #: their columns in its place, a page of PostgreSQL would hold nine rows of 768 bytes, not ten.
    number: Mapped[int] = mapped_column(primary_key=True)
    vector: Mapped[Digest] = mapped_column(sa.LargeBinary)


class Worker(Base):
    """A worker that is up, until it has not been seen for a while."""

    __tablename__ = "workers"

    name: Mapped[str] = mapped_column(primary_key=True)
    queue: Mapped[str]
    seen_at: Mapped[float]
    #: The folders that it may read.
    file_roots: Mapped[list[str]] = mapped_column(Json)
    #: Why it takes no chunks; null while it does.
    paused: Mapped[str | None]
    paused_at: Mapped[float | None]
    #: The run whose clips it fails.
    paused_run_id: Mapped[int | None] = mapped_column(info={"of": "runs"})


class ReviewLog(Base):
    """What people said of clips, in the order in which they said it: the newest counts."""

    __tablename__ = "review_log"
    __table_args__ = (
        sa.Index("review_log_clip", "clip_id", "label"),
        sa.Index("review_log_run", "run_id", "label"),
    )

    id: Mapped[int] = mapped_column(Id, primary_key=True)
    clip_id: Mapped[int] = mapped_column(Id, sa.ForeignKey("clips.id"))
    run_id: Mapped[int] = mapped_column(info={"of": "runs"})
    at: Mapped[float]
    #: The part of the clip that it is about; null for the whole clip, or all of its channels.
    start_s: Mapped[float | None]
    end_s: Mapped[float | None]
    channel: Mapped[int | None] = mapped_column(sa.SmallInteger)
    #: One of the model's, or one that a person typed.
    label: Mapped[str]
    #: `right`, `wrong` or `unsure`; `shown` while a person listens, so that nobody else gets it.
    verdict: Mapped[str]
    reviewer: Mapped[str]
    #: The scores among which the clip was drawn at random; null if it was chosen.
    sample_low: Mapped[float | None]
    sample_high: Mapped[float | None]


class Threshold(Base):
    """The least score of a label that is believed in a run, and what that rests on."""

    __tablename__ = "thresholds"

    run_id: Mapped[int] = mapped_column(sa.ForeignKey("runs.id"), primary_key=True)
    label: Mapped[str] = mapped_column(primary_key=True)
    #: The share of right clips that is promised, and how sure that is.
    precision: Mapped[float]
    confidence: Mapped[float]
    at: Mapped[float]
    #: Null while the reviews do not suffice. As wide as `clips.score`, to compare alike.
    min_score: Mapped[float | None] = mapped_column(sa.REAL)
    #: Clips from `min_score` up, those of them in the random sample, and the right ones of these.
    clips: Mapped[int]
    reviews: Mapped[int]
    right: Mapped[int]


def state_is(state: State) -> sa.ColumnElement[bool]:
    """Return the condition that a clip's state is this one."""
    # A literal, since SQLite uses a partial index only for its own condition.
    return Clip.state == sa.literal(state.value, literal_execute=True)
