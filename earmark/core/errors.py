"""Every error Earmark raises on purpose.

EarmarkError
├── UsageError                 the command was given something it cannot use (exit 2)
├── ServiceError               a service or a setting is wrong (exit 3)
│   └── DatabaseError          the database is out of reach, or not at our schema
├── MessageError               a queue message that does not parse
└── ClipError                  one clip has no result; ends as a `failed` row or is retried
    ├── DownloadError          blocked_address bad_url not_found forbidden http_error too_large
    │                          empty robots file_not_allowed file_not_found
    │   └── transient          dns connect tls timeout server_error rate_limited incomplete no_space
    ├── DecodeError            not_audio unsupported corrupt too_long too_short not_finite
    │                          decoder_crashed decoder_timeout decoder_memory
    ├── ClassifyError          model_error, transient: out_of_memory
    └── WorkerError            worker_lost, cancelled
"""

from __future__ import annotations

import re
from enum import StrEnum
from functools import partial
from typing import Any, ClassVar, dataclass_transform

#: Exit codes. 2: the command cannot use its input. 3: a service or a setting is wrong, so a restart
#: does not help. 70: the worker is broken or cut off, so a restart helps.
USAGE_EXIT, SERVICE_EXIT, BROKEN_EXIT = 2, 3, 70


@dataclass_transform(kw_only_default=True)
class EarmarkError(Exception):
    """The base of every error raised on purpose: a sentence for people, with its facts.

    A subclass declares its facts as annotated attributes. They are its keyword arguments, which
    type checkers check.
    """

    #: The text for people, with the facts in braces. `python -OO` would drop a docstring.
    sentence: ClassVar[str]

    def __init__(self, **facts: Any) -> None:
        try:
            text = self.sentence.format(**facts)
        except KeyError as missing:
            raise TypeError(f"{type(self).__name__} lacks the fact {missing}") from None
        super().__init__(text)
        self.__dict__.update(facts)
        self.facts = facts

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(type(self), **self.facts), ()


class UsageError(EarmarkError):
    sentence = "{reason}"
    reason: str


class ServiceError(EarmarkError):
    sentence = "{reason}"
    reason: str


class DatabaseError(ServiceError):
    #: The statement itself is wrong: waiting does not help.
    bug: bool = False


class MessageError(EarmarkError):
    sentence = "This queue message cannot be read: {reason}"
    reason: str


class Cause(StrEnum):
    """Where the cause of a clip's error lies, or may lie."""

    clip = "clip"
    worker = "worker"
    network = "network"


class ClipError(EarmarkError):
    """One clip has no result."""

    #: The name of the class, as `not_found` of NotFound.
    code: ClassVar[str]
    stage: ClassVar[str]
    #: If it may not be the clip's own, another worker tries the clip as well.
    cause: ClassVar[Cause] = Cause.clip
    #: Trying again later may help.
    transient: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        cls.code = re.sub(r"\B(?=[A-Z])", "_", cls.__name__).lower()


# download -----------------------------------------------------------------------------------------


class DownloadError(ClipError):
    """The clip could not be fetched."""

    stage = "download"


class BlockedAddress(DownloadError):
    cause = Cause.worker
    sentence = (
        "The URL leads to {address}, which is not a public address; EARMARK_FETCH__ALLOW_NETWORKS"
        " can allow it."
    )
    address: str


class BadUrl(DownloadError):
    sentence = "This is neither a usable URL nor a file path: {reason}."
    reason: str


class NotFound(DownloadError):
    sentence = "The server says there is nothing at this URL (HTTP {status})."
    status: int


class Forbidden(DownloadError):
    sentence = (
        "The server refuses to send this clip (HTTP {status}): a signed URL may have expired;"
        " EARMARK_FETCH__TOKENS, __BASIC_AUTH and __HEADERS log in."
    )
    status: int


class HttpError(DownloadError):
    sentence = "The server answered in a way that cannot be used: {reason}."
    reason: str


class TooLarge(DownloadError):
    sentence = "The download is larger than {max_bytes} bytes (EARMARK_FETCH__MAX_BYTES)."
    max_bytes: int


class Empty(DownloadError):
    sentence = "The clip has no bytes."


class Robots(DownloadError):
    sentence = "The site's robots.txt asks not to fetch this clip."


