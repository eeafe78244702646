"""Write pages of docs/reference/ from the code: `python -m docs.reference`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from pydantic import BaseModel, ByteSize
from pydantic_core import PydanticUndefined

from docs.erd import schema_page
from earmark.cli.app import app
from earmark.core.errors import BY_CODE
from earmark.core.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pydantic.fields import FieldInfo

PAGES_FOLDER = Path(__file__).with_name("reference")
MADE = "<!-- Made by `python -m docs.reference`; do not edit. -->\n"


def settings_page() -> str:
    """Return the page of every setting with its default and its reason."""
    rows = [
        f"| `{name}` | {_shown(field.default)} | {field.description} |"
        for name, field in _settings()
    ]
    source = (
        "From the environment or a `.env` file in the working directory;"
        " the environment goes first."
    )
    head = f"# Settings\n\n{source}\n"
    return "\n".join([MADE + head, "| variable | default | why |", "|---|---|---|", *rows, ""])


def _settings() -> Iterator[tuple[str, FieldInfo]]:
    for group, field in Settings.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            for name, inner in kind.model_fields.items():
                yield f"EARMARK_{group}__{name}".upper(), inner
        else:
            yield f"EARMARK_{group}".upper(), field


def _shown(default: object) -> str:
    if default is PydanticUndefined:
        return "the user data folder"
    if isinstance(default, ByteSize):
        return default.human_readable()
    if isinstance(default, tuple):
        default = ",".join(str(part) for part in default)
    return f"`{default}`" if isinstance(default, (bool, int, float)) or default else "unset"


def errors_page() -> str:
    """Return the page of every error code, its stage and its sentence."""
    codes = (
        "The codes of `failures.error_code`. A transient one is tried again, the others are final."
        " A clip whose error may be the worker's or the network's is first"
        " [given to other workers](../guides/operating.md#when-clips-fail)."
    )
    head = f"# Errors\n\n{codes}\n"
    rows = [
        f"| `{code}` | {kind.stage} | {kind.cause} | {'yes' if kind.transient else ''} |"
        f" {kind.sentence} |"
        for code, kind in BY_CODE.items()
    ]
    return "\n".join(
        [
            MADE + head,
            "| code | stage | may be of the | transient | sentence |",
            "|---|---|---|---|---|",
            *rows,
            "",
        ]
    )


def cli_page() -> str:
    """Return the page of every verb with its help."""
    root = typer.main.get_command(app)
    return "\n".join([MADE + "# The command line\n", *_help(root, "earmark")])


def _help(command: Any, name: str) -> Iterator[str]:
    verbs: dict[str, Any] = getattr(command, "commands", {})
    for verb, inner in verbs.items():
        if getattr(inner, "commands", None):
            yield from _help(inner, f"{name} {verb}")
        else:
            yield from _verb(inner, f"{name} {verb}")


def _verb(verb: Any, name: str) -> Iterator[str]:
    example = (verb.epilog or "").replace("Example: ", "Example: `")
    yield f"## `{name}`\n\n{verb.help}\n\n{example}`\n"
    yield "| argument or option | default | what |\n|---|---|---|"
    for parameter in verb.params:
        if parameter.name != "help":
            flags = ", ".join(f"`{flag}`" for flag in [*parameter.opts, *parameter.secondary_opts])
            default = "" if parameter.default in (None, False) else f"`{parameter.default}`"
            yield f"| {flags} | {default} | {getattr(parameter, 'help', '')} |"
    yield ""


PAGES = {
    "settings.md": settings_page,
    "errors.md": errors_page,
    "cli.md": cli_page,
    "schema.md": lambda: MADE + schema_page(),
}


def main() -> None:
    for name, page in PAGES.items():
        (PAGES_FOLDER / name).write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
