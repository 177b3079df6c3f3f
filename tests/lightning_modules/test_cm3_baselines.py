"""LightGCN against dense matrices and a loop, popularity against a count; both stored and served as CM3 is."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from zoo.lightning_modules.cm3_baselines import RecommenderBaseline

from tests.cm3_cases import TOY_BATCH, small_data, toy_data
from tests.training import quick_trainer
from zoo.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore:.*(num_workers|tensorboard|litlogger|eval mode|no optimizer).*")


def test_identity_lightgcn() -> None:
    """The mean of the layers by a dense matrix, and BPR by a loop over the batch."""
    model = RecommenderBaseline(dim=2, hops=2, weight_decay=0.1)
    data = toy_data()
    model.attach(data)
    model.double()
    rows = model._rows
    with torch.no_grad():
        rows.copy_(torch.sin(torch.arange(16, dtype=torch.float64)).view(8, 2))
    adjacency = torch.zeros(8, 8, dtype=torch.float64)
    for user, item in data.interactions["train"].t().tolist():
        adjacency[user, 3 + item] = adjacency[3 + item, user] = 1
    scale = (adjacency.sum(1) + 1e-7).rsqrt()
    adjacency = scale[:, None] * adjacency * scale
    layers = rows.detach() + adjacency @ rows.detach() + adjacency @ adjacency @ rows.detach()
    users, items = (layers / 3).tensor_split([3])
    for found, expected in zip(model.embeddings(), (users, items), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    total = 0.0
    for user, positive, negative in zip(*(TOY_BATCH[name].tolist() for name in TOY_BATCH), strict=True):
        margin = float(users[user] @ (items[positive] - items[negative]))
        own = rows.detach()[[user, 3 + positive, 3 + negative]]
        total += math.log1p(math.exp(-margin)) + 0.1 * float(own.square().sum()) / 2
    assert float(model.loss(TOY_BATCH).detach()) == pytest.approx(total / 3, rel=1e-12)


@pytest.mark.parametrize("kind", ["lightgcn", "popularity"])
def test_trains_stores_and_serves(kind: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = RecommenderBaseline(kind=kind, dim=4, lr=0.05, k=(20,))
    data = small_data()
    quick_trainer(max_epochs=3).fit(model, data)
    model.eval().save_pretrained(tmp_path)
    loaded = RecommenderBaseline.from_pretrained(tmp_path)
    assert loaded.recommend(["u1", "u2"], 5) == model.recommend(["u1", "u2"], 5)
    trainer = quick_trainer()
    trainer.limit_val_batches = 1.0
    (found,) = trainer.validate(loaded, small_data(), verbose=False)
    assert found["val/recall@20"] > 20 / 60
    if kind == "popularity":
        counts = Counter(data.interactions["train"][1].tolist())
        seen = set(data.interactions["train"][1][data.interactions["train"][0] == 1].tolist())
        best = sorted((item for item in range(60) if item not in seen), key=lambda item: (-counts[item], item))[:5]
        assert loaded.recommend(["u1"], 5).items == [[f"i{item}" for item in best]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "random"}, "kind must be"),
        ({"kind": "popularity", "score": "cosine"}, "score must be 'dot'"),
        ({"dim": 0}, "dim must be finite and at least 1"),
        ({"lr": 0.0}, "lr must be positive"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        RecommenderBaseline(**options)


def test_without_data() -> None:
    with pytest.raises(InputError, match="fit it, or load a stored one"):
        RecommenderBaseline().loss(TOY_BATCH)
