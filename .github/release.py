"""Print a release's notes, or say why it cannot be made: `python .github/release.py v0.2.0`."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def notes(tag: str) -> str:
    """Return the section of CHANGELOG.md about this tag's version."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    project = tomllib.loads(text)["project"]
    version = tag.removeprefix("v")
    if project["version"] != version:
        sys.exit(f"The tag is {tag}, but pyproject.toml has the version {project['version']}.")
    if "//example.org" in text:
        sys.exit("pyproject.toml still names example.org: set the repository's real address.")
    return section((ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), version)


def section(changelog: str, version: str) -> str:
    """Return the text below a released version's heading: `## [0.2.0] - 2026-12-01`."""
    heading = rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d$"
    found = re.search(rf"{heading}\n(.*?)(?=^## |\Z)", changelog, re.M | re.S)
    if not found or not found[1].strip():
        sys.exit(f"CHANGELOG.md has no section `## [{version}] - YYYY-MM-DD`.")
    return found[1].strip() + "\n"


if __name__ == "__main__":
    sys.stdout.write(notes(sys.argv[1]))
