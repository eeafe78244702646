"""Options of a run: what a person may say, and what is kept with the run."""

from __future__ import annotations

from typing import Any

import pytest

from earmark.core import clips
from earmark.core.errors import UsageError
from earmark.core.options import RunOptions


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
