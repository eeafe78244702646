"""The index of vectors: what it finds, all compared or by sketches."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from earmark import vector_index
from earmark.vector_index import WINDOW, Index

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

COUNT, DIMENSIONS = 20_000, 64


def clustered(count: int) -> np.ndarray:
    random = np.random.default_rng(3)
    centres = random.normal(size=(40, DIMENSIONS)) + 1
    vectors = centres[random.integers(0, 40, count)]
    vectors = vectors + 0.3 * random.normal(size=vectors.shape)
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def written(folder: Path, vectors: np.ndarray) -> Index:
    windows = np.zeros(len(vectors), WINDOW)
    windows["clip_id"] = np.arange(len(vectors))
    scales = np.abs(vectors).max(axis=1) / 127
    levels = np.round(vectors / scales[:, None]).astype(np.int8)
    halves = [slice(0, len(vectors) // 3), slice(len(vectors) // 3, None)]
    vector_index.write(folder, ((windows[half], scales[half], levels[half]) for half in halves))
    return Index.mapped(folder)


def test_sketches_find_what_comparing_all_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors = clustered(COUNT)
    monkeypatch.setattr(vector_index, "EXACT", 1000)
    monkeypatch.setattr(vector_index, "CANDIDATES", 1000)
    index = written(tmp_path, vectors)
    stored = index.vectors(slice(None))
    for allowed in (np.ones(COUNT, bool), np.arange(COUNT) % 3 > 0):
        found = 0
        for query in vectors[:40]:
            truth = np.argsort(-np.where(allowed, stored @ query, -2))[:10]
            places, cosines = index.nearest(query, 10, allowed)
            assert allowed[places].all()
            assert np.abs(cosines - vectors[places] @ query).max() < 0.01
            found += len({*truth.tolist()} & {*places.tolist()})
        assert found / 400 >= 0.95


def test_no_windows_and_few_windows_are_an_index(tmp_path: Path) -> None:
    for count in (0, 3):
        folder = tmp_path / str(count)
        folder.mkdir()
        index = written(folder, clustered(3)[:count])
        places, cosines = index.nearest(clustered(1)[0], 10, np.ones(count, bool))
        assert len(places) == len(cosines) == count
