"""The internet of tests: servers on loopback under names and addresses of their own."""

from __future__ import annotations

import pytest

from tests.workers.fetching.http_world import World


@pytest.fixture(scope="module")
def internet(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("ca"))
