"""A Redis URL is read alike by kombu and redis-py, or refused without showing its password."""

from __future__ import annotations

import pytest
from kombu import Connection
from pydantic import ValidationError
from redis.connection import parse_url

from earmark.core import broker_url
from earmark.core.settings import Broker

PASSWORD = "seCret"


@pytest.mark.parametrize(
    ("url", "host", "port", "password", "database"),
    [
        ("redis://h", "h", None, None, 0),
        ("redis://h:1/3", "h", 1, None, 3),
        ("redis://h?db=3", "h", None, None, 3),
        ("valkey://:p%40w%2F@h/2", "h", None, "p@w/", 2),
        ("valkeys://u:p@h/", "h", None, "p", 0),
        ("redis://u:a:b@h", "h", None, "a:b", 0),
        ("redis://[::1]:7/1", "::1", 7, None, 1),
    ],
)
def test_kombu_and_redis_py_read_a_url_alike(
    url: str, host: str, port: int | None, password: str | None, database: int
) -> None:
    usable = broker_url.usable(url)
    ours = parse_url(broker_url.for_redis_py(usable))
    theirs = Connection(usable)
    assert (ours["host"], ours.get("port"), ours.get("password"), ours["db"]) == (
        host,
        port,
        password,
        database,
    )
    assert (theirs.hostname, theirs.port, theirs.password, theirs.virtual_host) == (
        host,
        port,
        password,
        str(database),
    )


@pytest.mark.parametrize(
    "options", ["", "?ssl_cert_reqs=CERT_REQUIRED", "?ssl_ca_certs=/a%20b/ca.pem"]
)
def test_kombu_and_redis_py_check_the_servers_certificate(options: str) -> None:
    usable = broker_url.usable(f"rediss://h/1{options}")
    ours = parse_url(usable)
    theirs = Connection(usable).ssl
    assert ours["ssl_cert_reqs"] == "required"
    assert theirs["ssl_cert_reqs"].name == "CERT_REQUIRED"
    assert ours.get("ssl_ca_certs") == theirs.get("ssl_ca_certs")


def test_an_empty_url_counts_as_unset() -> None:
    assert Broker(url="").url is None


@pytest.mark.parametrize(
    ("url", "cure"),
    [
        ("localhost:6379", "begin with redis://"),
        ("h:6379:seCret", "begin with redis://"),
        ("amqp://guest:seCret@h", "needs Redis or Valkey"),
        ("sentinel://:seCret@h:26379", "does not ask Sentinel"),
        ("redis+cluster://:seCret@h", "cannot use a Redis cluster"),
        ("rediss+cluster://:seCret@h", "cannot use a Redis cluster"),
        ("redis://:seCret@a/0;redis://:seCret@b/0", "must name one server"),
        ("redis://:se;Cret@a/0", "%3B"),
        ("redis://:seCret@h/abc", "must be a number"),
        ("redis://:seCret@h/0/1", "must be a number"),
        ("redis://:seCret@h/0?db=3", "two databases"),
        ("redis://:seCret/@h/0", "%2F"),
        ("redis://:1/seCret@h/0", "%2F"),
        ("redis://:seCret?@h/0", "%3F"),
        ("redis://:1?seCret@h/0", "%3F"),
        ("redis://:1?seCret=1@h/0", "%3F"),
        ("redis://:seCret#@h/0", "%23"),
        ("redis://:[seCret@h/0", "no host and port"),
        ("redis://:seCret@h:port", "no host and port"),
        ("redis://:seCret@h/0?protocol=3", "only options"),
        ("redis://:seCret@h/0?ssl_ca_certs=ca.pem", "only options"),
        ("rediss://:seCret@h/0?ssl_cert_reqs=yes", "must be required"),
    ],
)
def test_a_url_that_cannot_be_used_is_refused_without_its_password(url: str, cure: str) -> None:
    with pytest.raises(ValidationError, match=cure) as refused:
        Broker(url=url)
    assert PASSWORD not in str(refused.value)
