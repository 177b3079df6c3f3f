"""The two sides of ``recommender.py``: CM3 and the released code as it is described, over the same made-up interactions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from recommender_baseline import ReleasedModel, epoch_batches, evaluate, evaluation_loader, sampling_sets
from torch import Tensor
from zoo.lightning_modules.cm3 import CM3

from zoo.data.interaction_loading import Interactions, InteractionsDataModule, split_pairs
from zoo.data.interaction_splits import random_user_split

BATCH, EVALUATION_BATCH, FACTORS = 2048, 4096, 16
OPTIONS: dict[str, Any] = {
    "dim": 64,
    "hops": 3,
    "neighbours": 10,
    "uniformity_weight": 0.5,
    "max_similarity": 0.8,
    "alpha": 0.5,
}
IMAGE_WEIGHT = 0.1

Batch = dict[str, Tensor]


class Size(NamedTuple):
    users: int
    items: int
    interactions: int
    image: int
    text: int

    def __str__(self) -> str:
        counts = " x ".join(f"{count:,}" for count in self[:3])
        return f"{counts}, features {self.image} + {self.text}"


SIZES = {
    "small": Size(2000, 800, 16_000, 256, 64),
    "baby": Size(19_445, 7050, 160_792, 4096, 384),
    "electronics": Size(192_403, 63_001, 1_689_188, 4096, 384),
}


class MadeData(InteractionsDataModule):
    """Users with at least five items and a long tail of both; features of a few factors and noise."""

    def __init__(self, size: Size) -> None:
        super().__init__(batch_size=BATCH, eval_batch_size=EVALUATION_BATCH)
        self.size = size
        self.data  # noqa: B018 # made before anything is timed

    def _read(self) -> Interactions:
        size, generator = self.size, torch.Generator().manual_seed(0)
        users, items = made_pairs(size, np.random.default_rng(0))
        contents = torch.randn(size.items, FACTORS, generator=generator)
        features = {
            name: torch.addmm(
                torch.randn(size.items, width, generator=generator),
                contents,
                torch.randn(FACTORS, width, generator=generator),
                beta=0.3,
                alpha=FACTORS**-0.5,
            )
            for name, width in (("image", size.image), ("text", size.text))
        }
        pairs, _ = split_pairs(users, items, random_user_split(users, seed=0))
        return Interactions(
            pairs=pairs,
            features=features,
            present={name: torch.ones(size.items, dtype=torch.bool) for name in features},
            user_ids=[str(user) for user in range(size.users)],
            item_ids=[str(item) for item in range(size.items)],
        )


def made_pairs(size: Size, draws: np.random.Generator) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    odds = [np.arange(1, count + 1) ** -0.6 for count in (size.users, size.items)]
    odds = [draws.permutation(each / each.sum()) for each in odds]
    keys = np.empty(0, dtype=np.int64)
    while len(keys) < size.interactions:
        missing = size.interactions - len(keys)
        each = np.repeat(np.arange(size.users), 5) if len(keys) == 0 else draws.choice(size.users, missing, p=odds[0])
        keys = np.concatenate([keys, each * size.items + draws.choice(size.items, len(each), p=odds[1])])
        keys = keys[np.sort(np.unique(keys, return_index=True)[1])]
    keys = keys[: size.interactions]
    return keys // size.items, keys % size.items


class Ours:
    def __init__(self, data: MadeData, device: str) -> None:
        weights = {"image": IMAGE_WEIGHT, "text": 1 - IMAGE_WEIGHT}
        self.model = CM3(modality_weights=weights, **OPTIONS).to(device)
        self.model.attach(data)
        self.model.graph()
        self.training = data.train_dataloader()
        self.loaders = [data.val_dataloader(), data.test_dataloader()]
        self.device, self.steps, self.optimizer = device, 0, self.model.configure_optimizers()

    def batches(self) -> Iterator[Batch]:
        yield from self.training

    def loss(self, batch: Batch, share: Tensor | None = None) -> Tensor:
        self.steps += 1
        share = self.model.fusion_weights(self.steps) if share is None else share
        terms = self.model.losses(batch, *self.model._encode(share))
        return (
            terms["alignment"]
            + self.model.uniformity_weight * (terms["user_uniformity"] + terms["item_uniformity"]) / 2
        )

    def embeddings(self) -> tuple[Tensor, Tensor]:
        return self.model.eval().embeddings()

    def evaluate(self, users: Tensor, items: Tensor, limit: int | None = None) -> dict[str, float]:
        ranking, seen = self.model.ranking.to(self.device), self.model.seen()
        ranking.reset()
        ranked = 0
        for batch in self.loaders[0]:
            rows = batch["user"].to(self.device)
            ranking.update(users[rows], items, batch["held_out"], seen.select(rows))
            ranked += len(rows)
            if limit and ranked >= limit:
                break
        return {name: float(value) for name, value in ranking.compute().items()}


class Released:
    def __init__(self, data: MadeData, device: str) -> None:
        pairs = {name: (rows[0].numpy(), rows[1].numpy()) for name, rows in data.interactions.items()}
        self.train, size = pairs["train"], data.size
        features = {name: rows.to(device) for name, rows in data.features.items()}
        self.model = ReleasedModel(
            *self.train, num_users=size.users, num_items=size.items, **features, image_weight=IMAGE_WEIGHT, **OPTIONS
        )  # fmt: skip
        self.sampling = sampling_sets(*self.train)
        self.loaders = [evaluation_loader(self.train, pairs[name]) for name in ("val", "test")]
        self.device, self.optimizer = device, torch.optim.Adam(self.model.parameters(), lr=1e-3)

    def batches(self) -> Iterator[Batch]:
        for parts in epoch_batches(*self.train, *self.sampling, BATCH):
            yield dict(zip(("user", "positive", "negative"), parts, strict=True))

    def loss(self, batch: Batch, share: Tensor | None = None) -> Tensor:
        # The weight is that of the text here, and of the image in ours.
        return self.model.loss(*batch.values(), None if share is None else 1 - share)

    def embeddings(self) -> tuple[Tensor, Tensor]:
        """What the last forward has left, as in the release: here a new one, which is not timed."""
        with torch.no_grad():
            return self.model(torch.full((self.model.num_items,), 0.5, device=self.device))[:2]

    def evaluate(self, users: Tensor, items: Tensor, limit: int | None = None) -> dict[str, float]:
        return evaluate(users, items, self.loaders[0], EVALUATION_BATCH, limit)


SIDES = {"released": Released, "ours": Ours}
Side = Ours | Released


def train_step(side: Side, batch: Batch) -> Tensor:
    side.model.train()
    loss = side.loss({name: rows.to(side.device) for name, rows in batch.items()})
    side.optimizer.zero_grad()
    loss.backward()
    side.optimizer.step()
    return loss.detach()
