"""A provider's signature is found by its whole set of parameters, and nothing else is taken."""

from __future__ import annotations

import pytest

from earmark.core import signed_urls
from earmark.core.clips import uri_key

AWS = (
    "X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=K%2F20260501&X-Amz-Date=20260501T000000Z"
    "&X-Amz-Expires=60&X-Amz-SignedHeaders=host&X-Amz-Signature=ab1"
)


@pytest.mark.parametrize(
    "signature",
    [
        AWS,
        f"{AWS}&X-Amz-Security-Token=t",
        AWS.replace("X-Amz", "X-Goog"),
        "AWSAccessKeyId=K&Signature=a%2Bb%3D&Expires=1777593600",
        "GoogleAccessId=me@x.iam&Expires=1777593600&Signature=ab",
        "Expires=1777593600&Signature=a-b_&Key-Pair-Id=K2",
        "Policy=eyJ&Signature=a-b_&Key-Pair-Id=K2",
        "sv=2024-11-04&ss=b&srt=o&sp=r&se=2026-05-02T00:00:00Z&st=2026-05-01&spr=https&sig=a%3D",
        "sv=2024-11-04&sr=b&si=readers&sig=a%3D",
    ],
)
def test_a_signature_leaves_the_key_and_other_parameters_stay(signature: str) -> None:
    plain = "https://h.org/b/a.mp3"
    assert signed_urls.without(f"{plain}?{signature}") == plain
    assert signed_urls.without(f"{plain}?part=1&{signature}&v=2#x") == f"{plain}?part=1&v=2"
    assert uri_key(f"{plain}?{signature}") == uri_key(plain)


@pytest.mark.parametrize(
    "query",
    [
        "Expires=60",
        "Signature=ab&Expires=60",
        "X-Amz-Signature=ab",
        "Key-Pair-Id=K&Signature=ab",
        "sig=ab&se=2026",
        "sv=1&se=2&sp=r",
        "design=1&signature=blue",
    ],
)
def test_a_part_of_a_signature_is_a_part_of_the_key(query: str) -> None:
    url = f"https://h.org/a.mp3?{query}"
    assert signed_urls.without(url) == url
    assert uri_key(url) != uri_key("https://h.org/a.mp3")
