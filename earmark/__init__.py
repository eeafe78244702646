"""Label a million sound clips: lists in, Hugging Face audio models, results in SQL.

`run`, `submit`, `open`, `compare` and `classify` are the Python API. Nothing is imported until it
is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from earmark.api import LabelScore, classify, compare, open, run, submit
    from earmark.core.settings import Settings
    from earmark.run_object import Run

    __version__: str

__all__ = [
    "LabelScore", "Run", "Settings", "__version__", "classify", "compare", "open", "run", "submit",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'earmark' has no attribute {name!r}")
    if name == "__version__":
        from importlib.metadata import version

        return version("earmark")
    from earmark.core.processes import check_installation

    # In a user's project, a module of theirs may have the name of one of our packages.
    check_installation()
    if name == "Settings":
        from earmark.core.settings import Settings

        return Settings
    from earmark import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return __all__
