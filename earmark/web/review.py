"""The page on which people hear a run's clips and say what is right: the only one that writes."""

from __future__ import annotations

import getpass
import json
from collections.abc import Callable, Iterable
from functools import lru_cache
from itertools import chain, islice, repeat, zip_longest
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np
import sqlalchemy as sa
from starlette.concurrency import run_in_threadpool
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.routing import Route

from db import browse, charts, decisions, reviews, runs
from db.compare import compare
from db.session import fetch
from earmark.core.errors import EarmarkError, UsageError
from earmark.core.settings import Settings
from earmark.evaluation import evaluate
from earmark.sampling import Band, Clips
from earmark.similar import similar
from earmark.web.report import card, colours, render

if TYPE_CHECKING:
    from starlette.requests import Request


#: Reviews of a label that are planned: about five minutes, and one of them may be wrong.
PLANNED = 96
STRATA = 4
#: Labels whose clips are kept in memory; labels that the page offers; clips behind a cell.
KEPT, LABELS, CLIPS = 16, 1000, 200
#: Windows in the queue of what sounds like an example.
NEAREST = 200
MOST_BYTES = 10_000
Nothing = tuple[()]
SELECT_THRESHOLDS = "SELECT * FROM thresholds WHERE run_id = :run_id"


class Reviewing:
    """The review of a run, and its comparisons with the truth and with another run."""

    def __init__(self, engine: sa.Engine, settings: Settings, hear: Callable[..., Any]) -> None:
        self._engine = engine
        self._settings = settings
        self._hear = hear
        # A run that has ended has the same clips at each look.
        self._clips = lru_cache(KEPT)(self._read_clips)

    def routes(self) -> list[Route]:
        return [
            Route("/runs/{run}/review", self.desk, methods=["GET"]),
            Route("/runs/{run}/review", _writing(self.take), methods=["POST"]),
            Route("/runs/{run}/review/next", _writing(self.next), methods=["POST"]),
            Route("/runs/{run}/evaluation", self.evaluation),
            Route("/runs/{run}/comparison", self.comparison),
        ]

    def desk(self, request: Request) -> HTMLResponse:
        run, asked = self._run(request), request.query_params
        labels = dict(charts.label_counts(self._engine, run.id, LABELS))
        label = asked.get("label") or next(iter(labels), "")
        reviewer = "" if "authorization" in request.headers else getpass.getuser()
        values = {"labels": labels, "label": label, "asked": asked, "reviewer": reviewer}
        return HTMLResponse(render("review.html", flower="", **values, **self._state(run)))

    def next(self, request: Request, body: dict[str, Any]) -> HTMLResponse:
        """Give out the next clip of a queue; the answer is empty when there is none."""
        run, label = self._run(request), str(body["label"])
        clips = self._clips(run.id, label, self._done(run.id))
        lowest, highest = clips.scores.min(initial=0), clips.scores.max(initial=1)
        band = float(body["low"] or lowest), float(body["high"] or highest)
        queue = _queue(clips, body["queue"], band)
        if body["queue"] == "nearest":
            queue = self._find_nearest(run, label, int(body["like"] or 0))
        holding = map(int, body["holding"])
        clip = reviews.hand_out(self._engine, run.id, label, body["reviewer"], queue, holding)
        if clip is None:
            return HTMLResponse("")
        shown = card(next(browse.details(self._engine, [clip])), self._hear)
        best = [(score, start) for start, _, name, score in shown.events if name == label]
        begin_s = max(best, default=(0, 0))[1]
        page = render("review_clip.html", card=shown, colour=colours([shown]), begin_s=begin_s)
        return HTMLResponse(page)

    def take(self, request: Request, body: dict[str, Any]) -> HTMLResponse:
        """Keep a review, or undo the last one; answer with the progress."""
        run = self._run(request)
        if body.get("undo"):
            reviews.undo(self._engine, run.id, body["reviewer"])
        else:
            review = reviews.Review.model_validate(body)
            reviews.say(self._engine, run.id, review, body.get("true_label", ""))
        return HTMLResponse(render("review_now.html", **self._state(run)))

    def evaluation(self, request: Request) -> HTMLResponse:
        run, asked = self._run(request), request.query_params
        truth, true = asked.get("truth", ""), asked.get("true")
        found = evaluate(self._engine, run, truth) if truth and true is None else None
        clips: Iterable[dict[str, Any]] = ()
        if true is not None:
            clips = decisions.cell(self._engine, run.id, truth, true, asked.get("label", ""))
        values = {"run": run, "asked": asked, "found": found, "clips": list(islice(clips, CLIPS))}
        return HTMLResponse(render("evaluation.html", flower="", **values))

    def comparison(self, request: Request) -> HTMLResponse:
        run, other = self._run(request), request.query_params.get("other")
        found, clips = None, list[dict[str, Any]]()
        if other:
            found = compare(self._engine, run, runs.find_run(self._engine, other))
            clips = list(islice(found.changed(), CLIPS))
        values = {"run": run, "other": other or "", "found": found, "clips": clips}
        return HTMLResponse(render("comparison.html", flower="", most=CLIPS, **values))

    def _run(self, request: Request) -> runs.RunRow:
        return runs.find_run(self._engine, request.path_params["run"])

    def _done(self, run_id: int) -> int:
        return runs.progress(self._engine, run_id).states["done"]

    def _read_clips(self, run_id: int, label: str, _done: int) -> Clips:
        about = {"run_id": run_id, "label": label}
        return Clips.of(fetch(self._engine, decisions.SELECT_CLIPS, **about))

    def _find_nearest(self, run: runs.RunRow, label: str, like: int) -> list[tuple[int, Nothing]]:
        found = similar(self._engine, run, self._settings, str(like), NEAREST, label=label)
        return [(row["clip_id"], ()) for row in found]

    def _state(self, run: runs.RunRow) -> dict[str, Any]:
        found = fetch(self._engine, SELECT_THRESHOLDS, run_id=run.id)
        thresholds = {row.label: row.min_score for row in found}
        said = reviews.counts(self._engine, run.id)
        return {"run": run, "said": said, "thresholds": thresholds, "planned": PLANNED}


