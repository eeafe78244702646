"""What a machine lacks skips a test with the reason; where CI is set, the test fails."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests import needs

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.mark.parametrize("ask", [needs.program, needs.module])
def test_what_is_missing_skips_at_home_and_fails_in_ci(
    ask: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match=r"nothing_like_it is missing; `make test`"):
        ask("nothing_like_it")
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="nothing_like_it is missing"):
        ask("nothing_like_it")


def test_what_is_there_is_found() -> None:
    assert needs.program("sh").name == "sh"
    assert (needs.module("pytest") / "__init__.py").exists()
