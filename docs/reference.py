"""Write pages of docs/reference/ from the code: `python -m docs.reference`."""

from __future__ import annotations

import ast
import inspect
import re
from itertools import groupby
from pathlib import Path
from textwrap import TextWrapper
from typing import TYPE_CHECKING, Any

import typer
from pydantic import BaseModel, ByteSize
from pydantic_core import PydanticUndefined

from docs.erd import schema_page
from earmark.cli.app import app
from earmark.core.errors import BY_CODE, Cause
from earmark.core.settings import Settings
from workers import metrics, metrics_server

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGES_FOLDER = Path(__file__).with_name("reference")
MADE = "<!-- Made by `python -m docs.reference`; do not edit. -->\n"
COMMENTED_FIELD = re.compile(r"((?: +#: .*\n)+) +(\w+): ")
#: How workers make metrics.
METRICS = {
    "Counter": "counter",
    "CounterMetricFamily": "counter",
    "Histogram": "histogram",
    "_gauge": "gauge",
}


def settings_page() -> str:
    """Return the page of every setting with its default and its reason."""
    parts = [
        "# Settings",
        "Every setting with its default and the reason for it. Set them in the environment, in a"
        " `.env` file in the working directory, or in `/run/secrets/earmark.env`. Of these the"
        " environment wins, then the file of secrets. Lists are separated by commas. Every verb"
        " reports an `EARMARK_` variable that is no setting. In Python, `EARMARK_FETCH__TIMEOUT_S`"
        ' is `earmark.Settings(fetch={"timeout_s": ...})`.',
    ]
    for group, settings in groupby(_settings(), key=lambda setting: setting[0]):
        parts.append(f"## {group.capitalize()}")
        for _, name, default, reason in settings:
            parts += [f"### `{name}`", f"Default: {_shown(default)}. {_ended(reason)}"]
    return _page(parts)


def _settings() -> Iterator[tuple[str, str, object, str]]:
    """Yield each setting's group, name, default and reason, those without a group first."""
    reasons = _comments(Settings)
    grouped = []
    for group, field in Settings.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            inner_reasons = _comments(kind)
            for name, inner in kind.model_fields.items():
                setting = f"EARMARK_{group}__{name}".upper()
                grouped.append((group, setting, inner.default, inner_reasons[name]))
        else:
            yield "everywhere", f"EARMARK_{group}".upper(), field.default, reasons[group]
    yield from grouped


def _comments(kind: type) -> dict[str, str]:
    """Return the comments above the fields of a class."""
    comments = {}
    for lines, name in COMMENTED_FIELD.findall(inspect.getsource(kind)):
        comments[name] = " ".join(lines.replace("#: ", "").split())
    return comments


def _ended(text: str) -> str:
    return text if text.endswith((".", ")")) else f"{text}."


def _page(parts: list[str]) -> str:
    """Join paragraphs, each in lines of at most 100 columns, to a page."""
    wrap = TextWrapper(100, break_long_words=False, break_on_hyphens=False)
    lines = [part if part.startswith(("#", "|", "`")) else wrap.fill(part) for part in parts]
    return MADE + "\n\n".join(lines) + "\n"


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
    parts = [
        "# Errors",
        "Look up the codes that `earmark failures` and the view `failures` show. A transient error"
        " is tried again, the others are final. A clip whose error may be the worker's or the"
        " network's is first [given to other workers](../guides/operating.md#when-clips-fail)."
        " [Troubleshooting](../guides/troubleshooting.md) has the cures.",
    ]
    for stage, codes in groupby(BY_CODE.items(), key=lambda each: each[1].stage):
        parts.append(f"## Stage: {stage}")
        for code, kind in codes:
            again = "Transient" if kind.transient else "Final"
            cause = "" if kind.cause == Cause.clip else f", may be the {kind.cause}'s"
            parts += [f"### `{code}`", f"{again}{cause}. “{kind.sentence}”"]
    return _page(parts)


def cli_page() -> str:
    """Return the page of every verb with its help."""
    root = typer.main.get_command(app)
    head = (
        "Look up every verb with its options. `earmark VERB --help` shows the same, and `earmark"
        " --version` the version.\n"
    )
    return "\n".join([MADE + "# The command line\n", head, *_help(root, "earmark")])


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
            default = parameter.default
            if isinstance(default, list):
                default = " ".join(default)
            default = "" if default in (None, False) else f"`{default}`"
            yield f"| {flags} | {default} | {getattr(parameter, 'help', '')} |"
    yield ""


def metrics_page() -> str:
    """Return the page of every metric of a worker."""
    parts = [
        "# Metrics",
        "Look up what a worker with `EARMARK_WORKER__METRICS_PORT` serves at `/metrics` for"
        " Prometheus. [Watching](../guides/many_machines.md#watching) says how to set it up, and"
        " `deploy/` has a Grafana dashboard and alerts.",
    ]
    for module in (metrics, metrics_server):
        for name, kind, meaning, labels in _metrics(inspect.getsource(module)):
            by = f", by {labels}" if labels else ""
            parts += [f"## `{name}`", f"{kind.capitalize()}{by}. {meaning}"]
    return _page(parts)


def _metrics(source: str) -> Iterator[tuple[str, str, str, str]]:
    """Yield name, kind, meaning and labels of each metric that a module's source makes."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            kind = METRICS.get(node.func.id)
            texts = [each.value for each in node.args[:2] if isinstance(each, ast.Constant)]
            if kind and len(texts) == 2:
                labels = (
                    ast.literal_eval(node.args[2]) if len(node.args) > 2 and kind != "gauge" else []
                )
                suffix = "_total" if kind == "counter" else ""
                yield f"{texts[0]}{suffix}", kind, str(texts[1]), ", ".join(labels)


PAGES = {
    "metrics.md": metrics_page,
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
