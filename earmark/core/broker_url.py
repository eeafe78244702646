"""The broker's URL: checked, and written so that kombu and redis-py read it alike."""

from __future__ import annotations

from urllib.parse import SplitResult, parse_qsl, urlencode, urlsplit

SOCKET = "redis+socket"
#: The schemes of a URL, with their names in both libraries.
SCHEMES = {
    "redis": "redis",
    "rediss": "rediss",
    "valkey": "redis",
    "valkeys": "rediss",
    SOCKET: SOCKET,
}
TLS_OPTIONS = ("ssl_cert_reqs", "ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_check_hostname")
#: Celery's documentation writes them in capitals, which redis-py does not know.
CERT_REQS = {"CERT_REQUIRED": "required", "CERT_OPTIONAL": "optional", "CERT_NONE": "none"}

_FORM = (
    "write redis://USER:PASSWORD@host:6379/0, with @ : / ? # % in a password as"
    " %40 %3A %2F %3F %23 %25"
)


def usable(url: str) -> str:
    """Return a Redis URL in the one form that both libraries read alike.

    Raises:
        ValueError: it cannot be used. The sentence names the cure, and no part of the URL: it may
            hold a password.
    """
    scheme = _scheme(url)
    if scheme == SOCKET:
        return url
    parts, options = _split(url)
    database = _database(parts, options)
    _check_options(scheme, options)
    if scheme == "rediss":
        # Without this option kombu does not check the server's certificate.
        wanted = options.get("ssl_cert_reqs", "required")
        options["ssl_cert_reqs"] = CERT_REQS.get(wanted, wanted)
    query = urlencode(options, safe="/")
    return SplitResult(scheme, parts.netloc, f"/{database}", query, "").geturl()


def for_redis_py(url: str) -> str:
    """Return a usable URL in the form of redis-py, which differs for a socket."""
    return url.replace(f"{SOCKET}://", "unix://").replace("virtual_host=", "db=")


def _scheme(url: str) -> str:
    scheme, separator, _ = url.partition("://")
    if not separator:
        raise ValueError("it must begin with redis://, as in redis://localhost:6379/0")
    if "cluster" in scheme:
        raise ValueError("Celery cannot use a Redis cluster; use a Redis with cluster mode off")
    if "sentinel" in scheme:
        raise ValueError("Earmark does not ask Sentinel; use an address that follows the primary")
    if scheme not in SCHEMES:
        raise ValueError(
            "the queue needs Redis or Valkey; begin it with redis://, or with rediss:// for TLS"
        )
    if ";" in url:
        raise ValueError("it must name one server; a ; in a password is written as %3B")
    return SCHEMES[scheme]


def _split(url: str) -> tuple[SplitResult, dict[str, str]]:
    try:
        parts = urlsplit(url)
        complete = parts.hostname and (parts.port is None or parts.port > 0) and not parts.fragment
    except ValueError:
        complete = False
    if not complete:
        raise ValueError(f"it has no host and port that can be read; {_FORM}")
    return parts, dict(parse_qsl(parts.query, keep_blank_values=True))


def _database(parts: SplitResult, options: dict[str, str]) -> int:
    path, option = parts.path.removeprefix("/"), options.pop("db", "")
    if path and option and path != option:
        raise ValueError("it names two databases, at its end and as ?db=; leave one out")
    number = path or option or "0"
    if not (number.isascii() and number.isdecimal()):
        raise ValueError(f"its database must be a number; {_FORM}")
    return int(number)


def _check_options(scheme: str, options: dict[str, str]) -> None:
    allowed = TLS_OPTIONS if scheme == "rediss" else ()
    if any(option not in allowed for option in options):
        raise ValueError(
            f"the only options after its ? are db and, with rediss://, {', '.join(TLS_OPTIONS)}"
        )
    wanted = options.get("ssl_cert_reqs", "required")
    if wanted not in CERT_REQS and wanted not in CERT_REQS.values():
        raise ValueError("ssl_cert_reqs must be required, optional or none")
