"""A short chaos on each kind of database: 600 clips, 12 faults; seed 7 has two models."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.faults.chaos import DELAY_S, have_chaos, new_world

if TYPE_CHECKING:
    from tests.faults.nursery import Nursery


@pytest.mark.chaos
@pytest.mark.parametrize(
    "database", ["sqlite", pytest.param("postgresql", marks=pytest.mark.postgresql)]
)
def test_12_faults_lose_and_double_none_of_600_clips(
    database: str, nursery: Nursery, request: pytest.FixtureRequest
) -> None:
    postgres = request.getfixturevalue("postgres_server") if database == "postgresql" else None
    with new_world(database, nursery, postgres, seed=7, delay_s=DELAY_S / 2) as world:
        have_chaos(world, 600, 12)
