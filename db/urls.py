"""Database URLs: parsed, checked, and shown to people without their secrets."""

from __future__ import annotations

import re
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.exc import ArgumentError

from earmark.core.errors import ServiceError

SQLITE_DRIVERS = ("sqlite", "sqlite+pysqlite")
POSTGRESQL_DRIVERS = ("postgresql", "postgres", "postgresql+psycopg")
PREFIXES = {"sqlite": "sqlite:///", "postgresql": "postgresql://", "postgres": "postgresql://"}
#: SQLAlchemy hides the password of a URL's user part only, and shows every option.
SECRET_OPTIONS = ("sslpassword", "oauth_client_secret")
#: The value of an option.
VALUE = re.compile("=[^&]*")
ENCODE = (
    "This database URL cannot be read: percent-encode its user and password (@ is %40, : is %3A,"
    " / is %2F, ? is %3F, # is %23, % is %25)."
)


def parse(text: str) -> sa.URL:
    """Return a database URL with our driver, and user and password where SQLAlchemy hides them.

    Raises:
        ServiceError: the URL cannot be used. The sentence has the cure, and no secret of the URL.
    """
    _check_signs(text)
    try:
        url = sa.make_url(text)
    except ArgumentError:
        raise ServiceError(
            reason="A database URL begins with postgresql:// or sqlite:///."
        ) from None
    except ValueError:
        raise ServiceError(reason=_wrong_port(text)) from None
    if url.drivername in SQLITE_DRIVERS:
        return url
    if url.drivername not in POSTGRESQL_DRIVERS:
        raise ServiceError(reason=_wrong_driver(url))
    _check_options(url)
    return _user_in_front(url.set(drivername="postgresql+psycopg"))


def file_of(url: sa.URL) -> Path | None:
    """Return the file of a SQLite database; None of PostgreSQL."""
    return Path(str(url.database)) if url.get_backend_name() == "sqlite" else None


def shown(url: sa.URL) -> str:
    """Return a database URL for people: a file's path, or a URL without its secrets."""
    if url.get_backend_name() == "sqlite":
        return url.database or ":memory:"
    plain = url.set(drivername="postgresql").difference_update_query(SECRET_OPTIONS)
    return plain.render_as_string(hide_password=True)


def _check_signs(text: str) -> None:
    # SQLAlchemy may take a part of the password for the host, which the driver's error would print.
    before, _, options = text.partition("?")
    signs = before.count("@") + VALUE.sub("", options).count("@")
    if signs > 1 and not before.startswith("sqlite"):
        raise ServiceError(reason=ENCODE)


def _wrong_port(text: str) -> str:
    hosts = text.partition("?")[0].rpartition("@")[2]
    if "," in hosts:
        return (
            "A database URL names several hosts as options:"
            " postgresql://USER@/earmark?host=h1:5432&host=h2:5432."
        )
    return f"{ENCODE} Its port must be a number."


def _wrong_driver(url: sa.URL) -> str:
    kind = url.get_backend_name()
    prefix = PREFIXES.get(kind)
    if prefix is None:
        return f"The database must be sqlite or postgresql, not {kind}."
    return (
        f"Earmark brings its own driver: begin the database URL with {prefix}, not"
        f" {url.drivername}://."
    )


def _check_options(url: sa.URL) -> None:
    import psycopg

    for name in url.query:
        if not name.isidentifier():
            raise ServiceError(reason=ENCODE)
        try:
            psycopg.conninfo.make_conninfo("", **{name: ""})
        except psycopg.Error as error:
            raise ServiceError(
                reason=f"PostgreSQL has no option {name}, which this database URL sets."
            ) from error


def _user_in_front(url: sa.URL) -> sa.URL:
    options = url.normalized_query
    user = options.get("user", [url.username])[-1]
    password = options.get("password", [url.password])[-1]
    return url.set(username=user, password=password).difference_update_query(["user", "password"])