def _queue(clips: Clips, kind: str, band: Band) -> Iterable[tuple[int, Band | Nothing]]:
    """Return the clips of a band in the order of a queue, with the band each was drawn from."""
    if kind == "doubtful":
        drawn = clips.drawn(band)
        doubtful = drawn[np.argsort(np.abs(clips.scores[drawn] - 0.5), kind="stable")]
        return zip(clips.ids[doubtful].tolist(), repeat(()))
    parts = clips.strata(band, STRATA) if kind == "stratified" else [band]
    queues = [zip(clips.ids[clips.drawn(part)].tolist(), repeat(part)) for part in parts]
    return (each for each in chain.from_iterable(zip_longest(*queues)) if each)


def _writing(answer: Callable[..., Response]) -> Callable[[Request], Any]:
    """Return a handler of POST that takes JSON from our own page alone."""

    async def handle(request: Request) -> Response:
        # The browser sends its password along for another site too, but with that site's Origin.
        if urlsplit(request.headers.get("origin", "")).netloc != request.headers["host"]:
            return PlainTextResponse("Another site may not write here.", 403)
        content = b""
        async for part in request.stream():
            content += part
            if len(content) > MOST_BYTES:
                return PlainTextResponse("This is too long.", 413)
        try:
            return await run_in_threadpool(answer, request, json.loads(content))
        except (AttributeError, KeyError, TypeError, ValueError):
            return PlainTextResponse("This is no review.", 400)
        except EarmarkError as error:
            return PlainTextResponse(str(error), 400 if isinstance(error, UsageError) else 503)

    return handle
