"""The report in a browser: clips to filter and play; it runs and loads nothing foreign."""

from __future__ import annotations

from base64 import b64decode
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from earmark import sound
from earmark.core.errors import FileNotAllowed, NotAudio
from earmark.core.settings import Database, Settings
from earmark.demo import EXAMPLES
from earmark.web import report
from tests.earmark.conftest import Heard, Watched, serious, untouched
from tests.end_to_end.conftest import Earmark

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from playwright.sync_api import Browser, Page

    from tests.faults.nursery import Nursery


@pytest.fixture(scope="module")
def file(heard: Heard, nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    written = Earmark({}, folder, nursery)(
        "report", "1", "-o", "report.html", "--db", heard.settings.database_url
    )
    assert written.stderr == "report.html: 6 clips to see and hear.\n"
    return folder / "report.html"


def test_each_channel_has_a_timeline_of_its_own() -> None:
    windows = [(1, 0.0, 2.0, "dog", 0.9), (1, 2.0, 4.0, "dog", 0.8), (2, 0.0, 4.0, "siren", 0.7)]
    card = report.Card({"windows": windows, "start_s": None, "duration_s": 4.0}, None, "")
    assert card.timelines == [
        (1, [(0.0, 4.0, "dog", 0.9)]),
        (2, [(0.0, 4.0, "siren", 0.7)]),
    ]
    parts: Any = report._environment.get_template("parts.html").module
    shown = parts.timelines(card, report.colours([card]))
    assert "Heard on channel 2: siren from 0.0 to 4.0 s" in shown
    assert shown.index("channel 1") < shown.index("dog") < shown.index("channel 2")


@pytest.fixture
def page(browser: Browser, file: Path) -> Iterator[Page]:
    with browser.new_context(viewport={"width": 1280, "height": 900}) as context:
        page = context.new_page()
        watched = Watched(page, file.as_uri())
        page.goto(file.as_uri())
        yield page
        assert watched.wrong == []
        assert untouched(page)


def shown(page: Page) -> list[str]:
    names = page.locator(".card:visible h3").all_inner_texts()
    return [name if len(name) < 20 else "hostile" for name in names]


def test_each_clip_has_a_card_and_they_can_be_searched_filtered_and_sorted(page: Page) -> None:
    assert shown(page) == [
        "dog.ogg",
        "mixed.m4a",
        "siren.wav",
        "hostile",
        "missing.wav",
        "page.wav",
    ]
    page.get_by_label("Search").fill("MIXED")
    assert shown(page) == ["mixed.m4a"]
    page.get_by_label("Search").fill("")
    page.locator("select[name=label]").select_option("siren")
    page.locator("select[name=sort]").select_option("surest first")
    assert shown(page) == ["siren.wav", "mixed.m4a"]
    page.get_by_label("only uncertain").check()
    assert shown(page) == ["mixed.m4a"]
    assert page.locator("output").inner_text() == "1 of 6 clips"
    page.get_by_label("only uncertain").uncheck()
    page.locator("select[name=label]").select_option("all")
    page.locator("select[name=state]").select_option("failed")
    assert shown(page) == ["missing.wav", "page.wav"]


def test_a_clip_can_be_played_and_its_sound_is_in_the_page(page: Page) -> None:
    page.get_by_role("button", name="Play dog.ogg").click()
    audio = page.locator(".card", has_text="dog.ogg").first.locator("audio")
    assert str(audio.get_attribute("src")).startswith("data:audio/ogg;base64,")
    sounding = """audio => new Promise(heard => {
        audio.ontimeupdate = () => audio.currentTime && heard(audio.duration)
    })"""
    assert audio.evaluate(sounding) == pytest.approx(5, abs=0.1)
    assert page.locator(".mel").first.evaluate("image => image.naturalWidth") == sound.COLUMNS


def test_the_mixed_clip_shows_two_labels_at_two_times(page: Page) -> None:
    timeline = page.locator(".card", has_text="mixed.m4a").locator(".timeline")
    assert (
        timeline.get_attribute("aria-label")
        == "Heard: speech from 0.0 to 10.0 s, siren from 10.0 to 17.0 s"
    )
    speech, siren = (
        timeline.locator("text", has_text=label).bounding_box() for label in ("speech", "siren")
    )
    assert speech is not None
    assert siren is not None
    assert siren["x"] > speech["x"] + 100


def test_what_cannot_be_had_any_more_has_its_card_with_the_reason(page: Page) -> None:
    gone = page.locator(".card", has_text="No sound here")
    assert "gone.invalid" in gone.inner_text()
    assert gone.locator("audio").count() == 0
    assert "SECRET" not in page.content()
    assert (
        "nothing at this URL (HTTP 404)"
        in page.locator(".card", has_text="missing.wav").inner_text()
    )


def test_a_smaller_page_says_what_it_leaves_out(heard: Heard, tmp_path: Path) -> None:
    assert report.write(*heard, tmp_path / "few.html", most=0) == 0
    assert (
        "0 of 6 clips, spread evenly over the list; the other 6 are left out"
        in (tmp_path / "few.html").read_text()
    )


def test_words_from_outside_are_shown_as_text(page: Page) -> None:
    page.locator("summary").first.click()
    assert "<script>window.hacked" in page.locator(".facts").first.inner_text()
    assert "<script>window.hacked" in page.locator("h1").inner_text()


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_it_is_accessible_and_fits_a_phone(
    browser: Browser, file: Path, width: int, scheme: str
) -> None:
    with browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme=scheme
    ) as context:  # type: ignore[arg-type]
        page = context.new_page()
        page.goto(file.as_uri())
        assert serious(page) == []
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        number = page.locator(".bars .number").first
        number.evaluate("cell => { cell.textContent = '1,234,567'; }")
        words = number.evaluate(
            "cell => { const all = document.createRange(); all.selectNodeContents(cell);"
            " return all.getBoundingClientRect().left; }"
        )
        bar = page.locator(".bars .bar").first.bounding_box()
        assert bar is not None
        assert words - bar["x"] - bar["width"] >= 8  # a large number keeps its distance


