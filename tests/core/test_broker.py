"""The chunk message on its wire is the one Celery itself would have sent."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from earmark.core import broker
from earmark.core.clips import Chunk
from earmark.core.settings import Broker
from tests.servers import running_valkey

if TYPE_CHECKING:
    from pathlib import Path

#: Fields made anew for each message, and argsrepr, which Celery puts into the properties as well.
OWN = ("id", "root_id", "correlation_id", "delivery_tag", "reply_to", "argsrepr")


def test_a_chunk_is_queued_as_the_message_that_celery_sends(tmp_path: Path) -> None:
    chunk = Chunk("1edger", 7, ((1, "https://h/a.wav"), (2, "https://h/\u00fc.wav")))
    with running_valkey(tmp_path) as url:
        app = broker.configure(Broker(url=url))
        broker.send_chunks([chunk, chunk])
        app.send_task(
            broker.TASK, args=[broker.encode(chunk)], argsrepr="(run 7)", ignore_result=True
        )
        theirs, _, ours = [
            json.loads(message) for message in broker.client().lrange("earmark:clips", 0, -1)
        ]
        assert [_common(theirs[part]) for part in theirs] == [
            _common(ours[part]) for part in theirs
        ]
        assert set(ours) == set(theirs)
        assert (
            ours["headers"]["argsrepr"] == "(run 7, 2 clips: https://h/a.wav, https://h/\u00fc.wav)"
        )
        assert ours["headers"]["id"] == ours["properties"]["correlation_id"]


def _common(part: object) -> object:
    return (
        {name: value for name, value in part.items() if name not in OWN}
        if isinstance(part, dict)
        else part
    )
