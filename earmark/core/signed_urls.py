"""Signed URLs: which parameters of a URL are a provider's signature, and end with it."""

from __future__ import annotations

import re

#: Cheap, since it looks at every URL with a query.
_MAYBE_SIGNED = re.compile(
    r"[?&](?:x-amz-signature|x-goog-signature|signature|sig)=", re.IGNORECASE
)


_AZURE = "sr srt ss st spr sip si se sp sdd ses scid skoid sktid skt ske sks skv saoid suoid"
#: Ways of signing: the parameters that every signature has, and those that some have. A URL is
#: signed only if it has all of the former: an `Expires` alone may mean anything.
_SCHEMES = (
    (
        "x-amz-signature x-amz-expires",
        "x-amz-algorithm x-amz-credential x-amz-date x-amz-signedheaders x-amz-security-token",
    ),
    (
        "x-goog-signature x-goog-expires",
        "x-goog-algorithm x-goog-credential x-goog-date x-goog-signedheaders",
    ),
    ("awsaccesskeyid signature expires", "x-amz-security-token"),
    ("googleaccessid signature expires", ""),
    ("key-pair-id signature expires", "hash-algorithm"),
    ("key-pair-id signature policy", "hash-algorithm"),
    ("sig sv se sp", _AZURE),
    ("sig sv si", _AZURE),
)


def without(url: str) -> str:
    """Return a URL without its provider's signature (AWS, GCS, CloudFront, Azure SAS), if any."""
    if not _MAYBE_SIGNED.search(url):
        return url
    start, _, query = url.partition("?")
    query, _, _ = query.partition("#")
    pairs = query.split("&")
    names = {_name(pair) for pair in pairs}
    for always, sometimes in _SCHEMES:
        if names.issuperset(always.split()):
            dropped = {*always.split(), *sometimes.split()}
            kept = [pair for pair in pairs if _name(pair) not in dropped]
            return f"{start}?{'&'.join(kept)}" if kept else start
    return url


def _name(pair: str) -> str:
    return pair.partition("=")[0].lower()
