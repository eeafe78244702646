"""Programs and packages a test needs. It is skipped without them; where CI is set, it fails."""

from __future__ import annotations

import os
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

import pytest


def program(name: str) -> Path:
    """Return where this program is."""
    # Debian has servers in a folder that an ordinary user's PATH lacks.
    found = shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin")
    if found is None:
        _give_up(f"The program {name} is missing")
    return Path(found)


def module(name: str) -> Path:
    """Return the folder of this Python package, without importing it."""
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        _give_up(f"The Python package {name} is missing")
    return Path(spec.origin).parent


def _give_up(reason: str) -> NoReturn:
    if os.environ.get("CI"):
        pytest.fail(f"{reason}, and where CI is set no test is skipped.", pytrace=False)
    pytest.skip(f"{reason}; `make test` installs it.")
