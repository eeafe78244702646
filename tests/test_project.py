"""What people need who join the project or release it: workflows, versions, notes."""

from __future__ import annotations

import json
import re
import runpy
import tomllib
from importlib.resources import files
from pathlib import Path

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).parents[1]
CHANGELOG = """# Changelog

## 0.3.0 (unreleased)
- Not yet.

## [0.2.0] - 2026-12-01
Upgrade first.

### Added
- Much.

## [0.1.0]
- The first.
"""


@pytest.mark.parametrize(
    ("schema", "file"),
    [
        ("github-workflows", "workflows/ci.yml"),
        ("github-workflows", "workflows/release.yml"),
        ("dependabot", "dependabot.yml"),
        ("github-issue-forms", "ISSUE_TEMPLATE/bug.yml"),
    ],
)
def test_the_forge_understands_its_files(schema: str, file: str) -> None:
    vendored = files("check_jsonschema").joinpath(f"builtin_schemas/vendor/{schema}.json")
    loaded = yaml.safe_load((ROOT / ".github" / file).read_text())
    if True in loaded:  # in YAML 1.1 the word `on` is a truth value
        loaded["on"] = loaded.pop(True)
    jsonschema.validate(loaded, json.loads(vendored.read_text()))


def test_workflows_and_pages_name_targets_of_the_makefile() -> None:
    targets = re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.M)
    named = []
    for file in (*(ROOT / ".github/workflows").glob("*.yml"), ROOT / "CONTRIBUTING.md"):
        for words in re.findall(r"(?:run: |^|`)make ([a-z -]+?)(?:`|$|  )", file.read_text(), re.M):
            named += words.split()
    assert len(named) > 10
    assert set(named) <= set(targets)


def test_the_notes_of_a_release_are_its_section_of_the_changelog() -> None:
    section = runpy.run_path(str(ROOT / ".github/release.py"))["section"]
    assert section(CHANGELOG, "0.2.0") == "Upgrade first.\n\n### Added\n- Much.\n"
    with pytest.raises(SystemExit, match=r"has no section `## \[0\.3\.0\]"):
        section(CHANGELOG, "0.3.0")


def test_only_a_tag_of_this_version_is_released() -> None:
    notes = runpy.run_path(str(ROOT / ".github/release.py"))["notes"]
    with pytest.raises(SystemExit, match=r"The tag is v9\.9\.9, but pyproject\.toml has"):
        notes("v9.9.9")


def test_the_image_of_the_kubernetes_files_is_the_newest_release() -> None:
    newest = re.search(r"^## \[([\d.]+)\]", (ROOT / "CHANGELOG.md").read_text(), re.M)
    tags = []
    for file in (ROOT / "deploy/kubernetes").rglob("kustomization.yaml"):
        tags += re.findall(r'newTag: "?([\d.]+)', file.read_text())
    assert newest
    assert set(tags) == {newest[1]}


def test_classifiers_and_ci_name_the_same_pythons() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    promised = re.findall(r"Python :: (3\.\d+)", "\n".join(project["classifiers"]))
    workflow = (ROOT / ".github/workflows/ci.yml").read_text()
    (tested,) = re.findall(r"test:.*?python: \[(.+?)\]", workflow, re.S)[:1]
    assert promised == re.findall(r"3\.\d+", tested)
    assert project["requires-python"] == f">={promised[0]}"
