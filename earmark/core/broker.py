"""The one Celery app, the queue of chunks in Redis, and their messages."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any
from urllib.parse import urlsplit

import redis
from celery import Celery
from kombu import Queue
from kombu.exceptions import OperationalError
from kombu.utils.url import parse_url
from kombu.utils.uuid import uuid

from earmark.core import broker_errors
from earmark.core.broker_url import for_redis_py
from earmark.core.clips import Chunk
from earmark.core.errors import MessageError, ServiceError
from earmark.core.settings import Broker, Settings

TASK = "earmark.classify"
MESSAGE_VERSION = 2
#: Keeps several applications on one Redis from restoring each other's messages.
KEY_PREFIX = "earmark:"
#: The queue's name before the ledger is known. No worker takes from it.
UNNAMED_QUEUE = "clips"
#: By ledger and queue, the time of the last feed.
FED_KEY = f"{KEY_PREFIX}fed"
#: By queue, how many windows the device of a worker scores at once.
BATCH_KEY = f"{KEY_PREFIX}batch:"
#: Workers note it twice a second. Later, the last worker with such a device has gone.
BATCH_KEPT_S = 30
#: The field of a message with the time when it was first put back.
PUT_BACK_AT = "put_back_at"
#: Flower shows this many display URIs of a chunk as its arguments.
SHOWN_URIS = 3

#: In the data folder, the URL of the embedded Valkey that `earmark up` runs there.
EMBEDDED_NOTE = "broker.url"
#: The addresses and names that lead to this machine from itself alone.
LOOPBACK = ("127.0.0.1", "localhost", "::1")

#: Settings of Celery that are the same with every broker.
FIXED = {
    "include": ["workers.tasks"],
    "task_serializer": "json",
    "accept_content": ["json"],
    "result_accept_content": ["json"],
    "result_backend": None,
    "task_ignore_result": True,
    "task_acks_late": True,
    "task_reject_on_worker_lost": False,
    "worker_pool": "threads",
    "worker_prefetch_multiplier": 1,
    "worker_cancel_long_running_tasks_on_connection_loss": False,
    "worker_send_task_events": True,
    "worker_hijack_root_logger": False,
    "worker_eta_task_limit": 1000,
    "broker_connection_retry_on_startup": True,
    "broker_connection_max_retries": None,
    "control_queue_expires": 60,
    "timezone": "UTC",
}

app = Celery("earmark", set_as_current=False)


class OtherVersionError(Exception):
    """The message is one of another version of Earmark."""

    def __init__(self, version: int) -> None:
        super().__init__(version)
        self.version = version


def configure(broker: Broker) -> Celery:
    """Point the app at a broker; the architecture page explains the settings that matter most."""
    app.close()
    queue = broker.queue or UNNAMED_QUEUE
    # Celery keeps the queues and the producers of the previous broker.
    vars(app).pop("amqp", None)
    app.conf.update(
        **FIXED,
        broker_url=broker.url,
        # Workers read it from the URL, Flower's page of the broker from here.
        broker_use_ssl=_tls_options(broker.url or ""),
        broker_pool_limit=broker.pool_limit,
        broker_transport_options=_transport_options(broker, queue),
        task_queues=[Queue(queue)],
        task_default_queue=queue,
    )
    return app


def _transport_options(broker: Broker, queue: str) -> dict[str, Any]:
    return {
        "visibility_timeout": broker.visibility_timeout_s,
        "unacked_restore_interval": 30,
        "unacked_restore_throttle": 1,
        "global_keyprefix": KEY_PREFIX,
        # By queue, so that only chunks of this ledger's workers are counted and restored.
        "unacked_key": f"unacked:{queue}",
        "unacked_index_key": f"unacked_index:{queue}",
        "unacked_mutex_key": f"unacked_mutex:{queue}",
        "socket_keepalive": True,
        "health_check_interval": 25,
        "socket_connect_timeout": broker.connect_timeout_s,
        "retry_on_timeout": True,
    }


def _tls_options(url: str) -> dict[str, Any] | None:
    if not url.startswith("rediss://"):
        return None
    options: dict[str, Any] = parse_url(url)["ssl"]
    return options


def encode(chunk: Chunk) -> dict[str, Any]:
    """Return the JSON message of a chunk."""
    return {
        "v": MESSAGE_VERSION,
        "ledger": chunk.ledger_id,
        "run_id": chunk.run_id,
        "clips": [list(clip) for clip in chunk.clips],
    }


def decode(message: object) -> Chunk:
    """Read a chunk from its message.

    Raises:
        MessageError: the message is not one of ours.
        OtherVersionError: the message is one of another version of Earmark.
    """
    if not isinstance(message, dict) or not isinstance(message.get("v"), int):
        raise MessageError(reason=f"expected version {MESSAGE_VERSION}, got {str(message)[:200]}")
    if message["v"] != MESSAGE_VERSION:
        raise OtherVersionError(message["v"])
    try:
        clips = tuple((int(clip_id), str(uri)) for clip_id, uri in message["clips"])
        return Chunk(str(message["ledger"]), int(message["run_id"]), clips)
    except (KeyError, TypeError, ValueError) as error:
        raise MessageError(reason=repr(error)) from error


def send_chunks(chunks: list[Chunk]) -> None:
    """Queue chunks in one round trip, as the messages that `send_task` makes ten times as slowly.

    Raises:
        ServiceError: the broker is out of reach.
    """
    queue = app.conf.task_default_queue
    with _reachable():
        if chunks:
            messages = [_message(encode(chunk), uuid(), _shown(chunk), queue) for chunk in chunks]
            client().lpush(f"{KEY_PREFIX}{queue}", *messages)


def put_back(message: dict[str, Any], task_id: str, shown: str, keep_s: float) -> bool:
    """Queue a message again at the end of the queue; return whether it was kept.

    kombu would put it where it is taken next. It is dropped `keep_s` after it was first put back.

    Raises:
        ServiceError: the broker is out of reach.
    """
    queue = app.conf.task_default_queue
    with _reachable():
        time_s = _clock()
        first_s = float(message.get(PUT_BACK_AT, time_s))
        if time_s - first_s > keep_s:
            return False
        again = _message({**message, PUT_BACK_AT: first_s}, task_id, shown, queue)
        client().lpush(f"{KEY_PREFIX}{queue}", again)
        return True


def _message(message: dict[str, Any], task_id: str, shown: str, queue: str) -> str:
    # Celery's message, in kombu's envelope for Redis.
    task = app.amqp.as_task_v2(task_id, TASK, args=(message,), argsrepr=shown, ignore_result=True)
    properties = {
        **task.properties,
        "delivery_mode": 2,
        "delivery_info": {"exchange": "", "routing_key": queue},
        "priority": 0,
        "body_encoding": "base64",
        "delivery_tag": uuid(),
    }
    envelope = {
        "body": b64encode(json.dumps(task.body).encode()).decode(),
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": task.headers,
        "properties": properties,
    }
    return json.dumps(envelope)


def queue_length() -> int:
    """Return how many chunks wait in the queue."""
    with _reachable():
        return int(client().llen(f"{KEY_PREFIX}{app.conf.task_default_queue}"))


def chunks_in_hand() -> int:
    """Return how many chunks of the queue workers have taken and not yet acknowledged."""
    key = app.conf.broker_transport_options["unacked_key"]
    with _reachable():
        return int(client().hlen(f"{KEY_PREFIX}{key}"))


def server_info() -> dict[str, Any]:
    """Return the answer of Redis to INFO; empty if its user may not ask."""
    with _reachable(), suppress(redis.exceptions.NoPermissionError):
        return client().info()
    return {}


def check() -> None:
    """Check that Celery can use the broker, without leaving a trace in Redis.

    Raises:
        ServiceError: the broker is out of reach, or Celery cannot use it.
    """
    with _reachable():
        # The keys belong to two slots, which a cluster refuses in one command.
        client().exists(f"{KEY_PREFIX}{app.conf.task_default_queue}", f"{KEY_PREFIX}unacked")
        database = client().get_connection_kwargs().get("db", 0)
        _try_channel(f"{KEY_PREFIX}/{database}.celery.pidbox")


def _try_channel(channel: str) -> None:
    with client().pubsub() as subscription:  # type: ignore[no-untyped-call]
        subscription.psubscribe(channel)
        subscription.parse_response()
    # Celery ignores an empty message.
    client().publish(channel, "")


def is_unusable(error: ServiceError) -> bool:
    """Return whether Redis answers, but Celery cannot use it until somebody changes it."""
    return broker_errors.is_permanent(error.__cause__)


def mark_queue(ledger_id: str) -> bool:
    """Note that a ledger's feeder feeds the queue; return whether Redis is new or was wiped."""
    field = f"{ledger_id} {app.conf.task_default_queue}"
    with _reachable():
        return bool(client().hset(FED_KEY, field, str(_clock())))


