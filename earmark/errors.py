"""Every error Earmark raises on purpose.

EarmarkError
├── UsageError                 the command was given something it cannot use (exit 2)
├── ServiceError               a service or a setting is wrong (exit 3)
│   └── DatabaseError          the database is out of reach, or not at our schema
├── MessageError               a queue message that does not parse
└── ClipError                  one clip has no result; ends as a `failed` row or is retried
    ├── DownloadError          blocked_address bad_url not_found forbidden http_error too_large empty robots
    │                          file_not_allowed file_not_found
    │   └── transient          dns connect tls timeout server_error rate_limited incomplete no_space
    ├── DecodeError            not_audio unsupported corrupt too_long too_short not_finite
    │                          decoder_crashed decoder_timeout decoder_memory
    ├── ClassifyError          model_error, transient: out_of_memory
    └── WorkerError            worker_lost, cancelled

A class's docstring is the sentence a person reads; the facts it names are keyword arguments and attributes.
"""

from __future__ import annotations

from typing import Any, ClassVar

#: What a process exits with: given something it cannot use; a service or a setting is wrong, so that starting it again
#: would not help; unsound or cut off, so that starting it again would.
USAGE_EXIT, SERVICE_EXIT, BROKEN_EXIT = 2, 3, 70


class EarmarkError(Exception):
    """Something went wrong in Earmark."""

    def __init__(self, **facts: Any) -> None:
        self.facts = facts
        super().__init__((self.__doc__ or type(self).__name__).format(**facts))

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["facts"][name]
        except KeyError:
            raise AttributeError(name) from None

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.facts)


def _rebuild(kind: type[EarmarkError], facts: dict[str, Any]) -> EarmarkError:
    return kind(**facts)


class UsageError(EarmarkError):
    """{reason}"""


class ServiceError(EarmarkError):
    """{reason}"""


class DatabaseError(ServiceError):
    """{reason}"""


class MessageError(EarmarkError):
    """This queue message cannot be read: {reason}"""


class ClipError(EarmarkError):
    """One clip has no result."""

    code: ClassVar[str]
    stage: ClassVar[str]
    #: Trying again later may help.
    transient: ClassVar[bool] = False


# download ------------------------------------------------------------------------------------------------------------


class DownloadError(ClipError):
    """The clip could not be fetched."""

    stage = "download"


class BlockedAddress(DownloadError):
    """The URL leads to {address}, which is not a public address; EARMARK_FETCH__ALLOW_NETWORKS can allow it."""

    code = "blocked_address"


class BadUrl(DownloadError):
    """This is neither a usable URL nor a file path: {reason}."""

    code = "bad_url"


class NotFound(DownloadError):
    """The server says there is nothing at this URL (HTTP {status})."""

    code = "not_found"


class Forbidden(DownloadError):
    """The server refuses to give this clip to us (HTTP {status})."""

    code = "forbidden"


class HttpError(DownloadError):
    """The server answered in a way that cannot be used: {reason}."""

    code = "http_error"


class TooLarge(DownloadError):
    """The clip is larger than {max_bytes} bytes (EARMARK_FETCH__MAX_BYTES)."""

    code = "too_large"


class Empty(DownloadError):
    """The clip has no bytes."""

    code = "empty"


class Robots(DownloadError):
    """The site's robots.txt asks not to fetch this clip."""

    code = "robots"


class FileNotAllowed(DownloadError):
    """The path is outside the folders this worker may read (EARMARK_FETCH__FILE_ROOTS)."""

    code = "file_not_allowed"


class FileNotFound(DownloadError):
    """There is no readable file at this path on the worker's machine."""

    code = "file_not_found"


class Dns(DownloadError):
    """The host name {host} cannot be resolved."""

    code = "dns"
    transient = True


class Connect(DownloadError):
    """The server cannot be reached: {reason}."""

    code = "connect"
    transient = True


class Tls(DownloadError):
    """No trusted secure connection to the server: {reason}."""

    code = "tls"
    transient = True


class Timeout(DownloadError):
    """The download took longer than {timeout_s:g} s (EARMARK_FETCH__TIMEOUT_S)."""

    code = "timeout"
    transient = True


class ServerFailed(DownloadError):
    """The server failed (HTTP {status})."""

    code = "server_error"
    transient = True


class RateLimited(DownloadError):
    """The server asks us to slow down (HTTP 429)."""

    code = "rate_limited"
    transient = True


class Incomplete(DownloadError):
    """The download ended early: {received} of {declared} bytes came."""

    code = "incomplete"
    transient = True


class NoSpace(DownloadError):
    """The worker's disk is full."""

    code = "no_space"
    transient = True


# decode --------------------------------------------------------------------------------------------------------------


class DecodeError(ClipError):
    """The clip's bytes gave no waveform."""

    stage = "decode"


class NotAudio(DecodeError):
    """The file is not audio: it looks like {kind}."""

    code = "not_audio"


class Unsupported(DecodeError):
    """The audio format is not supported: {reason}."""

    code = "unsupported"


class Corrupt(DecodeError):
    """The audio is damaged: {reason}."""

    code = "corrupt"


class TooLong(DecodeError):
    """The audio is longer than {max_duration_s:g} s ({setting})."""

    code = "too_long"


class TooShort(DecodeError):
    """The audio is shorter than {min_duration_s:g} s."""

    code = "too_short"


class NotFinite(DecodeError):
    """The audio holds samples that are not sound: {reason}."""

    code = "not_finite"


class DecoderCrashed(DecodeError):
    """The audio decoder crashed on this file."""

    code = "decoder_crashed"


class DecoderTimeout(DecodeError):
    """The audio decoder did not finish within {timeout_s:g} s."""

    code = "decoder_timeout"


class DecoderMemory(DecodeError):
    """The audio decoder ran out of its memory limit on this file."""

    code = "decoder_memory"


# classify ------------------------------------------------------------------------------------------------------------


class ClassifyError(ClipError):
    """The model gave no scores."""

    stage = "classify"


class OutOfMemory(ClassifyError):
    """The device has not enough memory for a single window."""

    code = "out_of_memory"
    transient = True


class ModelError(ClassifyError):
    """The model failed on this clip: {reason}."""

    code = "model_error"


# worker --------------------------------------------------------------------------------------------------------------


class WorkerError(ClipError):
    """The worker could not finish the clip."""

    stage = "worker"


class WorkerLost(WorkerError):
    """The worker process died each time it worked on this clip, in the end on this clip alone."""

    code = "worker_lost"


class Cancelled(WorkerError):
    """The run was cancelled before this clip came to its end."""

    code = "cancelled"


def _leaves(kind: type[ClipError]) -> list[type[ClipError]]:
    children = kind.__subclasses__()
    return [leaf for child in children for leaf in _leaves(child)] if children else [kind]


#: The closed list that `failures` groups by.
BY_CODE: dict[str, type[ClipError]] = {kind.code: kind for kind in _leaves(ClipError)}
