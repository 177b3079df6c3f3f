"""The code of docs/recommender.md runs, and its search engine finds what `recommend` finds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from zoo.lightning_modules.cm3 import CM3

from tests.cm3_cases import toy_model
from tests.doc_blocks import read_blocks

GUIDE = Path(__file__).parents[1] / "docs/recommender.md"
BLOCKS = [block.text for block in read_blocks(GUIDE) if block.language == "python"]


def run(blocks: list[str], names: dict[str, Any]) -> None:
    for block in blocks:
        exec(compile(block, "recommender.md", "exec"), names)


def toy(**options: Any) -> CM3:
    model = toy_model(**options).eval()
    model.teardown("fit")
    return model


@pytest.mark.filterwarnings("ignore")
def test_blocks_run_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    run([block for block in BLOCKS if "faiss" not in block], names)
    assert [len(items) for items in names["lists"].items] == [10, 10]
    with np.load("embeddings.npz", allow_pickle=False) as file:
        assert file["item_ids"].tolist()[-2:] == ["i80", "i81"]


@pytest.mark.parametrize("score", ["dot", "cosine"])
def test_search_engine_finds_what_recommend_finds(score: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("faiss")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"model": toy(score=score)}
    run([block for block in BLOCKS if "export_embeddings" in block or "import faiss" in block], names)
    users = names["model"].users.names
    expected = names["model"].recommend(users, 3)
    for user, items, scores in zip(users, *expected, strict=True):
        found, values = names["recommend"](user, 3, names["seen"])
        assert found == items
        assert values == pytest.approx(scores, rel=1e-5)
