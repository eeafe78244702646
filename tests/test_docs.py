"""The documents say what the code does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from db import feeding, ledger
from docs.reference import PAGES

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
REFERENCE = DOCS / "reference"
PAGES_OF_THE_SITE = sorted(DOCS.rglob("*.md"))
PROSE = [ROOT / "README.md", ROOT / "CHANGELOG.md", *PAGES_OF_THE_SITE]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("name", PAGES)
def test_a_made_page_is_up_to_date(name: str) -> None:
    assert (REFERENCE / name).read_text() == PAGES[name](), "run `python -m docs.reference`"


@pytest.mark.parametrize("page", PROSE, ids=name_of)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PROSE, ids=name_of)
def test_links_to_headings_lead_somewhere(page: Path) -> None:
    for target, heading in re.findall(r"\]\((?!https?:)([^)#]*)#([^)]+)\)", page.read_text()):
        text = (page.parent / target if target else page).read_text()
        assert heading in [anchor(line) for line in re.findall(r"^#+ (.+)$", text, re.M)], target


def anchor(heading: str) -> str:
    """Return the anchor that GitHub and MkDocs give a heading."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def test_the_readme_gives_both_commands_that_set_everything_up() -> None:
    assert re.findall(r"^make \w+$", (ROOT / "README.md").read_text(), re.M)[:2] == [
        "make demo",
        "make test",
    ]


def test_the_site_has_every_page() -> None:
    listed = re.findall(r": ([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M)
    assert sorted(listed) == [page.relative_to(DOCS).as_posix() for page in PAGES_OF_THE_SITE]


def test_the_architecture_page_lists_the_modules_there_are() -> None:
    page = (DOCS / "understanding" / "architecture.md").read_text()
    listed = re.findall(r"^\| `([\w/]+\.py)` \|", page, re.M)
    modules = []
    for folder in ("earmark", "workers", "producer", "db"):
        for module in (ROOT / folder).rglob("*.py"):
            path = module.relative_to(ROOT / folder).as_posix().removeprefix("core/")
            if not module.name.startswith("_") and not path.startswith("migrations/"):
                modules.append(path)
    assert sorted(listed) == sorted(modules)


def test_each_move_of_a_clip_names_a_function_that_exists() -> None:
    page = (DOCS / "understanding" / "architecture.md").read_text()
    diagram = page.partition("stateDiagram-v2")[2].partition("```")[0]
    drawn = set()
    for functions in re.findall(r": (.+)$", diagram, re.M):
        drawn.update(functions.split(", "))
    listed = set(re.findall(r"^\|[^|]*\|[^|]*\| `(\w+)` \|", page, re.M))
    assert drawn == listed
    assert all(hasattr(ledger, name) or hasattr(feeding, name) for name in drawn)


def test_the_pictures_are_small() -> None:
    pictures = list((DOCS / "pictures").iterdir())
    assert len(pictures) >= 3
    assert all(picture.stat().st_size < 150_000 for picture in pictures)
