"""Options of a run: what a person may say, and what is kept with the run."""

from __future__ import annotations

import json
from typing import Any

import pytest

from earmark.core import clips
from earmark.core.errors import UsageError
from earmark.core.options import RunOptions, of_each_model


@pytest.mark.parametrize(
    ("given", "decoded"),
    [
        ("mix", clips.MIX_UNLESS_CANCELLING),
        ("each", clips.EACH),
        ("first", 1),
        ("2", 2),
        (2, 2),
    ],
)
def test_channels_are_words_or_a_number_and_are_kept(given: Any, decoded: int) -> None:
    options = RunOptions.from_arguments({"channels": given})
    assert options.decoded_channels == decoded
    assert RunOptions.from_json(options.as_json()) == options


@pytest.mark.parametrize("given", ["0", "-1", "left", "", "12345", 1.5, None])
def test_other_channels_are_refused_in_one_sentence(given: Any) -> None:
    with pytest.raises(UsageError, match="it must be mix, each, first or a number from 1 up"):
        RunOptions.from_arguments({"channels": given})


def test_runs_of_older_releases_have_the_same_options() -> None:
    assert "channels" not in RunOptions().as_json()
    assert RunOptions.from_json({}).channels == "mix"


def test_a_model_that_follows_has_its_own_options_and_none_of_the_first_ones() -> None:
    first = {"model": ["clap"], "labels": "speech,dog", "revision": "v1", "top_k": 3}
    then = {"then": "ast", "then_label": "speech, dog", "then_min_score": 0.7}
    heard = "speech", "dog"
    clap, ast = of_each_model({**first, **then})
    assert clap == RunOptions(model="clap", labels=heard, revision="v1", top_k=3)
    assert ast == RunOptions(model="ast", top_k=3, then_label=heard, then_min_score=0.7)
    assert RunOptions.from_json(json.loads(json.dumps(ast.as_json()))) == ast
    assert "then_min_score" not in clap.as_json()


@pytest.mark.parametrize("given", [{"then": "ast"}, {"then_label": "dog"}])
def test_a_model_that_follows_needs_labels_to_follow(given: dict[str, str]) -> None:
    with pytest.raises(UsageError, match="--then and --then-label go together"):
        of_each_model(given)
