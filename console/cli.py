"""The command line: one short function per verb."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from console import label_files, output, progress
from console import options as o
from console.database import connect_to, find_runs, known_labels, open_database, read_settings
from console.label_files import LabelFormat  # noqa: TC001
from db import results
from earmark.errors import BY_CODE, EarmarkError, UsageError
from earmark.options import RunOptions

if TYPE_CHECKING:
    import sqlalchemy as sa

    from console.verbs import Finished
    from db.results import Progress, RunRow

USAGE_EXIT, SERVICE_EXIT = 2, 3
EXAMPLE_QUERY = 'query "SELECT label, count(*) FROM results GROUP BY label"'

app = typer.Typer(
    name="earmark",
    help="Label a million sound clips: lists in, Hugging Face audio models, results in SQL.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": lambda flag: flag.replace("_", "-"),
    },
)
database = typer.Typer(help="The database's schema.", no_args_is_help=True)
app.add_typer(database, name="db")


@app.command(epilog="Example: earmark run recordings/ --db labels.db --top-k 3")
def run(
    sources: o.Sources, model: o.Model = "starter", revision: o.Revision = None, top_k: o.TopK = 5,
    function_to_apply: o.FunctionToApply = None, window_s: o.WindowS = None, hop_s: o.HopS = None,
    combine: o.CombineWindows = o.Combine.mean, min_score: o.MinScore = 0.0, labels: o.Labels = None,
    name: o.Name = None, input_format: o.ListFormat = o.InputFormat.auto, url_col: o.UrlCol = "url",
    chunk_size: o.ChunkSize = 16, priority: o.Priority = 1, limit: o.Limit = None, strict: o.Strict = False,
    db: o.Db = None,
    workers: Annotated[int, typer.Option(min=1, help="Worker processes.")] = 1,
) -> None:  # fmt: skip
    """Classify everything on this machine: embedded Valkey, worker, progress, results."""
    asked = _run_options(model, revision, top_k, function_to_apply, window_s, hop_s, combine, min_score, labels)
    submission: dict[str, Any] = {
        "name": name,
        "input_format": input_format.value,
        "url_col": url_col,
        "chunk_size": chunk_size,
        "priority": priority,
        "limit": limit,
    }
    from console import verbs

    finished = verbs.run(sources, read_settings(db), options=asked, workers=workers, **submission)
    _show(finished, db, strict=strict)


@app.command(epilog="Example: earmark submit urls.csv --url-col link --name march --watch")
def submit(
    sources: o.Sources, model: o.Model = "starter", revision: o.Revision = None, top_k: o.TopK = 5,
    function_to_apply: o.FunctionToApply = None, window_s: o.WindowS = None, hop_s: o.HopS = None,
    combine: o.CombineWindows = o.Combine.mean, min_score: o.MinScore = 0.0, labels: o.Labels = None,
    name: o.Name = None, input_format: o.ListFormat = o.InputFormat.auto, url_col: o.UrlCol = "url",
    chunk_size: o.ChunkSize = 16, priority: o.Priority = 1, limit: o.Limit = None, strict: o.Strict = False,
    db: o.Db = None,
    watch: Annotated[bool, typer.Option("--watch", help="Show progress until the end.")] = False,
) -> None:  # fmt: skip
    """Put lists into the ledger and the queue; print the run's id."""
    asked = _run_options(model, revision, top_k, function_to_apply, window_s, hop_s, combine, min_score, labels)
    submission: dict[str, Any] = {
        "name": name,
        "input_format": input_format.value,
        "url_col": url_col,
        "chunk_size": chunk_size,
        "priority": priority,
        "limit": limit,
    }
    from console import verbs
    from producer.submit import submit as submit_list

    settings = verbs.find_broker(read_settings(db))
    engine = open_database(settings, create=True)
    submitted = submit_list(sources, engine, settings, options=asked, **submission)
    verbs.report_lines(submitted)
    sys.stdout.write(f"{submitted.run_id}\n")
    if watch:
        _watch(engine, str(submitted.run_id), strict=strict)


@app.command(epilog="Example: EARMARK_BROKER__URL=redis://redis:6379 earmark worker --device cuda:0")
def worker(
    concurrency: Annotated[int | None, typer.Option(min=1, help="Chunks in progress at once.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")] = None,
    model: Annotated[str | None, typer.Option(help="What to load before the first clip.")] = None,
) -> None:
    """Run one worker process for one device."""
    from console import verbs

    verbs.worker(concurrency=concurrency, device=device, model=model)


