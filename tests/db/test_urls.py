"""Database URLs: a wrong one is one sentence, and no password is ever shown."""

from __future__ import annotations

import pytest

from db import urls
from earmark.core.errors import ServiceError
from earmark.core.settings import Settings, sqlite_url

SECRET = "CANARY"


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://me:CANARY@db/earmark",
        "postgresql://me:pa%40CANARY@db/earmark",
        "postgresql://db/earmark?user=me&password=CANARY",
        "postgresql://me:CANARY@db/earmark?password=CANARY&password=CANARY2",
        "postgresql:///earmark?host=/run/postgresql&user=me&password=CANARY",
        "postgresql://me@db/earmark?sslmode=verify-full&sslkey=k.pem&sslpassword=CANARY",
        "postgresql+psycopg://me:CANARY@db/earmark",
    ],
)
def test_a_password_is_never_shown(url: str) -> None:
    shown = urls.shown(urls.parse(url))
    assert SECRET not in shown
    assert "/earmark" in shown


def test_user_and_password_may_be_options() -> None:
    parsed = urls.parse("postgresql://other:wrong@db/earmark?user=me&password=a%40b")
    assert (parsed.username, parsed.password, dict(parsed.query)) == ("me", "a@b", {})


@pytest.mark.parametrize(
    ("url", "cure"),
    [
        ("postgresql://me:CAN@ARY@db/earmark", "percent-encode"),
        ("postgresql://me:CAN@ARY:x@db/earmark", "percent-encode"),
        ("postgresql://me:CAN@ARY/x@db/earmark", "percent-encode"),
        ("postgresql://me:CAN@ARY?x@db/earmark", "percent-encode"),
        ("postgresql://me:CAN@ARY#x@db/earmark", "percent-encode"),
        ("postgresql://me@db:CANARY/earmark", "port must be a number"),
        ("postgresql://me@h1:5432,h2:5432/earmark", "host=h1:5432&host=h2:5432"),
        ("postgresql://me:CANARY@db/earmark?nope=1", "no option nope"),
        ("postgresql+psycopg2://me:CANARY@db/earmark", "begin the database URL with postgresql://"),
        ("postgresql+asyncpg://me:CANARY@db/earmark", "begin the database URL with postgresql://"),
        ("sqlite+aiosqlite:///labels.db", "begin the database URL with sqlite://"),
        ("mysql://me:CANARY@db/earmark", "sqlite or postgresql, not mysql"),
        ("labels.db", "begins with postgresql:// or sqlite:///"),
    ],
)
def test_a_url_that_cannot_be_used_is_one_sentence_without_its_password(
    url: str, cure: str
) -> None:
    with pytest.raises(ServiceError) as caught:
        urls.parse(url)
    assert cure in str(caught.value)
    assert "CAN" not in str(caught.value)
    assert "ARY" not in str(caught.value)


def test_several_hosts_are_options() -> None:
    parsed = urls.parse(
        "postgresql://me@/earmark?host=h1:5432&host=h2:5433&target_session_attrs=read-write"
    )
    assert parsed.query["host"] == ("h1:5432", "h2:5433")


@pytest.mark.parametrize(
    "name", ["q?x.db", "p%41x.db", "a b.db", "ümläut.db", "#1.db", "a:b&c=d@e.db", "50%.db"]
)
def test_a_sqlite_file_has_the_name_that_was_given(name: str) -> None:
    assert urls.parse(sqlite_url(Settings().data_dir / name)).database == str(
        Settings().data_dir / name
    )
