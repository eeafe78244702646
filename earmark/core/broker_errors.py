"""An error of the broker in, one sentence with its cure out."""

from __future__ import annotations

import ssl
from collections.abc import Iterator

from redis import exceptions

_CLUSTER = (
    exceptions.ClusterCrossSlotError,
    exceptions.AskError,  # and MovedError
    exceptions.ClusterError,
    exceptions.TryAgainError,
)
_RULES = "Give it the rules of docs/guides/operators.md"
_START = (
    "Start Redis, or set EARMARK_BROKER__URL to where it is; `earmark run` and `earmark up` bring"
    " their own."
)


def sentence(error: Exception, *, tls: bool) -> str:
    """Return what is wrong with the broker, and the cure."""
    refusal = _refusal(error)
    if refusal:
        return refusal
    for cause in _causes(error):
        fault = _connection_fault(cause, tls=tls)
        if fault:
            return fault
    hint = ""
    if tls and isinstance(error, exceptions.TimeoutError):
        hint = " If its port speaks no TLS, the URL begins with redis://."
    return f"The broker does not answer ({error}). {_START}{hint}"


def is_permanent(error: BaseException | None) -> bool:
    """Return whether Redis answers, but refuses what Celery needs until somebody changes it."""
    if isinstance(error, (*_CLUSTER, exceptions.NoPermissionError)):
        return True
    return "cluster mode" in str(error)


def _refusal(error: Exception) -> str | None:
    text = str(error)
    match error:
        case exceptions.AuthenticationError() if "HELLO" in text or "required" in text:
            cure = "set EARMARK_BROKER__URL to redis://USER:PASSWORD@host:6379/0"
            return f"Redis wants a password: {cure}."
        case exceptions.AuthenticationError():
            cure = "correct them in EARMARK_BROKER__URL, a password percent-encoded"
            return f"Redis refuses the user or the password ({text.rstrip('.')}): {cure}."
        case exceptions.NoPermissionError() if "channel" in text:
            refused = f"The Redis user may not subscribe to Celery's channels ({text})"
            return f"{refused}. {_RULES}: &* allows all channels."
        case exceptions.NoPermissionError():
            return f"The Redis user may not do what Earmark needs ({text}). {_RULES}."
        case exceptions.ReadOnlyError():
            return "This Redis is a read-only replica: set EARMARK_BROKER__URL to its primary."
        case exceptions.OutOfMemoryError():
            cure = "raise its maxmemory, or give Earmark a Redis of its own"
            return f"Redis is full ({text}): {cure}."
        case _ if is_permanent(error):
            cure = "use a Redis with cluster mode off"
            return f"This Redis is a cluster, which Celery cannot use: {cure}."
        case exceptions.ResponseError() if "DB index" in text:
            cure = "correct the end of EARMARK_BROKER__URL"
            return f"This Redis has no database of that number: {cure}."
        case _:
            return None


def _connection_fault(cause: BaseException, *, tls: bool) -> str | None:
    match cause:
        case ssl.SSLCertVerificationError():
            problem = cause.verify_message.rstrip(".")
            return (
                f"The certificate of Redis is not trusted ({problem}): set ssl_ca_certs in"
                " EARMARK_BROKER__URL to its authority's certificate, and use a name that it has."
            )
        case FileNotFoundError() | PermissionError() if tls:
            cure = "correct its path or its mode"
            return f"A certificate file named in EARMARK_BROKER__URL cannot be read: {cure}."
        case _ if tls and _is_hang_up(cause):
            return (
                f"Redis ends the TLS connection ({cause}): if it asks for a client's certificate,"
                " set ssl_certfile and ssl_keyfile in EARMARK_BROKER__URL; if its port speaks no"
                " TLS, use redis://."
            )
        case _ if _is_hang_up(cause):
            cure = "if its port wants TLS, EARMARK_BROKER__URL is rediss://"
            return f"Redis ends the connection ({cause}): {cure}."
        case _:
            return None


def _is_hang_up(cause: BaseException) -> bool:
    ended = isinstance(cause, (ssl.SSLError, ConnectionResetError, BrokenPipeError))
    return ended or "closed by server" in str(cause)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
