"""A stretch of a long recording on a server: only what is needed of it is fetched."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import soundfile
from werkzeug import Request, Response

from earmark.core import errors
from earmark.core.settings import Settings
from earmark.sound import Listener
from tests.containers import Served

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from pytest_httpserver import HTTPServer

RATE, MINUTES = 16_000, 20


@pytest.fixture(scope="module", params=["flac", "wav"])
def recording(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("long") / f"long.{request.param}"
    minute = np.random.default_rng(1).integers(-9000, 9000, (RATE * 60, 2), np.int16)
    with soundfile.SoundFile(path, "w", RATE, 2, subtype="PCM_16") as file:
        for number in range(MINUTES):
            file.write(minute // (number + 1))
    return path


@pytest.fixture
def listener(httpserver: HTTPServer) -> Iterator[Listener]:
    settings = Settings()
    fetch = {"allow_networks": "127.0.0.0/8,::1", "ports": (httpserver.port, 80)}
    with Listener(settings.changed(fetch=fetch)) as ready:
        yield ready


def samples_of(listener: Listener, url: str, start_s: float) -> np.ndarray:
    pieces = list(listener.open(url).stretch(start_s, start_s + 3))
    return np.concatenate([piece.samples for piece in pieces]).reshape(-1, 2)


def expected(path: Path, start_s: float) -> np.ndarray:
    return soundfile.read(path, RATE * 3, int(start_s * RATE), dtype="float32")[0]


def test_a_stretch_is_the_same_and_a_small_part_is_sent(
    listener: Listener, recording: Path, httpserver: HTTPServer
) -> None:
    served = Served(httpserver, recording)
    for start_s in (0.0, 1000.25, MINUTES * 60 - 3):
        served.sent = 0
        found = samples_of(listener, served.url, start_s)
        np.testing.assert_array_equal(found, expected(recording, start_s))
        assert served.sent < 0.2 * served.size


def test_a_server_without_ranges_is_asked_for_all_of_it_once(
    listener: Listener, recording: Path, httpserver: HTTPServer
) -> None:
    served = Served(httpserver, recording, ranges=False)
    for _ in range(2):
        heard = listener.hear_stretch(served.url, None, 1000, most_s=1, most_bytes=9999)
        assert heard.duration_s == pytest.approx(1, abs=0.01)
    assert served.requests[1:] == [""]


def test_sound_that_the_header_does_not_tell_of_is_heard_too(
    listener: Listener, tmp_path: Path, httpserver: HTTPServer
) -> None:
    path = tmp_path / "lost-power.wav"
    noise = np.random.default_rng(1).integers(-9000, 9000, (RATE * 120, 2), np.int16)
    soundfile.write(path, noise, RATE)
    content = bytearray(path.read_bytes())
    content[40:44] = bytes(4)
    path.write_bytes(content)
    found = samples_of(listener, Served(httpserver, path).url, 60)
    np.testing.assert_array_equal(found, noise[RATE * 60 : RATE * 63].astype(np.float32) / 2**15)


@pytest.mark.parametrize("change", ["another", "short", "gone", "redirect"])
def test_a_file_that_changes_on_the_way_is_told(
    listener: Listener, recording: Path, httpserver: HTTPServer, change: str
) -> None:
    content, asked = recording.read_bytes(), []

    def answer(request: Request) -> Response:
        asked.append(request.headers["Range"])
        first, last = map(int, asked[-1].removeprefix("bytes=").split("-"))
        place = {"Content-Range": f"bytes {first}-{last}/{len(content)}", "ETag": "one"}
        part = content[first : last + 1]
        if len(asked) < 4:
            return Response(part, 206, place)
        answers: dict[str, Any] = {
            "another": Response(part, 206, {**place, "ETag": "two"}),
            "short": Response(part[1:], 206, place),
            "gone": Response("", 404),
            "redirect": Response("", 302, {"Location": "http://169.254.169.254/"}),
        }
        return answers[change]

    httpserver.expect_request("/changing").respond_with_handler(answer)
    told = (errors.HttpError, errors.Incomplete, errors.NotFound, errors.BadUrl)
    with pytest.raises((*told, errors.BlockedAddress)):
        samples_of(listener, httpserver.url_for("/changing"), 1000)
    assert len(asked) == 4
