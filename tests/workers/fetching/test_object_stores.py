"""Object stores: read only where enabled, with the same caps as everything else."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import fsspec
import pytest

from earmark.core import errors
from earmark.core.settings import Fetch
from workers.fetching.fetch import Fetcher

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def bucket() -> Iterator[None]:
    store: Any = fsspec.filesystem("memory")
    store.pipe("/bucket/clip.wav", b"sound" * 1000)
    yield
    store.rm("/bucket", recursive=True)


def fetch(uri: str, **limits: Any) -> bytes:
    fetched = Fetcher(Fetch(**limits)).fetch(uri)
    with fetched.file as file:
        return file.read()


def test_an_enabled_store_is_read() -> None:
    assert fetch("memory://bucket/clip.wav", stores=("memory",)) == b"sound" * 1000


def test_a_url_of_a_disabled_store_is_a_bad_url() -> None:
    with pytest.raises(errors.BadUrl):
        fetch("memory://bucket/clip.wav")


def test_a_large_and_a_missing_object_of_a_store_are_refused() -> None:
    with pytest.raises(errors.TooLarge):
        fetch("memory://bucket/clip.wav", stores=("memory",), max_bytes=100)
    with pytest.raises(errors.NotFound):
        fetch("memory://bucket/gone.wav", stores=("memory",))


def test_a_store_without_its_package_names_the_package() -> None:
    with pytest.raises(errors.BadUrl, match=r"earmark\[stores\]"):
        fetch("gs://bucket/clip.wav", stores=("gs",))


def test_a_slow_store_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 100.0, 200.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    with pytest.raises(errors.Timeout):
        fetch("memory://bucket/clip.wav", stores=("memory",))
