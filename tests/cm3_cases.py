"""The toy model of the project's notes on CM3 (section 7.4), and small data for recommenders."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from zoo.lightning_modules.cm3 import CM3

from zoo.data import SyntheticInteractionsDataModule

__all__ = ["LAMBDA", "TOY_BATCH", "small_data", "small_model", "toy_data", "toy_model", "wave"]

TOY_BATCH = {
    "user": torch.tensor([0, 1, 2]),
    "positive": torch.tensor([1, 2, 3]),
    "negative": torch.tensor([3, 0, 1]),
}
# The weight of the text. Modalities stand in the order of their names here, and lambda is that of the first, the image.
LAMBDA = 1 - torch.tensor([0.25, 0.5, 0.75, 0.1, 0.9], dtype=torch.float64)


def wave(seed: float, rows: int, columns: int | None = None, *, scale: float = 0.5) -> Tensor:
    """W(seed, r, c) of the notes."""
    r = torch.arange(rows, dtype=torch.float64)
    if columns is None:
        return scale * torch.sin(seed + 0.7 * r)
    c = torch.arange(columns, dtype=torch.float64)
    return scale * torch.sin(seed + 0.7 * r.unsqueeze(1) + 1.3 * c)


def toy_data() -> Any:
    """Three users, five items, the last without an edge."""
    r, c = torch.arange(5, dtype=torch.float64).unsqueeze(1), torch.arange(4, dtype=torch.float64)
    image = wave(0.1, 5, 4, scale=1) + 0.3 * torch.cos((r + 1) * (c + 1))
    text = wave(2, 5, 3, scale=1) + 0.3 * torch.cos((r + 2) * (c[:3] + 1))
    edges = torch.tensor([[0, 0, 1, 1, 2], [0, 1, 1, 2, 3]])
    return SimpleNamespace(
        user_ids=["ann", "bob", "cid"],
        item_ids=["a", "b", "c", "d", "e"],
        features={"text": text[[2, 0, 4, 1, 3]], "image": image},
        present={"image": torch.ones(5, dtype=torch.bool), "text": torch.ones(5, dtype=torch.bool)},
        interactions={"train": edges},
    )


def toy_model(**options: Any) -> CM3:
    """The toy model in float64, with its parameters, and its data attached."""
    weights = {"image": 0.1, "text": 0.9}
    model = CM3(dim=2, hops=2, neighbours=2, modality_weights=weights, **options)
    data = toy_data()
    model.attach(data)
    model.double()
    model._features = {name: data.features[name] for name in sorted(data.features)}
    # Not rounded to float32, which the graph of features in float32 is.
    model.neighbour_weights = torch.tensor([[0.1, 0.9]], dtype=torch.float64).repeat(5, 1) / (2 + 1e-7)
    network = model.model
    with torch.no_grad():
        image, text = network.encoders.encoders
        image.reader.weight.copy_(torch.cat([wave(0.3, 8, 4), wave(1.9, 2, 4)]))
        image.reader.bias.copy_(torch.cat([wave(0.9, 8), wave(2.6, 2)]))
        image.out.weight.copy_(wave(1.1, 2, 8))
        text.reader.weight.copy_(torch.cat([wave(0.5, 8, 3), wave(0.8, 2, 3)]))
        text.reader.bias.copy_(torch.cat([wave(1.7, 8), wave(0.2, 2)]))
        text.out.weight.copy_(wave(2.2, 2, 8))
        network.user_parts.copy_(torch.cat([wave(0.4, 3, 2), wave(1.4, 3, 2), wave(2.4, 3, 2)], 1))
        network.gate.copy_(wave(3.0, 3, 3))
    return model


def small_data(**options: Any) -> SyntheticInteractionsDataModule:
    """A set that trains in a second."""
    given = {
        "num_users": 40, "num_items": 60, "interactions_per_user": 6.0, "factors": 4, "cold": 0.1, "batch_size": 32,
    }  # fmt: skip
    return SyntheticInteractionsDataModule(**{**given, "modalities": {"image": 8, "text": 6}, **options})


def small_model(**options: Any) -> CM3:
    """A model for `small_data`."""
    return CM3(**{"dim": 4, "hops": 2, "neighbours": 3, "k": (5, 20), **options})
