"""What the producer's tests share: settings with a Valkey of the test's own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from earmark import broker
from earmark.settings import Broker, Database, Ledger, Settings
from tests.servers import running_valkey

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def settings(tmp_path: Path, database_url: str) -> Iterator[Settings]:
    with running_valkey(tmp_path) as url:
        chosen = Settings(
            broker=Broker(url=url, high_water=4, queue="clips"),
            database=Database(url=database_url),
            ledger=Ledger(lost_after_s=-1.0),
        )
        broker.configure(chosen.broker)
        yield chosen
        broker.app.close()
