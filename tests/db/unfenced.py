"""A ledger that lets zombies write, for tests of the checks themselves."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from db import outcomes

if TYPE_CHECKING:
    import pytest


def switch_fencing_off(monkeypatch: pytest.MonkeyPatch) -> None:
    fenced = outcomes._statements

    def unfenced(dialect: str) -> Any:
        statements = fenced(dialect)
        return replace(statements, held=statements.held.replace("lease_token =", "0 <>"))

    monkeypatch.setattr(outcomes, "_statements", unfenced)