@app.command(epilog="Example: earmark up --workers 2")
def up(
    workers: Annotated[int, typer.Option(min=1, help="Worker processes.")] = 1,
    flower_port: Annotated[int, typer.Option(help="Flower's port on this machine.")] = 5555,
    db: o.Db = None,
) -> None:
    """Keep an embedded Valkey, workers and Flower running until Ctrl-C."""
    from console import verbs

    verbs.up(read_settings(db), workers=workers, flower_port=flower_port)


@app.command(epilog="Example: earmark flower --port 5555")
def flower(
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 5555,
    address: Annotated[str, typer.Option(help="Any but loopback needs a password.")] = "127.0.0.1",
    basic_auth: Annotated[str | None, typer.Option(envvar="FLOWER_BASIC_AUTH", help="USER:PASSWORD.")] = None,
) -> None:
    """Watch workers and chunks in the browser."""
    from console import verbs

    verbs.flower(port=port, address=address, basic_auth=basic_auth)


@app.command(epilog="Example: earmark status march --watch")
def status(
    run: o.LatestRun = None,
    watch: Annotated[bool, typer.Option("--watch", help="Show progress until the end.")] = False,
    how: o.As = None,
    db: o.Db = None,
) -> None:
    """Show how far the runs are, or one of them."""
    engine = open_database(read_settings(db))
    if watch:
        _watch(engine, run, strict=False)
        return
    found = results.find_run(engine, run) if run else None
    if found and how is None:
        progress.summarise(engine, found, results.progress(engine, found.id))
    else:
        output.write(results.rows(engine, results.run_progress(found.id if found else None)), how, None)


@app.command("results", epilog="Example: earmark results march --label siren --min-score 0.6 -o sirens.csv")
def show_results(
    run: o.Run,
    label: Annotated[str | None, typer.Option(help="Only this label.")] = None,
    min_score: Annotated[float | None, typer.Option(help="Only from this score up.")] = None,
    windows: Annotated[bool, typer.Option("--windows", help="Every window's best label.")] = False,
    how: o.As = None,
    file: o.Out = None,
    db: o.Db = None,
) -> None:
    """Print a run's results: each clip with its best label."""
    engine, found = find_runs(read_settings(db), run)
    statement = results.results(found.id, label=label, min_score=min_score, windows=windows)
    output.write(results.rows(engine, statement), how, file)


@app.command(epilog="Example: earmark export march -o march.parquet")
def export(
    run: o.Run,
    file: Annotated[Path, typer.Option("--output", "-o", help="A file; with --labels audacity a folder.")],
    how: o.As = None,
    windows: Annotated[bool, typer.Option("--windows", help="Every window's best label.")] = False,
    labels: Annotated[LabelFormat | None, typer.Option(help="The windows as label files for this program.")] = None,
    db: o.Db = None,
) -> None:
    """Write all of a run's results to a file, however many."""
    engine, found = find_runs(read_settings(db), run)
    rows = results.rows(engine, results.results(found.id, windows=windows or labels is not None))
    if labels:
        label_files.write(rows, labels, file)
    else:
        output.write(rows, how, file)


@app.command(epilog="Example: earmark failures march --format jsonl")
def failures(run: o.Run, how: o.As = None, file: o.Out = None, db: o.Db = None) -> None:
    """Print why clips of a run have no result."""
    engine, found = find_runs(read_settings(db), run)
    output.write(results.rows(engine, results.failures(found.id)), how, file)


@app.command(epilog="Example: earmark labels starter")
def labels(model: Annotated[str, typer.Argument(help="A model's name.")] = "starter", db: o.Db = None) -> None:
    """Print the labels of a model that some worker has loaded."""
    for label in known_labels(read_settings(db), model):
        sys.stdout.write(f"{label}\n")


@app.command(epilog=f"Example: earmark {EXAMPLE_QUERY}")
def query(
    statement: Annotated[str, typer.Argument(help="One SELECT; docs/sql.md has the views.")],
    how: o.As = None,
    file: o.Out = None,
    timeout_s: Annotated[float, typer.Option(min=0.1, help="Give up after so many seconds.")] = 30.0,
    db: o.Db = None,
) -> None:
    """Read the results with SQL."""
    from db import query as queries

    engine = open_database(read_settings(db))
    output.write(queries.query(engine, statement, timeout_s=timeout_s), how, file)


