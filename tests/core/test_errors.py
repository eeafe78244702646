"""An error's facts are checked, and its sentence survives optimisation and pickling."""

from __future__ import annotations

import pickle
import subprocess
import sys
from typing import Any, get_type_hints

import pytest

from earmark.core.errors import BY_CODE, ClipError, NotFound, ServerError, TooLong

INHERITED = {"code", "stage", "cause", "transient", "sentence", "retry_after_s"}


def facts_of(kind: type[ClipError]) -> dict[str, Any]:
    declared = {name: hint for name, hint in get_type_hints(kind).items() if name not in INHERITED}
    return {name: hint(7) for name, hint in declared.items()}


@pytest.mark.parametrize("kind", BY_CODE.values())
def test_an_error_with_its_declared_facts_has_its_sentence(kind: type[ClipError]) -> None:
    facts = facts_of(kind)
    error = kind(**facts)
    assert str(error) == kind.sentence.format(**facts)
    assert all(getattr(error, name) == value for name, value in facts.items())


def wrong_facts() -> None:
    """Nobody calls this. mypy reads it: an error that is not reported is an unused comment."""
    NotFound()  # type: ignore[call-arg]
    NotFound(satus=404)  # type: ignore[call-arg]
    NotFound(status="404")  # type: ignore[arg-type]


def test_a_missing_fact_is_named_at_run_time() -> None:
    with pytest.raises(TypeError, match="NotFound lacks the fact 'status'"):
        NotFound()  # type: ignore[call-arg]


def test_sentences_survive_an_optimised_python() -> None:
    program = "from earmark.core.errors import NotFound; print(NotFound(status=404))"
    ended = subprocess.run(
        [sys.executable, "-OO", "-c", program], capture_output=True, text=True, check=True
    )
    assert ended.stdout.strip() == str(NotFound(status=404))


@pytest.mark.parametrize(
    "error",
    [TooLong(max_duration_s=3600, setting="X"), ServerError(status=503, retry_after_s=7.0)],
)
def test_an_error_can_be_pickled(error: ClipError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), copy.facts) == (type(error), str(error), error.facts)
