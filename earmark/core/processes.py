"""Start-up of our processes: no import from the working directory, no child outlives its parent."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import site
import sys
from collections.abc import Collection
from importlib.util import find_spec
from pathlib import Path

from earmark.core.errors import ServiceError

PR_SET_PDEATHSIG = 1
#: Our packages. Their names are so common that a user's project may have them as well.
PACKAGES = ("earmark", "db", "producer", "workers")
#: The folder of this installation: site-packages, or a checkout.
INSTALLATION = Path(__file__).resolve().parents[2]


def isolate_imports() -> None:
    """Keep the working directory off the import path of this process and of all its children.

    Call it first in a program. Earmark that runs in the folder of a downloaded data set must not
    import Python modules of the data set.

    Raises:
        ServiceError: one of our packages would still be imported from somewhere else.
    """
    sys.path[:] = import_path()
    # Python puts the working directory in front for `-m` and `-c`, which is how children start.
    os.environ["PYTHONSAFEPATH"] = "1"
    if "PYTHONPATH" in os.environ:
        folders = os.environ["PYTHONPATH"].split(os.pathsep)
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(_is_absolute, folders))
    check_installation()


def check_installation() -> None:
    """Check that our packages are imported from this installation.

    Raises:
        ServiceError: a module of the user's has the name of one of them and comes first.
    """
    for package in PACKAGES:
        _check_origin(package)


def import_path() -> list[str]:
    """Return `sys.path` without the working directory, unless it holds Earmark's installation."""
    absolute = list(filter(_is_absolute, sys.path))
    try:
        here = str(Path.cwd().resolve())
    except FileNotFoundError:  # the folder has been deleted
        return absolute
    installed = [str(INSTALLATION), *site.getsitepackages()]
    if here in map(os.path.realpath, installed):
        return absolute
    return [folder for folder in absolute if os.path.realpath(folder) != here]


def bare_environment() -> dict[str, str]:
    """Return the environment of a child for untrusted bytes: no token and no password."""
    environment = {"PYTHONPATH": os.pathsep.join(import_path())}
    if "LD_LIBRARY_PATH" in os.environ:
        environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
    return environment


def limit(kind: int, most: int) -> None:
    """Set a resource limit; it stays lower where the hard limit is, which cannot be raised."""
    hard = resource.getrlimit(kind)[1]
    if hard != resource.RLIM_INFINITY:
        most = min(most, hard)
    resource.setrlimit(kind, (most, most))


def end_with_parent(parent: int, signal_number: int = signal.SIGTERM) -> None:
    """Have Linux send this process a signal when its parent (pid) ends, even if it is killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal_number)
        if os.getppid() != parent:  # it ended while this process was starting
            os.kill(os.getpid(), signal_number)


def keep_to_cores(cores: Collection[int]) -> None:
    """Let this process, and all that it starts, run on these cores only; on none: on all.

    Raises:
        ServiceError: this process may not use one of them.
    """
    if not cores or sys.platform != "linux":
        return
    usable = os.sched_getaffinity(0)
    if not usable.issuperset(cores):
        missing = ", ".join(map(str, sorted(set(cores) - usable)))
        raise ServiceError(
            reason=f"EARMARK_WORKER__CORES names cores that are not here: {missing}."
        )
    os.sched_setaffinity(0, cores)


def _is_absolute(folder: str) -> bool:
    return Path(folder).is_absolute()


def _check_origin(package: str) -> None:
    spec = find_spec(package)
    origin = Path(spec.origin).resolve() if spec and spec.origin else None
    if origin is None or not origin.is_relative_to(INSTALLATION):
        raise ServiceError(
            reason=f"Python imports `{package}` from {origin or 'nowhere'}, not from Earmark in"
            f" {INSTALLATION}: remove that folder from PYTHONPATH, or rename the module."
        )
