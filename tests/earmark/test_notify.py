"""Webhooks: told through the guard, and no more of their URL is shown than the host."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from db import ledger, schema
from db.session import connect
from earmark import notify
from earmark.core.errors import UsageError
from earmark.core.options import RunOptions
from earmark.core.settings import Database, Settings

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import sqlalchemy as sa
    from pytest_httpserver import HTTPServer

SECRET = "CANARY0123456789"


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[sa.Engine]:
    engine = connect(f"sqlite:///{tmp_path}/x.db", Database())
    schema.upgrade(engine)
    ledger.open_run(engine, "mine", RunOptions(), queue="q", chunk_size=16)
    yield engine
    engine.dispose()


def here(server: HTTPServer) -> Settings:
    return Settings().changed(fetch={"allow_networks": "127.0.0.0/8,::1", "ports": (server.port,)})


def test_a_webhook_is_told_that_a_run_finished_or_was_stopped(
    engine: sa.Engine, httpserver: HTTPServer
) -> None:
    httpserver.expect_request(f"/{SECRET}", method="POST").respond_with_data("ok")
    url = httpserver.url_for(f"/{SECRET}")
    with notify.telling(url, engine, 1, here(httpserver)):
        pass
    with pytest.raises(KeyboardInterrupt), notify.telling(url, engine, 1, here(httpserver)):
        raise KeyboardInterrupt
    notices = [request.get_json() for request, _ in httpserver.log]
    assert [notice["event"] for notice in notices] == ["finished", "stopped"]
    assert notices[0]["run"] == "mine"
    assert notices[0]["clips"] == notices[0]["done"] == 0
    assert notices[0]["text"] == "Earmark: mine finished, 0 clips, 0 done, 0 failed"


@pytest.mark.parametrize(
    ("status", "headers", "words"),
    [
        (404, {}, "HTTP 404"),
        (500, {}, "HTTP 500"),
        (302, {"Location": "/elsewhere"}, "redirects"),
    ],
)
def test_a_webhook_that_fails_is_one_sentence_and_ends_no_run(
    status: int,
    headers: dict[str, str],
    words: str,
    engine: sa.Engine,
    httpserver: HTTPServer,
    capsys: pytest.CaptureFixture[str],
) -> None:
    httpserver.expect_request(f"/{SECRET}").respond_with_data("", status, headers)
    with notify.telling(httpserver.url_for(f"/{SECRET}"), engine, 1, here(httpserver)):
        pass
    told = capsys.readouterr()
    assert "The webhook at localhost was not told that the run finished" in told.err
    assert words in told.err
    assert SECRET not in told.err + told.out
    assert len(httpserver.log) == 1


def test_a_webhook_inside_is_not_dialled(
    engine: sa.Engine, httpserver: HTTPServer, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = Settings().changed(fetch={"ports": (httpserver.port,)})
    with notify.telling(httpserver.url_for("/"), engine, 1, settings):
        pass
    assert "not a public address" in capsys.readouterr().err
    assert httpserver.log == []


@pytest.mark.parametrize("url", ["ftp://example.org/", "example.org", "https://example.org:22/"])
def test_what_can_be_no_webhook_is_refused_at_once(url: str) -> None:
    with pytest.raises(UsageError, match="--notify cannot be used"):
        notify.check(url, Settings())