def test_a_shared_ledger_cannot_name_a_file_of_the_machine_that_shows_it() -> None:
    shared = Settings(database=Database(url="postgresql://shared/earmark"))
    with sound.Listener(shared) as listener, pytest.raises(FileNotAllowed):
        listener.hear(str(EXAMPLES / "dog.ogg"), most_s=1, most_bytes=10_000)


def test_a_page_gives_the_bytes_of_no_file_away(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("-----BEGIN OPENSSH PRIVATE KEY-----")
    (tmp_path / "song.wav").symlink_to("key")
    (tmp_path / "dog.ogg").symlink_to(EXAMPLES / "dog.ogg")
    with sound.Listener(Settings()) as listener:
        with pytest.raises(NotAudio):
            listener.hear(str(tmp_path / "song.wav"), most_s=1, most_bytes=10_000)
        shown = listener.hear(str(tmp_path / "dog.ogg"), most_s=1, most_bytes=10_000)
    _, data = shown.sound.split("base64,")
    assert b64decode(data)[:64] not in (EXAMPLES / "dog.ogg").read_bytes()


def test_200_clips_of_noise_fit_in_five_megabytes(file: Path) -> None:
    noise = np.random.default_rng(1).uniform(-1, 1, 60 * sound.RATE).astype(np.float32)
    one = sound.heard(noise, report.LONGEST_SOUND_S, report.sound_bytes(report.MOST_CLIPS))
    assert 3 < one.sound_s < 10
    assert report.MOST_CLIPS * (len(one.sound) + report.BESIDE_SOUND) < 5_000_000


def test_a_card_without_its_sound_is_as_small_as_planned(page: Page) -> None:
    sizes = page.evaluate(
        "cards.map(card => card.outerHTML.length - (card.querySelector('audio')?.src.length ?? 0))"
    )
    assert 1000 < max(sizes) < report.BESIDE_SOUND


def test_a_loud_tone_is_bright_at_its_pitch_and_silence_is_dark() -> None:
    seconds = np.arange(2 * sound.RATE) / sound.RATE
    level = sound.mel_db(np.sin(2 * np.pi * 1000 * seconds).astype(np.float32))
    assert level.shape == (sound.MELS, sound.COLUMNS)
    # 1000 Hz is at 1000 mel of 2840.
    assert abs(level[:, 100].argmax() - sound.MELS * 1000 / 2840) < 2
    assert sound.mel_db(np.zeros(800, np.float32)).max() <= sound.FLOOR_DB
