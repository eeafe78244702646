"""`earmark ui`: a web application to watch runs, browse and review clips, and query in SQL."""

from __future__ import annotations

import hmac
import time
from base64 import b64decode
from contextlib import asynccontextmanager
from functools import lru_cache, partial
from itertools import islice
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

import uvicorn
from rich.markup import escape
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.responses import HTMLResponse, PlainTextResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from db import browse, query, runs
from db.pace import pace
from earmark.core.errors import BY_CODE, EarmarkError, UsageError
from earmark.ports import HERE, check_port
from earmark.progress import screen
from earmark.sound import Listener
from earmark.web.report import TEMPLATES, UNCERTAIN, card, charts, colours, overview, render
from earmark.web.review import Reviewing

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    import sqlalchemy as sa
    from starlette.requests import Request
    from starlette.responses import Response

    from earmark.core.settings import Settings

#: Runs on the first page.
RUNS = 100
#: A live page shows charts up to this size: of a larger run they take the database a minute.
COUNTED = 1_000_000
#: Limits on a person's SQL.
ROWS, QUERY_S = 500, 10.0
#: Enough of a clip to know what it is, small enough to be sent in one piece.
SOUND_S, SOUND_BYTES = 60.0, 200_000
#: Clips heard lately: some 200 kB each.
HEARD = 64
AT_ONCE = 2
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self';"
        " img-src data:; media-src data:; form-action 'self'; base-uri 'none';"
        " frame-ancestors 'none'"
    ),
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def serve(
    engine: sa.Engine,
    settings: Settings,
    *,
    address: str,
    port: int,
    token: str | None,
    flower: str,
    path: str = "",
) -> None:
    """Serve the page until Ctrl-C; name the place in it where to begin.

    Raises:
        UsageError: it would be open to other machines without a token, or its port is taken.
    """
    token = token or settings.ui_token
    if address not in HERE and not token:
        reason = "it shows every run, and its SQL reads every row."
        raise UsageError(reason=f"The page on {address} needs --token: {reason}")
    check_port(address, port)
    screen.print(f"[bold]http://{address}:{port}{escape(path)}[/] is ready; Ctrl-C stops it.")
    uvicorn.run(
        application(engine, settings, token, flower), host=address, port=port, log_level="warning"
    )


def application(
    engine: sa.Engine, settings: Settings, token: str | None = None, flower: str = ""
) -> Starlette:
    """Return the page as an ASGI application; without a token it answers to loopback names only."""
    listener = Listener(settings, at_once=AT_ONCE)
    pages = _Pages(engine, settings, listener, flower)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        listener.close()

    return Starlette(
        routes=[
            Route("/", pages.runs),
            Route("/runs/now", pages.runs_now),
            Route("/runs/{run}", pages.run),
            Route("/runs/{run}/now", pages.run_now),
            Route("/runs/{run}/charts", pages.run_charts),
            Route("/clips/{clip:int}", pages.clip),
            Route("/sql", pages.sql),
            *Reviewing(engine, pages.hear).routes(),
            Mount("/static", StaticFiles(directory=TEMPLATES)),
        ],
        middleware=[Middleware(BaseHTTPMiddleware, dispatch=_guard(token))],
        exception_handlers={EarmarkError: pages.sentence},
        lifespan=lifespan,
    )


def _guard(token: str | None) -> Callable[[Request, Any], Awaitable[Response]]:
    async def guard(
        request: Request, call_next: Callable[[Request], Awaitable[Response]]
    ) -> Response:
        if token and not _knows(request, token):
            challenge = {"WWW-Authenticate": 'Basic realm="Earmark: the password is the token"'}
            return PlainTextResponse("A token is needed.", 401, challenge)
        # DNS rebinding: an attacker's name may resolve to this machine.
        if not token and request.url.hostname not in HERE:
            return PlainTextResponse("This page is for this machine only.", 421)
        # Another site must not start queries or downloads here, though it can write nothing.
        if request.headers.get("sec-fetch-site") == "cross-site" and request.url.path != "/":
            return PlainTextResponse("Another site may not ask this.", 403)
        response = await call_next(request)
        response.headers.update(HEADERS)
        return response

    return guard


def _knows(request: Request, token: str) -> bool:
    scheme, _, encoded = request.headers.get("authorization", "").partition(" ")
    try:
        password = b64decode(encoded, validate=True).partition(b":")[2]
    except ValueError:
        return False
    return scheme.lower() == "basic" and hmac.compare_digest(password, token.encode())


