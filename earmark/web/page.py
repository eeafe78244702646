"""`earmark ui`: a web application to watch runs, browse and review clips, and query in SQL."""

from __future__ import annotations

import hmac
import time
from base64 import b64decode
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import lru_cache, partial
from io import StringIO
from itertools import islice
from operator import itemgetter
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

import sqlalchemy as sa
import uvicorn
from rich.markup import escape
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from db import browse, query, results, runs, schema
from db.pace import pace
from db.rows import Rows
from earmark import output, similar
from earmark.core.broker import LOOPBACK
from earmark.core.clips import Part
from earmark.core.errors import BY_CODE, ClipError, EarmarkError, UsageError
from earmark.core.settings import Settings
from earmark.ports import check_port
from earmark.sound import Listener
from earmark.terminal import screen
from earmark.web import report
from earmark.web.report import TEMPLATES, UNCERTAIN, Card, card, charts, colours, overview, render
from earmark.web.review import Reviewing

if TYPE_CHECKING:
    from starlette.requests import Request


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
#: A longer recording is heard in stretches, and its strongest events are listed.
LONG_S, STRETCH_S, EVENTS = 120.0, 10.0, 200
#: Limits on a download: some 20 MB.
DOWNLOADED, DOWNLOAD_S = 100_000, 60.0
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
    if address not in LOOPBACK and not token:
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
            Route("/runs/{run}/facets", pages.run_facets),
            Route("/runs/{run}/clips.csv", pages.run_download),
            Route("/clips/{clip:int}/stretch", pages.stretch),
            Route("/clips/{clip:int}", pages.clip),
            Route("/clips/{clip:int}/similar", pages.similar),
            Route("/sql", pages.sql),
            Route("/sql.csv", pages.sql_download),
            *Reviewing(engine, settings, pages.hear).routes(),
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
        if not token and request.url.hostname not in LOOPBACK:
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
        self._listener = listener
        self._views = lru_cache(partial(schema.view_columns, engine))

    def runs(self, _: Request) -> HTMLResponse:
        return self._page("runs.html", runs=self._runs())

    def runs_now(self, _: Request) -> HTMLResponse:
        return self._page("runs_now.html", runs=self._runs())

    def run(self, request: Request) -> HTMLResponse:
        run = runs.find_run(self._engine, request.path_params["run"])
        page = browse.page(
            self._engine, run.id, _wanted(request), request.query_params.get("after", "")
        )
        asked = [item for item in request.query_params.multi_items() if item[0] != "after"]
        following = ""
        if page.next:
            following = f"?{urlencode([*asked, ('after', page.next)])}#clips"
        others = {}
        for facet in request.query_params.getlist("facet"):
            others[facet] = urlencode([item for item in asked if item != ("facet", facet)])
        return self._page(
            "run.html",
            **overview(self._engine, run, self._settings),
            page=page,
            asked=dict(asked),
            query=urlencode(asked),
            facets=others,
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
            return self._page("uncounted.html", run=run, **report.quick_counts(self._engine, run))
        return self._page("charts.html", run=run, **charts(self._engine, run))

    def run_facets(self, request: Request) -> HTMLResponse:
        run = runs.find_run(self._engine, request.path_params["run"])
        found = browse.facets(self._engine, run.id, _wanted(request))
        most = browse.READ_FOR_FACETS
        return self._page("facets.html", facets=found, query=request.url.query, most=most)

    def run_download(self, request: Request) -> Response:
        run = runs.find_run(self._engine, request.path_params["run"])
        return _download(browse.every(self._engine, run.id, _wanted(request)))

    def sql_download(self, request: Request) -> Response:
        statement = request.query_params.get("q", "")
        return _download(query.query(self._engine, statement, timeout_s=DOWNLOAD_S))

    def stretch(self, request: Request) -> HTMLResponse:
        clip = results.clip(self._engine, request.path_params["clip"])._asdict()
        at, heard, why_not = _number(request, "at", 0.0), None, ""
        try:
            heard = self._listener.hear_stretch(
                clip["uri"], Part.of(clip), at, most_s=STRETCH_S, most_bytes=SOUND_BYTES
            )
        except ClipError as error:
            why_not = str(error)
        return self._page("stretch.html", heard=heard, at=at, why_not=why_not)

    def similar(self, request: Request) -> HTMLResponse:
        clip = results.clip(self._engine, request.path_params["clip"])
        run = runs.get_run(self._engine, clip.run_id)
        found = similar.similar(self._engine, run, self._settings, str(clip.id), browse.PAGE)
        return self._page("similar.html", clip=clip, run=run, found=list(found))

    def clip(self, request: Request) -> HTMLResponse:
        clips = list(browse.details(self._engine, [request.path_params["clip"]]))
        if not clips:
            raise UsageError(reason="There is no such clip.")
        if (clips[0]["duration_s"] or 0) > LONG_S:
            shown = Card(clips[0], None, "")
            strongest = sorted(shown.events, key=itemgetter(3), reverse=True)[:EVENTS]
            return self._page(
                "long.html", card=shown, colour=colours([shown]), events=sorted(strongest)
            )
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
        values: dict[str, Any] = {"statement": statement, "rows": rows, "error": error}
        values["took_ms"] = took_ms
        return self._page("sql.html", **values, most=ROWS, views=self._views())

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


def _download(rows: Rows) -> Response:
    """Return rows as a CSV file."""
    text = StringIO()
    output.write_csv(islice(rows, DOWNLOADED), rows.columns, text)
    headers = {"Content-Disposition": 'attachment; filename="earmark.csv"'}
    return Response(text.getvalue(), media_type="text/csv", headers=headers)


def _number(request: Request, name: str, default: float) -> float:
    try:
        return float(request.query_params.get(name) or default)
    except ValueError as error:
        raise UsageError(reason=f"{name} is a number.") from error


def _wanted(request: Request) -> browse.Wanted:
    query = request.query_params
    min_score, max_score = _number(request, "min_score", 0.0), _number(request, "max_score", 1.0)
    order = query.get("order", "")
    if query.get("uncertain"):
        max_score = min(max_score, UNCERTAIN)
    return browse.Wanted(
        label=query.get("label", ""),
        error=query.get("error", ""),
        text=query.get("text", ""),
        min_score=min_score,
        max_score=max_score,
        order=order if order in browse.ORDERS else "",
        facets=tuple(facet.partition(":")[::2] for facet in query.getlist("facet")),
    )
