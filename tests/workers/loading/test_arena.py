"""Memory that two processes share: both forms, and the extents taken of it."""

from __future__ import annotations

import os
import random
import subprocess
import sys

import pytest

from workers.loading import arena
from workers.loading.arena import Extents, Room

WRITER = """
import sys
from workers.loading import arena
arena.mapped(int(sys.argv[1]))[3] = 0.5
"""


@pytest.mark.parametrize("form", ["sealed", "unnamed file"])
def test_samples_that_one_process_writes_are_the_other_s(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if form == "unnamed file":
        monkeypatch.delattr(os, "memfd_create")
    memory = arena.new_memory(1000)
    samples = arena.mapped(memory)
    assert len(samples) == 1000
    subprocess.run(
        [sys.executable, "-c", WRITER, str(memory)], pass_fds=[memory], check=True, timeout=60
    )
    os.close(memory)
    assert samples[3] == 0.5


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system decides")
@pytest.mark.parametrize("form", ["sealed", "unnamed file"])
def test_memory_that_is_cleared_takes_none_and_can_be_used_again(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if form == "unnamed file":
        monkeypatch.delattr(os, "memfd_create")
    memory = arena.new_memory(1_000_000)
    samples = arena.mapped(memory)
    samples[:] = 1
    assert os.fstat(memory).st_blocks
    arena.clear(samples)
    assert os.fstat(memory).st_blocks == 0
    samples[7] = 0.5
    assert samples[6:8].tolist() == [0, 0.5]
    os.close(memory)


@pytest.mark.skipif(sys.platform != "linux", reason="seals are Linux's own")
def test_no_process_can_shrink_the_memory_of_another() -> None:
    memory = arena.new_memory(1000)
    for size in (0, 5000):
        with pytest.raises(PermissionError):
            os.truncate(memory, size)
    os.close(memory)


def test_extents_never_overlap_and_all_come_back() -> None:
    chance = random.Random(1)
    extents, taken = Extents(10_000), {}
    for _ in range(5000):
        if taken and chance.random() < 0.5:
            extents.give_back(chance.choice(list(taken)))
            taken = {start: size for start, size in taken.items() if start in extents._taken}
            continue
        size = chance.randint(1, 2000)
        start = extents.take(size)
        if start is not None:
            for other, length in taken.items():
                assert start + size <= other or other + length <= start
            taken[start] = size
    for start in taken:
        extents.give_back(start)
    assert extents.take(10_000) == 0
    assert extents.take(1) is None


def test_an_extent_that_is_not_taken_cannot_be_freed() -> None:
    with pytest.raises(KeyError):
        Extents(10).give_back(0)


def test_a_long_recording_takes_a_part_of_the_memory_or_one_window_of_any_size() -> None:
    memory = arena.new_memory(100)
    room = Room(memory)
    os.close(memory)
    assert room.take(60, 40) == 0
    assert room.take(10, 40) is None
    assert room.take(30, 100) == 60
    room.give_back(0)
    assert room.take(10, 40) == 0