@app.command(epilog="Example: earmark retry march --error timeout,dns")
def retry(
    run: o.Run,
    error: Annotated[str | None, typer.Option(help="Only these error codes, comma-separated.")] = None,
    db: o.Db = None,
) -> None:
    """Put a run's failed clips back to work."""
    codes = error.split(",") if error else []
    if unknown := sorted(set(codes) - set(BY_CODE)):
        raise UsageError(reason=f"There is no error code {', '.join(unknown)}; there are {', '.join(BY_CODE)}.")
    from db import ledger

    engine, found = find_runs(read_settings(db), run)
    progress.screen.print(f"{ledger.retry_failed(engine, found.id, codes)} clips go back to work.")


@app.command(epilog="Example: earmark cancel march")
def cancel(run: o.Run, db: o.Db = None) -> None:
    """Stop a run: what waits is cancelled, what is being worked on ends."""
    from db import ledger

    engine, found = find_runs(read_settings(db), run)
    progress.screen.print(f"{ledger.cancel(engine, found.id)} clips are cancelled.")


@app.command(epilog="Example: earmark prune march --yes")
def prune(
    run: o.Run,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    db: o.Db = None,
) -> None:
    """Delete a run with its clips and results."""
    from db import ledger

    engine, found = find_runs(read_settings(db), run)
    if not yes:
        typer.confirm(f"Delete the run {found.name} with all its results?", abort=True)
    progress.screen.print(f"{ledger.prune(engine, found.id)} clips are deleted.")


@app.command(epilog="Example: earmark demo")
def demo(db: o.Db = None) -> None:
    """Classify the bundled example clips, two of them broken on purpose."""
    from console.demo import demo as classify_examples

    _show(classify_examples(read_settings(db)), db, strict=False)


@database.command("upgrade", epilog="Example: earmark db upgrade")
def db_upgrade(db: o.Db = None) -> None:
    """Bring the database to this version's schema."""
    from db import schema

    schema.upgrade(connect_to(read_settings(db)))
    db_check(db)


@database.command("check", epilog="Example: earmark db check")
def db_check(db: o.Db = None) -> None:
    """Say whether the database has this version's schema."""
    from db import schema

    engine = connect_to(read_settings(db))
    schema.check(engine)
    progress.screen.print(f"{engine.url.render_as_string()} is ready.")


def _run_options(
    model: str, revision: str | None, top_k: int, function_to_apply: o.Function | None, window_s: float | None,
    hop_s: float | None, combine: o.Combine, min_score: float, labels: str | None,
) -> RunOptions:  # fmt: skip
    return RunOptions(
        model=model,
        revision=revision,
        top_k=top_k,
        function_to_apply=function_to_apply.value if function_to_apply else None,
        window_s=window_s,
        hop_s=hop_s,
        combine=combine.value,
        min_score=min_score,
        labels=tuple(label.strip() for label in labels.split(",")) if labels else (),
    )


def _watch(engine: sa.Engine, run: str | None, *, strict: bool) -> None:
    found = results.find_run(engine, run)
    state = progress.watch(engine, found.id)
    progress.summarise(engine, found, state)
    _exit_if_strict(state, strict=strict)


def _show(finished: Finished, db: str | None, *, strict: bool) -> None:
    engine = open_database(read_settings(db))
    progress.show_results(engine, finished.run, finished.progress)
    progress.summarise(engine, finished.run, finished.progress)
    progress.screen.print("Next:", *_next_commands(finished.run, db), sep="\n  ", markup=False, soft_wrap=True)
    _exit_if_strict(finished.progress, strict=strict)


def _next_commands(run: RunRow, db: str | None) -> list[str]:
    where = f" --db {db}" if db else ""
    installed = Path(sys.argv[0])
    found = shutil.which("earmark") or installed.name != "earmark"
    program = "earmark" if found else os.path.relpath(installed)
    return [f"{program} {verb}{where}" for verb in (f"results {run.name}", EXAMPLE_QUERY, "run YOUR_FOLDER")]


def _exit_if_strict(state: Progress, *, strict: bool) -> None:
    if strict and state.states["failed"]:
        raise typer.Exit(1)


def main() -> None:
    """Run the command line; every error of ours becomes one sentence and an exit code."""
    try:
        app()
    except UsageError as error:
        _end(str(error), USAGE_EXIT)
    except EarmarkError as error:
        _end(str(error), SERVICE_EXIT)
    except BrokenPipeError:
        sys.stderr.close()


def _end(sentence: str, status: int) -> None:
    sys.stderr.write(f"earmark: {sentence}\n")
    raise SystemExit(status)


if __name__ == "__main__":
    main()
