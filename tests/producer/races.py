"""Submitters in processes of their own, forked from one that has imported the producer."""

from __future__ import annotations

import multiprocessing
from typing import TYPE_CHECKING

from db.session import connect
from producer.submit import submit

if TYPE_CHECKING:
    from multiprocessing.synchronize import Barrier

    from earmark.core.settings import Settings

FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["producer.submit"])
LONGEST_S = 120


def submit_one(start: Barrier, settings: Settings, name: str, path: str) -> None:
    """Submit a list as soon as all parties of the barrier are there."""
    from earmark.core import broker

    broker.configure(settings.broker)
    engine = connect(settings.database_url, settings.database)
    start.wait(LONGEST_S)
    submit([path], engine, settings, name=name)
