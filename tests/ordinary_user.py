"""Do something as a user who must obey file modes, also where the tests run as root."""

from __future__ import annotations

import ctypes
import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

PR_CAPBSET_DROP = 24
CAPABILITY_VERSION_3 = 0x20080522
#: What lets root read and write every file: DAC_OVERRIDE, DAC_READ_SEARCH and FOWNER.
OVERRIDES = (1, 2, 3)


def as_ordinary_user(act: Callable[[], T]) -> T:
    """Return what the function returns; it and the programs it starts obey file modes."""
    # Linux keeps capabilities per thread: this one takes them to its end.
    with ThreadPoolExecutor(1, initializer=_drop_overrides) as thread:
        return thread.submit(act).result()


def _drop_overrides() -> None:
    if os.geteuid() != 0:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    for capability in OVERRIDES:
        _check(libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0))
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)
    sets = (ctypes.c_uint32 * 6)()
    _check(libc.capget(header, sets))
    for number in range(3):  # effective, permitted, inheritable: the first 32 capabilities of each
        for capability in OVERRIDES:
            sets[number] &= ~(1 << capability)
    _check(libc.capset(header, sets))


def _check(status: int) -> None:
    if status != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