class _Pages:
    """The pages, and the parts that they load later.

    Each is one or two indexed queries, but for the charts.
    """

    def __init__(
        self, engine: sa.Engine, settings: Settings, listener: Listener, flower: str
    ) -> None:
        self._engine = engine
        self._settings = settings
        self.hear = lru_cache(HEARD)(partial(listener.hear, most_s=SOUND_S, most_bytes=SOUND_BYTES))
        # A run that has ended is looked at again only if its counts change.
        self._facts_of_ended = lru_cache(RUNS)(self._look_at)
        self._flower = flower

    def runs(self, _: Request) -> HTMLResponse:
        return self._page("runs.html", runs=self._runs())

    def runs_now(self, _: Request) -> HTMLResponse:
        return self._page("runs_now.html", runs=self._runs())

    def run(self, request: Request) -> HTMLResponse:
        run = runs.find_run(self._engine, request.path_params["run"])
        wanted = _wanted(request)
        page = browse.page(self._engine, run.id, wanted, request.query_params.get("after", ""))
        asked = dict(request.query_params)
        asked.pop("after", None)
        following = ""
        if page.next:
            following = f"?{urlencode({**asked, 'after': page.next})}#clips"
        return self._page(
            "run.html",
            **overview(self._engine, run, self._settings),
            page=page,
            asked=asked,
            following=following,
            labels=browse.label_choices(self._engine, run.model_id),
            codes=list(BY_CODE),
        )

    def run_now(self, request: Request) -> HTMLResponse:
        run = runs.find_run(self._engine, request.path_params["run"])
        return self._page("run_now.html", **overview(self._engine, run, self._settings))

    def run_charts(self, request: Request) -> HTMLResponse:
        run = runs.find_run(self._engine, request.path_params["run"])
        state = runs.progress(self._engine, run.id)
        if state.total > COUNTED:
            return self._page("uncounted.html", run=run)
        return self._page("charts.html", run=run, **charts(self._engine, run))

    def clip(self, request: Request) -> HTMLResponse:
        clips = list(browse.details(self._engine, [request.path_params["clip"]]))
        if not clips:
            raise UsageError(reason="There is no such clip.")
        shown = card(clips[0], self.hear)
        return self._page("clip.html", card=shown, colour=colours([shown]))

    def sql(self, request: Request) -> HTMLResponse:
        statement, began, error = request.query_params.get("q", ""), time.monotonic(), ""
        rows: list[dict[str, Any]] = []
        try:
            if statement:
                rows = list(islice(query.query(self._engine, statement, timeout_s=QUERY_S), ROWS))
        except UsageError as wrong:
            error = str(wrong)
        took_ms = (time.monotonic() - began) * 1000
        return self._page(
            "sql.html", statement=statement, rows=rows, error=error, took_ms=took_ms, most=ROWS
        )

    async def sentence(self, _: Request, error: Exception) -> HTMLResponse:
        status = 404 if isinstance(error, UsageError) else 503
        return self._page("wrong.html", status, sentence=str(error))

    def _runs(self) -> list[dict[str, Any]]:
        newest = islice(runs.run_progress(self._engine), RUNS)
        return [{**row, **self._facts(row)} for row in newest]

    def _facts(self, row: dict[str, Any]) -> dict[str, Any]:
        counts = tuple(row[name] for name in ("done", "failed", "cancelled"))
        if sum(counts) == row["total"]:
            return self._facts_of_ended(row["run_id"], counts)
        return self._look_at(row["run_id"])

    def _look_at(self, run_id: int, _counts: tuple[int, ...] = ()) -> dict[str, Any]:
        state = runs.progress(self._engine, run_id)
        return {
            "model": runs.get_run(self._engine, run_id).options.model,
            "clips_per_s": pace(self._engine, run_id, state).clips_per_s,
            "seconds": state.seconds,
        }

    def _page(self, template: str, status: int = 200, **values: Any) -> HTMLResponse:
        return HTMLResponse(render(template, flower=self._flower, **values), status)


def _wanted(request: Request) -> browse.Wanted:
    query = request.query_params
    try:
        min_score = float(query.get("min_score") or 0.0)
        max_score = float(query.get("max_score") or 1.0)
    except ValueError as error:
        raise UsageError(reason="A score is a number.") from error
    if query.get("uncertain"):
        max_score = min(max_score, UNCERTAIN)
    return browse.Wanted(
        label=query.get("label", ""),
        error=query.get("error", ""),
        text=query.get("text", ""),
        min_score=min_score,
        max_score=max_score,
    )
