"""The documents say what the code does."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from db import brake, bulk_insert, changes, feeding, ledger, query, rescoring, schema
from db.session import connect
from docs.reference import PAGES
from earmark.cli.app import app
from earmark.core.settings import Database

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
REFERENCE = DOCS / "reference"
PAGES_OF_THE_SITE = sorted(DOCS.rglob("*.md"))
COMMAND: Any = typer.main.get_command(app)
ROOT_PAGES = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")
PROSE = [*(ROOT / name for name in ROOT_PAGES), *PAGES_OF_THE_SITE]


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
    modules = (bulk_insert, rescoring, brake, feeding, ledger, changes)
    assert drawn <= {name for module in modules for name in vars(module)}


def test_the_pictures_are_small() -> None:
    pictures = list((DOCS / "pictures").iterdir())
    assert len(pictures) >= 3
    assert all(picture.stat().st_size < 150_000 for picture in pictures)


@pytest.mark.parametrize("page", PROSE, ids=name_of)
def test_commands_in_pages_have_the_verbs_and_options_there_are(page: Path) -> None:
    for line in commands_of(page.read_text()):
        command = COMMAND
        words = shlex.split(line, comments=True)[1:]
        while words and words[0] in getattr(command, "commands", {}):
            command = command.commands[words.pop(0)]
        known = {flag for parameter in command.params for flag in flags_of(parameter)}
        used = {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)}
        assert not hasattr(command, "commands") or used <= {"--version", "--help"}, line
        assert used <= known | {"--help"}, line


def commands_of(text: str) -> list[str]:
    """Return the lines of code blocks that call `earmark`, joined where they are continued."""
    lines = []
    for block in re.findall(r"^```(?:sh|bash|)\n(.*?)^```", text, re.M | re.S):
        joined = block.replace("\\\n", " ")
        lines += re.findall(r"^(?:\$ )?(?:[A-Z_]+=\S+ )*(earmark [^\n|>&;]*)", joined, re.M)
    return lines


def flags_of(parameter: Any) -> list[str]:
    return [*parameter.opts, *parameter.secondary_opts]


def test_every_page_is_reached_from_the_index() -> None:
    waiting, seen = [DOCS / "index.md"], set()
    while waiting:
        page = waiting.pop().resolve()
        if page in seen or page.suffix != ".md" or not page.is_relative_to(DOCS):
            continue
        seen.add(page)
        targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text())
        waiting += [page.parent / target for target in targets]
    assert sorted(seen) == PAGES_OF_THE_SITE


@pytest.mark.parametrize(
    ("language", "page"), [("python", "reference/python.md"), ("sql", "guides/sql.md")]
)
def test_the_examples_of_the_readme_stand_on_pages_whose_blocks_run(
    language: str, page: str
) -> None:
    lines = []
    readme = (ROOT / "README.md").read_text()
    for block in re.findall(rf"^```{language}\n(.*?)^```", readme, re.M | re.S):
        lines += block.splitlines()
    assert lines
    assert set(lines) <= set((DOCS / page).read_text().splitlines())


def test_the_statements_in_commands_of_pages_can_be_asked(tmp_path: Path) -> None:
    statements = []
    for page in PROSE:
        statements += re.findall(r'earmark query "(SELECT [^"]+)"', page.read_text(), re.I)
    assert len(statements) > 5
    engine = connect(f"sqlite:///{tmp_path / 'empty.db'}", Database())
    schema.upgrade(engine)
    for statement in statements:
        list(query.query(engine, statement, timeout_s=5))
    engine.dispose()


@pytest.mark.parametrize("page", PROSE, ids=name_of)
def test_python_in_pages_is_python_and_imports_names_there_are(page: Path) -> None:
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith(("earmark", "db.")):
                module = importlib.import_module(str(node.module))
                assert all(hasattr(module, name.name) for name in node.names)