def note_batch(windows: int) -> None:
    """Note that a worker of the queue scores so many windows at once."""
    with _reachable():
        client().set(f"{BATCH_KEY}{app.conf.task_default_queue}", windows, ex=BATCH_KEPT_S)


def noted_batch() -> int:
    """Return how many windows workers of the queue score at once, as far as they noted it."""
    with _reachable():
        noted: Any = client().get(f"{BATCH_KEY}{app.conf.task_default_queue}")
    return int(noted or 0)


def other_ledgers(ledger_id: str, within_s: float) -> list[str]:
    """Return the other ledgers whose feeders used this Redis within so many seconds."""
    with _reachable():
        since_s = _clock() - within_s
        fed: dict[Any, Any] = client().hgetall(FED_KEY)
    active = set()
    for field, fed_s in fed.items():
        if float(fed_s) > since_s:
            active.add(field.decode().split()[0])
    return sorted(active - {ledger_id})


def is_elsewhere(settings: Settings) -> bool:
    """Return whether other machines may use the broker: not on loopback, nor embedded here."""
    url = settings.broker.url
    if url in (None, embedded_url(settings)):
        return False
    return urlsplit(url).hostname not in LOOPBACK


def embedded_url(settings: Settings) -> str | None:
    """Return the URL of the Valkey that `earmark up` runs on this machine, if it does."""
    note = settings.data_dir / EMBEDDED_NOTE
    return note.read_text() if note.is_file() else None


def _clock() -> float:
    # The clock of Redis, so that no machine's own clock matters.
    seconds, microseconds = client().time()
    return float(seconds) + float(microseconds) / 1e6


def client() -> redis.Redis:
    """Return the process's client of the broker's Redis."""
    return _client(app.conf.broker_url, app.conf.broker_transport_options["socket_connect_timeout"])


@cache
def _client(url: str, timeout_s: float) -> redis.Redis:
    return redis.Redis.from_url(
        for_redis_py(url), socket_timeout=timeout_s, socket_connect_timeout=timeout_s
    )


def _shown(chunk: Chunk) -> str:
    uris = ", ".join(uri for _, uri in chunk.clips[:SHOWN_URIS])
    more = len(chunk.clips) - SHOWN_URIS
    if more > 0:
        uris += f" and {more} more"
    name = chunk.run_name or f"run {chunk.run_id}"
    return f"({name}, {len(chunk.clips)} clips: {uris})"


@contextmanager
def _reachable() -> Iterator[None]:
    try:
        yield
    except (OperationalError, redis.RedisError, OSError) as error:
        tls = app.conf.broker_url.startswith("rediss")
        raise ServiceError(reason=broker_errors.sentence(error, tls=tls)) from error
