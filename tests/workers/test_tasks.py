"""The desk: whatever ends a chunk's work, its clips are let go."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from db import conveyor
from earmark.settings import Settings
from tests.db.facts import chunk_of
from tests.db.test_ledger import expire_leases, submit
from workers.tasks import Desk

if TYPE_CHECKING:
    import sqlalchemy as sa


class BrokenModels:
    """A model whose loading fails in a way nobody foresaw."""

    def take(self, _run_id: int) -> Any:
        raise RuntimeError("something of the model's own")


def test_clips_of_a_chunk_that_fails_unforeseen_are_not_held_for_ever(engine: sa.Engine) -> None:
    _, ids = submit(engine, 2)
    desk = Desk(engine, Settings(), BrokenModels(), SimpleNamespace(offline=False), "worker")  # type: ignore[arg-type]
    with pytest.raises(RuntimeError):
        desk.work(chunk_of(engine, ids))
    expire_leases(engine)
    desk.renew()
    assert conveyor.take_back(engine, "clips") == 2