class FileNotAllowed(DownloadError):
    cause = Cause.worker
    sentence = (
        "The file is outside the folders that this worker may read; add {folder} to"
        " EARMARK_FETCH__FILE_ROOTS."
    )
    #: Where the file really lies, behind all links.
    folder: str


class FileNotFound(DownloadError):
    cause = Cause.worker
    sentence = "There is no readable file at this path on the worker's machine."


class Dns(DownloadError):
    cause = Cause.network
    transient = True
    sentence = "The host name {host} cannot be resolved."
    host: str


class Connect(DownloadError):
    cause = Cause.network
    transient = True
    sentence = "The server cannot be reached: {reason}."
    reason: str


class Tls(DownloadError):
    cause = Cause.network
    transient = True
    sentence = "No trusted secure connection to the server: {reason}."
    reason: str


class Timeout(DownloadError):
    transient = True
    sentence = "The download took longer than {timeout_s:g} s (EARMARK_FETCH__TIMEOUT_S)."
    timeout_s: float


class ServerError(DownloadError):
    transient = True
    sentence = "The server failed (HTTP {status})."
    status: int
    #: Seconds the server asks us to wait.
    retry_after_s: float | None = None


class RateLimited(DownloadError):
    transient = True
    sentence = "The server asks us to slow down (HTTP 429)."
    #: Seconds the server asks us to wait.
    retry_after_s: float | None = None


class Incomplete(DownloadError):
    transient = True
    sentence = "The download ended early: {received} of {declared} bytes came."
    received: int
    declared: str


class NoSpace(DownloadError):
    cause = Cause.worker
    transient = True
    sentence = "The worker's disk is full."


# decode -------------------------------------------------------------------------------------------


class DecodeError(ClipError):
    """The clip's bytes gave no waveform."""

    stage = "decode"


class NotAudio(DecodeError):
    sentence = "The file is not audio: it looks like {kind}."
    kind: str


class Unsupported(DecodeError):
    sentence = "The audio format is not supported: {reason}."
    reason: str


class Corrupt(DecodeError):
    sentence = "The audio is damaged: {reason}."
    reason: str


class TooLong(DecodeError):
    sentence = "The audio is longer than {max_duration_s:g} s ({setting})."
    max_duration_s: float
    setting: str


class TooShort(DecodeError):
    sentence = "The audio is shorter than {min_duration_s:g} s ({setting})."
    min_duration_s: float
    setting: str


class NotFinite(DecodeError):
    sentence = "The audio holds samples that are not sound: {reason}."
    reason: str


class DecoderCrashed(DecodeError):
    sentence = "The audio decoder crashed on this file."


class DecoderTimeout(DecodeError):
    sentence = (
        "The audio decoder did not finish within {timeout_s:g} s (EARMARK_AUDIO__DECODE_TIMEOUT_S)."
    )
    timeout_s: float


class DecoderMemory(DecodeError):
    sentence = (
        "The audio decoder needs more memory for this file than EARMARK_AUDIO__DECODE_MEMORY."
    )


# classify -----------------------------------------------------------------------------------------


class ClassifyError(ClipError):
    """The model gave no scores."""

    stage = "classify"


class OutOfMemory(ClassifyError):
    cause = Cause.worker
    transient = True
    sentence = "The device has not enough memory for a single window."


class ModelError(ClassifyError):
    cause = Cause.worker
    sentence = "The model failed on this clip: {reason}."
    reason: str


# worker -------------------------------------------------------------------------------------------


class WorkerError(ClipError):
    """The worker could not finish the clip."""

    stage = "worker"


class WorkerLost(WorkerError):
    sentence = (
        "The worker process died each time it worked on this clip, in the end on this clip alone."
    )


class Cancelled(WorkerError):
    sentence = "The run was cancelled before this clip came to its end."


def _leaves(kind: type[ClipError]) -> list[type[ClipError]]:
    children = kind.__subclasses__()
    if not children:
        return [kind]
    leaves = []
    for child in children:
        leaves += _leaves(child)
    return leaves


#: The closed list that `failures` groups by.
BY_CODE: dict[str, type[ClipError]] = {kind.code: kind for kind in _leaves(ClipError)}


def as_recorded(code: str, text: str) -> ClipError:
    """Return an error that a clip ended with, to end another one with it for good."""
    kind = BY_CODE[code]
    error = kind.__new__(kind, text)
    error.__dict__.update(facts={}, transient=False, cause=Cause.clip)
    return error
