"""The live page: it shows a run, and answers only those who may ask."""

from __future__ import annotations

import base64
import re
import threading
from typing import TYPE_CHECKING

import pytest
import requests
import uvicorn

from db import browse
from earmark.core.errors import UsageError
from earmark.web import page as live
from tests.earmark.conftest import Heard, Watched, serious, untouched
from tests.servers import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator

    import sqlalchemy as sa
    from playwright.sync_api import Browser, Page

    from earmark.core.settings import Settings


def serving(engine: sa.Engine, settings: Settings, token: str | None) -> Iterator[str]:
    port = free_port()
    application = live.application(engine, settings, token, "http://127.0.0.1:5555")
    server = uvicorn.Server(
        uvicorn.Config(application, port=port, log_level="error", lifespan="on")
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def url(heard: Heard) -> Iterator[str]:
    yield from serving(heard.engine, heard.settings, None)


@pytest.fixture(scope="module")
def secret_url(heard: Heard) -> Iterator[str]:
    yield from serving(heard.engine, heard.settings, "opensesame")


@pytest.fixture
def page(browser: Browser, url: str) -> Iterator[Page]:
    with browser.new_context(viewport={"width": 1280, "height": 900}) as context:
        page = context.new_page()
        watched = Watched(page, url)
        page.goto(url)
        yield page
        assert watched.wrong == []
        assert untouched(page)


def test_from_the_runs_to_a_clip_that_is_seen_and_heard(page: Page) -> None:
    assert "6 of 6 clips, 2 failed" in page.locator(".rows").inner_text()
    bar = page.locator(".rows .bar")
    assert bar.get_attribute("aria-label") == "4 done, 2 failed, 0 to do"
    assert [part.get_attribute("width") for part in bar.locator("rect").all()] == ["6", "4", "2"]
    assert re.match(r"starter, took \d+ s, begun 20", page.locator(".rows small").inner_text())
    page.locator(".rows a").click()
    page.locator("summary", has_text="mixed.m4a").click()
    card = page.locator(".card", has_text="mixed.m4a")
    assert str(card.locator(".timeline").get_attribute("aria-label")).endswith(
        "siren from 10.0 to 17.0 s"
    )
    assert str(card.locator("audio").get_attribute("src")).startswith("data:audio/ogg;base64,")
    assert card.locator(".mel").evaluate("image => image.naturalWidth") > 0
    card.get_by_role("button", name="Play mixed.m4a").click()
    assert card.locator(".play.on").count() == 1


def test_a_failure_and_a_label_lead_to_their_clips(page: Page, url: str) -> None:
    page.goto(f"{url}/runs/1")
    page.locator(".failures a", has_text="not_found").click()
    assert page.locator(".list summary b").all_inner_texts() == ["missing.wav"]
    page.locator(".bars a", has_text="siren").first.click()
    assert page.locator(".list summary b").all_inner_texts() == ["siren.wav", "mixed.m4a"]
    page.get_by_label("only uncertain").check()
    page.get_by_role("button", name="Show").click()
    assert page.locator(".list summary b").all_inner_texts() == ["mixed.m4a"]
    page.get_by_label("Search").fill("no such city")
    page.get_by_role("button", name="Show").click()
    assert "No clip fits" in page.locator(".list").inner_text()


def test_more_clips_follow_on_the_next_page(
    page: Page, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(browse, "PAGE", 4)
    page.goto(f"{url}/runs/1?text=rome")
    first = page.locator(".list summary").all_inner_texts()
    page.get_by_role("link", name="More").click()
    page.wait_for_url("**after=**")
    assert len({*first, *page.locator(".list summary").all_inner_texts()}) == 6


def test_a_list_is_sorted_narrowed_counted_and_downloaded(page: Page, url: str) -> None:
    page.goto(f"{url}/runs/1?min_score=0.9&order=score")
    assert page.locator(".list summary b").all_inner_texts() == ["siren.wav", "dog.ogg"]
    page.get_by_label("to", exact=True).fill("0.95")
    page.get_by_role("button", name="Show").click()
    page.wait_for_url("**max_score=0.95**")
    assert page.locator(".list summary b").all_inner_texts() == ["siren.wav"]
    page.get_by_text("Count by host").click()
    page.locator(".values a", has_text="Rome").click()
    page.wait_for_url("**facet=meta.city**")
    assert page.locator(".list summary b").all_inner_texts() == ["siren.wav"]
    with page.expect_download() as download:
        page.get_by_text("Download this list").click()
    lines = download.value.path().read_text().splitlines()
    assert lines[0].startswith("clip_id,uri,label,state,score,")
    assert [line.split(",")[2:4] for line in lines[1:]] == [["siren", "done"]]
    page.get_by_role("link", name="Without meta.city:Rome").click()
    page.wait_for_url(lambda url: "facet" not in url)


def test_a_facet_or_a_statement_without_clips_says_so(url: str) -> None:
    found = requests.get(f"{url}/runs/1?facet=meta.city:Oslo", timeout=9).text
    assert "No clip fits" in found
    hosts = requests.get(f"{url}/runs/1/facets?error=failed", timeout=9).text
    assert re.search(r"facet=host%3Aa.org.*</a> <span class=\"number\">2<", hosts)
    answer = requests.get(f"{url}/sql.csv?q=SELECT 1 AS one, '=x' AS two", timeout=9)
    assert answer.text == "one,two\n1,'=x\n"
    assert "attachment" in answer.headers["Content-Disposition"]
    assert requests.get(f"{url}/sql.csv?q=DELETE FROM clips", timeout=9).status_code == 404


def test_a_long_recording_is_heard_where_one_clicks(
    page: Page, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "LONG_S", 10.0)
    page.goto(f"{url}/runs/1?text=mixed")
    page.locator("#list summary").click()
    page.locator(".legend").wait_for()
    assert page.locator(".legend").inner_text().split() == ["speech", "siren"]
    assert "0:00:10 siren 7 s 0.90" in page.locator(".events").inner_text()
    page.locator(".events button", has_text="0:00:10").click()
    page.locator(".stretch .play.on").wait_for()
    assert page.locator(".stretch audio").get_attribute("data-of") == "7.020"
    assert serious(page) == []
    for at in ("nan", "1e99", "60", "x"):
        refused = requests.get(f"{url}/clips/2/stretch?at={at}", timeout=30)
        assert ("No sound here" in refused.text, refused.status_code) in ((True, 200), (False, 404))


def test_a_run_is_compared_with_another_one(page: Page, url: str) -> None:
    page.goto(f"{url}/runs/1")
    page.get_by_role("link", name="another run").click()
    page.get_by_label("The other run").fill("1")
    page.get_by_role("button", name="Compare").click()
    assert "4 clips are done in both. 100.0% have one best label." in page.inner_text("main")
    assert "No clip changed." in page.inner_text("main")
    assert serious(page) == []


def test_a_very_large_run_is_not_counted_at_each_look(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "What was heard" in requests.get(f"{url}/runs/1/charts", timeout=9).text
    monkeypatch.setattr(live, "COUNTED", 5)
    assert "counted in its report" in requests.get(f"{url}/runs/1/charts", timeout=9).text


def test_sql_reads_and_does_not_write(page: Page, url: str) -> None:
    page.goto(f"{url}/sql")
    page.get_by_label("Statement").fill("SELECT uri, meta FROM failures ORDER BY uri")
    page.get_by_role("button", name="Ask").click()
    assert "<script>window.hacked" in page.locator("td").nth(1).inner_text()
    page.get_by_label("Statement").fill("DELETE FROM clips")
    page.get_by_role("button", name="Ask").click()
    assert page.get_by_role("alert").inner_text() == "A query may only read."


@pytest.mark.parametrize(("width", "scheme"), [(1280, "dark"), (390, "light")])
def test_it_is_accessible_and_fits_a_phone(
    browser: Browser, url: str, width: int, scheme: str
) -> None:
    with browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme=scheme
    ) as context:  # type: ignore[arg-type]
        page = context.new_page()
        for path in ("/", "/runs/1", "/sql?q=SELECT * FROM results"):
            page.goto(url + path, wait_until="networkidle")
            assert serious(page) == []
            assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_only_a_name_of_this_machine_leads_to_it_and_no_other_site_may_ask(url: str) -> None:
    assert requests.get(f"{url}/sql", timeout=9).status_code == 200
    assert (
        requests.get(f"{url}/sql", headers={"Host": "rebound.example.org"}, timeout=9).status_code
        == 421
    )
    assert (
        requests.get(f"{url}/sql", headers={"Sec-Fetch-Site": "cross-site"}, timeout=9).status_code
        == 403
    )
    assert requests.post(f"{url}/sql", data={"q": "SELECT 1"}, timeout=9).status_code == 405
    policy = requests.get(url, timeout=9).headers["Content-Security-Policy"]
    assert "default-src 'none'; script-src 'self';" in policy
    assert "frame-ancestors 'none'" in policy


def test_what_is_not_there_is_said(url: str) -> None:
    for path in ("runs/99", "clips/99", "runs/1?after=x", "runs/1?min_score=x", "nothing"):
        assert requests.get(f"{url}/{path}", timeout=9).status_code == 404


def test_a_token_is_asked_for(secret_url: str) -> None:
    assert requests.get(secret_url, timeout=9).headers["WWW-Authenticate"].startswith("Basic")
    assert requests.get(secret_url, auth=("", "opensesam"), timeout=9).status_code == 401
    review = f"{secret_url}/runs/1/review"
    assert (
        requests.post(review, headers={"Origin": secret_url}, json={}, timeout=9).status_code == 401
    )
    with_password = requests.post(review, auth=("", "opensesame"), json={}, timeout=9)
    assert (with_password.status_code, with_password.text) == (
        403,
        "Another site may not write here.",
    )
    bad = {"Authorization": f"Basic {base64.b64encode(b'opensesame').decode()}"}
    assert requests.get(secret_url, headers=bad, timeout=9).status_code == 401
    for nonsense in ("Basic %", "Basic \xe9"):
        assert (
            requests.get(secret_url, headers={"Authorization": nonsense}, timeout=9).status_code
            == 401
        )
    there = requests.get(
        secret_url, auth=("me", "opensesame"), headers={"Host": "earmark.internal"}, timeout=9
    )
    assert there.status_code == 200


def test_beyond_this_machine_it_does_not_start_without_a_token(heard: Heard) -> None:
    with pytest.raises(UsageError, match="needs --token"):
        live.serve(heard.engine, heard.settings, address="0.0.0.0", port=1, token=None, flower="")
