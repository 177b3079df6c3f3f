"""The set of `zoo.data.synthetic_interactions` as a data module: recommendation without a download."""

from __future__ import annotations

from typing import Any

import torch

from zoo.data.interaction_loading import Interactions, InteractionsDataModule, split_pairs
from zoo.data.synthetic_interactions import SyntheticInteractions, synthetic_interactions

__all__ = ["SyntheticInteractionsDataModule"]


class SyntheticInteractionsDataModule(InteractionsDataModule):
    """The set of `synthetic_interactions`, for recipes that need no download.

    What it offers is what `zoo.data.MultimodalInteractionsDataModule` does: ``num_users``, ``num_items``, ``features``,
    ``present``, ``user_ids``, ``item_ids``, ``interactions``, and the same batches. Ids are "u0", "u1", … and "i0", "i1",
    ….

    Args:
        num_users: U, at least 1.
        num_items: I, at least 8.
        modalities: number of features of each modality; None makes ``{"image": 64, "text": 32}``.
        interactions_per_user: their mean, at least 3, and at most half of the items that are not cold.
        factors: number of latent factors, at least 1.
        strength: how much taste decides, at least 0.
        visible: share of the factors that a modality shows, in [0, 1].
        noise: standard deviation of the noise in the features, where the signal has 1.
        skew: exponent of the popularity, at least 0.
        cold: share of the items without training interaction, in [0, 0.5].
        missing: share of the items that lack a modality, in [0, 0.99].
        data_seed: number of the set.
        train_samples: keep so many training interactions; None keeps all. Validation and test keep the users who train.
        batch_size: interactions in a training batch and process, at least 2.
        eval_batch_size: users in a batch of evaluation and process, at least 1.
        seed: number of the training order and of the negatives.
        num_workers: processes that read the data; 0 is fastest, the data are in memory.
        drop_last: leave out a last training batch that is not full; one of a single row is always left out.
        pin_memory: copy batches to page-locked memory, for a GPU.

    Attributes:
        made: the set with its factors, once it is made.

    Raises:
        InputError: a number is out of its range; those of the set are checked when it is made.

    Example:
        >>> data = SyntheticInteractionsDataModule(num_users=20, num_items=50, batch_size=8)
        >>> batch = next(iter(data.val_dataloader()))
        >>> len(batch["user"]), len(batch["held_out"].offsets)
        (20, 21)
    """

    def __init__(
        self,
        *,
        num_users: int = 1000,
        num_items: int = 400,
        modalities: dict[str, int] | None = None,
        interactions_per_user: float = 8.0,
        factors: int = 16,
        strength: float = 10.0,
        visible: float = 0.6,
        noise: float = 0.3,
        skew: float = 0.7,
        cold: float = 0.0,
        missing: float = 0.0,
        data_seed: int = 0,
        train_samples: int | None = None,
        batch_size: int = 2048,
        eval_batch_size: int = 4096,
        seed: int = 0,
        num_workers: int = 0,
        drop_last: bool = False,
        pin_memory: bool = False,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            seed=seed,
            num_workers=num_workers,
            drop_last=drop_last,
            pin_memory=pin_memory,
        )
        self.modalities = modalities
        self.interactions_per_user = interactions_per_user
        self.factors = factors
        self.strength = strength
        self.visible = visible
        self.noise = noise
        self.skew = skew
        self.cold = cold
        self.missing = missing
        self.data_seed = data_seed
        self.train_samples = train_samples
        self._size: dict[str, Any] = {"num_users": num_users, "num_items": num_items}
        self.made: SyntheticInteractions | None = None

    def _read(self) -> Interactions:
        made = synthetic_interactions(
            **self._size,
            modalities=self.modalities,
            interactions_per_user=self.interactions_per_user,
            factors=self.factors,
            strength=self.strength,
            visible=self.visible,
            noise=self.noise,
            skew=self.skew,
            cold=self.cold,
            missing=self.missing,
            seed=self.data_seed,
        )
        self.made = made
        pairs, _ = split_pairs(
            made.users, made.items, made.labels, train_samples=self.train_samples, split_seed=self.data_seed
        )
        features = {name: torch.from_numpy(values) for name, values in made.features.items()}
        return Interactions(
            pairs=pairs,
            features=features,
            present={name: values.any(1) for name, values in features.items()},
            user_ids=[f"u{number}" for number in range(len(made.user_factors))],
            item_ids=[f"i{number}" for number in range(len(made.item_factors))],
        )
