import pytest

from earmark.core import recorded


@pytest.mark.parametrize(
    ("uri", "time"),
    [
        ("/cards/20260501_040000.wav", "2026-05-01T04:00:00"),
        ("https://host/S4A01234_20260501_040000.wav?20200101_000000", "2026-05-01T04:00:00"),
        ("20260501T040000+1000_REC.flac", "2026-04-30T18:00:00Z"),
        ("site1_2026-05-01_04-00-00.ogg", "2026-05-01T04:00:00"),
        ("20260501T040000Z.wav", "2026-05-01T04:00:00Z"),
        ("/20260501_040000/clip.wav", ""),
        ("20261332_040000.wav", ""),
        ("1202605010_4000000.wav", ""),
        ("2026-05-01.wav", ""),
        ("clip-12345678_123456.wav", ""),
    ],
)
def test_a_name_tells_when_it_was_recorded(uri, time):
    assert recorded.by_name(uri) == time


AUDIOMOTH = "Recorded at 04:00:00 01/05/2026 (UTC{}) by AudioMoth 24E144036037E1D1 at medium gain"


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ({"info.ICMT": AUDIOMOTH.format("")}, ("2026-05-01T04:00:00Z", "audiomoth")),
        ({"info.ICMT": AUDIOMOTH.format("+2")}, ("2026-05-01T02:00:00Z", "audiomoth")),
        ({"comment": AUDIOMOTH.format("-3:30")}, ("2026-05-01T07:30:00Z", "audiomoth")),
        ({"guano.Timestamp": "2026-05-01T04:00:00+02:00"}, ("2026-05-01T02:00:00Z", "guano")),
        ({"guano.Timestamp": "2026-05-01 04:00:00"}, ("2026-05-01T04:00:00", "guano")),
        ({"wamd.timestamp": "2026-05-01 04:00:00-05:00"}, ("2026-05-01T09:00:00Z", "song meter")),
        ({"bext.origination": "2026:05:01 04-00-00"}, ("2026-05-01T04:00:00", "bext")),
        ({"creation_time": "2026-05-01T04:00:00.000000Z"}, ("2026-05-01T04:00:00Z", "container")),
        ({"date": "2026"}, ("", "")),
        ({"info.ICMT": "Recorded at 99:00:00 01/05/2026 (UTC) by AudioMoth 1"}, ("", "")),
        ({}, ("", "")),
    ],
)
def test_tags_tell_when_it_was_recorded(tags, expected):
    assert recorded.by_tags(tags) == expected
