"""CM3: recommendation from interactions and the modalities of items, calibrated on the sphere.

Zhou et al.: Calibrating Multimodal Recommendation, arXiv 2508.01226. Users and items are unit vectors of M + 1 parts, one a
modality and one that fuses them, propagated over the graph of interactions and over nearest neighbours in the features
(`zoo.multimodal_items`, `zoo.multimodal_graph`). The loss draws a user to their items, and pushes users apart from users and
items from items; items less, the more alike their fused features are (`zoo.losses.cm3`)::

    L = L_a(user, positive) + gamma (L_u(user) + L_i(negative, fused features of negative)) / 2

Read: the abstract and the project's notes on the released code; not the paper's equations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor

from zoo.errors import InputError, require_choice
from zoo.item_graph import ItemGraph, item_graph
from zoo.losses.cm3 import alignment_loss, calibrated_uniformity_loss, calibration_statistics, uniformity_loss
from zoo.losses.contracts import unit_rows
from zoo.metrics.top_items import largest_entries
from zoo.multimodal_graph import MultimodalGraph
from zoo.new_items import known_rows, nearest_known, new_rows
from zoo.recommender import RecommenderModule
from zoo.stored_ids import names_to_tensor

__all__ = ["CM3"]

_CHOICES = {"score": ("dot", "cosine"), "fusion": ("de_casteljau", "fold")}


class CM3(RecommenderModule):
    """Recommend from interactions and the features of items, which may come in any number of modalities.

    Give it a `MultimodalInteractionsDataModule` or a `SyntheticInteractionsDataModule`: sizes, ids, features and
    interactions are taken from it at the start of fit. Items may lack modalities. Under several processes the losses span
    all batches.

    Evaluation ranks all items but those of a user's training, with lambda fixed, and logs recall, NDCG, precision and MAP as
    ``val/recall@20`` and so on, and the same under ``test/``. In training: ``train/loss``, ``train/alignment``,
    ``train/user_uniformity``, ``train/item_uniformity``, and every ``log_every_n_steps`` steps of the negative items
    ``cm3/similarity`` (mean of s), ``cm3/clipped_share`` and ``cm3/clipped_above``. Where the last is close to 1 the
    calibration has switched itself off.

    A stored model holds the ids, the interactions and the parts of items, and no features. `recommend`, `similar_items`,
    `export_embeddings` and `add_items` need no data; `add_items` needs ``keep_features=True``, or the features once more.

    Args:
        num_users: number of users; taken from the data, as are the next two.
        num_items: number of items.
        feature_dims: modality -> width of its features.
        dim: d, width of a part; an embedding has (M + 1) d numbers.
        hops: hops over the interactions; the released grid is 3 and 4.
        item_hops: hops over the items' neighbours.
        neighbours: k nearest neighbours of an item in each modality, itself included.
        modality_weights: modality -> weight of its neighbours, divided by their sum; equal ones if omitted. Released: image
            0.1, text 0.9.
        uniformity_weight: gamma; users and items have half of it each. Released: 0.5 and 0.9.
        min_similarity: lower bound of the similarity of two items' fused features.
        max_similarity: upper bound; released: 0.8 and 1. With 1 for both, the uniformity is not calibrated: the control.
        detach_similarity: whether the calibration leaves the fused features alone. Released: no, and they are then trained
            to be alike.
        alpha: lambda, the weight of the first of two modalities, is drawn from Beta(alpha, alpha) for each item and step;
            released: 0.1, 0.5 and 0.9.
        eval_lambda: lambda in evaluation.
        fusion: how three and more modalities are fused: ``"de_casteljau"`` or ``"fold"``.
        score: ``"dot"`` (released) or ``"cosine"``.
        k: lengths of the lists in evaluation.
        mask_validation: whether the test leaves out the items of validation as well; released: no.
        keep_features: store the directions of the features, in half precision, so that a loaded model has `add_items`.
        chunk_size: rows of a block of the losses; the engines choose if omitted.
        lr: learning rate of the default optimizer, Adam.
        weight_decay: its L2 penalty; in the release it has no effect.

    Raises:
        InputError: a value is out of range.

    Example:
        >>> model = CM3(num_users=3, num_items=5, feature_dims={"image": 4, "text": 3}, dim=2)
        >>> sum(parameter.numel() for parameter in model.parameters())
        149
    """

    sized_by_file = (
        *RecommenderModule.sized_by_file, "neighbour_items", "neighbour_weights", "item_parts", "item_features",
    )  # fmt: skip

    neighbour_items: Tensor | None
    neighbour_weights: Tensor | None
    item_parts: Tensor | None
    item_features: Tensor | None

    def __init__(
        self,
        *,
        num_users: int | None = None,
        num_items: int | None = None,
        feature_dims: dict[str, int] | None = None,
        dim: int = 64,
        hops: int = 3,
        item_hops: int = 1,
        neighbours: int = 10,
        modality_weights: dict[str, float] | None = None,
        uniformity_weight: float = 0.5,
        min_similarity: float = 0.0,
        max_similarity: float = 0.8,
        detach_similarity: bool = False,
        alpha: float = 0.5,
        eval_lambda: float = 0.5,
        fusion: Literal["de_casteljau", "fold"] = "de_casteljau",
        score: Literal["dot", "cosine"] = "dot",
        k: Sequence[int] = (5, 10, 20, 50),
        mask_validation: bool = False,
        keep_features: bool = False,
        chunk_size: int | None = None,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
    ) -> None:
        _check_choices(score=score, fusion=fusion)
        super().__init__(num_users=num_users, num_items=num_items, score=score, k=k, mask_validation=mask_validation)
        _check(
            dim=dim, hops=hops, item_hops=item_hops, neighbours=neighbours, uniformity_weight=uniformity_weight,
            alpha=alpha, eval_lambda=eval_lambda, lr=lr, weight_decay=weight_decay,
        )  # fmt: skip
        self.feature_dims = feature_dims
        self.shape_options: dict[str, Any] = {
            "dim": dim, "hops": hops, "item_hops": item_hops, "mode": fusion
        }  # fmt: skip
        self.neighbours = neighbours
        self.modality_weights = modality_weights
        self.uniformity_weight = uniformity_weight
        self.bounds: dict[str, Any] = {"min_similarity": min_similarity, "max_similarity": max_similarity}
        # A wrong bound is refused here, and not in the first step.
        calibration_statistics(torch.zeros(0, 1, device="cpu"), **self.bounds)
        self.detach_similarity = detach_similarity
        self.alpha = alpha
        self.eval_lambda = eval_lambda
        self.keep_features = keep_features
        self.chunk_size = chunk_size
        self.lr = lr
        self.weight_decay = weight_decay
        # What fit alone needs: neither stored, nor sent around by DDP, which it would be as buffers.
        self._features: dict[str, Tensor] = {}
        self._present: Tensor | None = None
        self._seed = 0
        if None not in (num_users, num_items, feature_dims):
            self.recommender = self.build()

    # -- data ------------------------------------------------------------------------------------------------------

    def build(self) -> MultimodalGraph:
        """Return the parameters for the sizes that are known."""
        assert self.num_users is not None
        assert self.feature_dims is not None
        if not self.feature_dims:
            raise InputError("feature_dims must have at least one modality; LightGCN is the recommender without any")
        return MultimodalGraph(self.num_users, self.feature_dims, **self.shape_options)

    @property
    def model(self) -> MultimodalGraph:
        """The parameters.

        Raises:
            InputError: there are none before the sizes are known.
        """
        if self.recommender is None:
            raise InputError("the model has no parameters yet: fit it, or load a stored one")
        return cast("MultimodalGraph", self.recommender)

    def read_data(self, data: Any) -> dict[str, Any]:
        """Take the features, with zeros where an item lacks them."""
        names = sorted(data.features)
        if not names:
            raise InputError("CM3 needs features of the items, and these data have none: give a file, or use LightGCN")
        present = torch.stack([data.present[name] for name in names], 1)
        features = {}
        for column, name in enumerate(names):
            rows = data.features[name].float()
            features[name] = rows if bool(present[:, column].all()) else torch.where(present[:, column, None], rows, 0)
            present[:, column] &= largest_entries(features[name]) != 0
        self._features, self._present = features, present
        return {"feature_dims": {name: int(rows.shape[1]) for name, rows in features.items()}}

    def fill(self) -> None:
        """Find the items' neighbours and make room for their parts; the first process alone searches."""
        graph = None
        if self._trainer is None or self.trainer.global_rank == 0:
            device = self.device if self._trainer is None else self.trainer.strategy.root_device
            graph = item_graph(
                [rows.to(device) for rows in self._features.values()], k=self.neighbours, present=self._present,
                modality_weights=self._weights(),
            ).to("cpu")  # fmt: skip
        if self._trainer is not None:
            graph = self.trainer.strategy.broadcast(graph)
            self._seed = int(self.trainer.strategy.broadcast(torch.initial_seed()))
        assert graph is not None
        self.neighbour_items = graph.neighbours.int().to(self.device)
        self.neighbour_weights = graph.weights.to(self.device)
        rows, width = len(graph.neighbours), self.model.parts * self.model.dim
        self.item_parts = self.model.user_parts.new_zeros(rows, width)
        if self.keep_features:
            directions = [unit_rows(features).half() for features in self._features.values()]
            self.item_features = torch.cat(directions, 1).to(self.device)

    def _weights(self) -> list[float] | None:
        if self.modality_weights is None:
            return None
        names = sorted(self.feature_dims or {})
        if sorted(self.modality_weights) != names:
            raise InputError(f"modality_weights must name the modalities {names}, got {sorted(self.modality_weights)}")
        return [float(self.modality_weights[name]) for name in names]

    def teardown(self, stage: str) -> None:
        """Compute the parts of the items once more, and let go of the features."""
        if self._features:
            self._refresh()
            self._features, self._present = {}, None
            self._tables.pop("features", None)

    def item_graph(self) -> ItemGraph:
        """The items' neighbours, on the model's device."""

        def make() -> ItemGraph:
            items, weights = self.neighbour_items, self.neighbour_weights
            if items is None or weights is None:
                raise InputError("the model has no graph of items yet: fit it, or load a stored one")
            shape = (self.num_items, self.model.parts - 1)
            wrong = tuple(items.shape[:2]) != shape or tuple(weights.shape) != shape or items.ndim != 3
            if wrong or int(items.min()) < 0 or int(items.max()) >= shape[0]:  # type: ignore[operator] # known by now
                raise InputError("the stored graph of items is not whole: store or pull the model anew")
            return ItemGraph(items.long(), weights)

        found: ItemGraph = self.table("item_graph", make)
        return found

    # -- embeddings ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _refresh(self) -> None:
        """Compute the parts of the items from the features, where they are at hand."""
        if self._features and self.item_parts is not None:
            with torch.autocast(self.device.type, enabled=False):
                self.item_parts.copy_(self._encode(self.eval_lambda)[0])
            self._embeddings = None

    def _encode(self, weight: float | Tensor) -> tuple[Tensor, Tensor]:
        features, present = self.table("features", self._move_features)
        return self.model.encoders(features, present, weight)  # type: ignore[no-any-return]

    def _move_features(self) -> tuple[dict[str, Tensor], Tensor]:
        if self._present is None:
            raise InputError("training needs the features: give fit a data module, or call attach(data)")
        dtype = self.model.user_parts.dtype
        return {m: rows.to(self.device, dtype) for m, rows in self._features.items()}, self._present.to(self.device)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return parameters and tables; the parts of the items are those of the parameters as they are now."""
        self._refresh()
        return super().state_dict(*args, **kwargs)

    def embed(self) -> tuple[Tensor, Tensor]:
        """Return the embeddings (users, S d) and (items, S d), with lambda fixed."""
        users, items = self._propagated()
        return self.model.user_embeddings(users), self.model.item_embeddings(items, self.item_graph())

    def _propagated(self) -> tuple[Tensor, Tensor]:
        self._refresh()
        parts, shape = self.item_parts, (self.num_items, self.model.parts * self.model.dim)
        if parts is None or tuple(parts.shape) != shape:
            raise InputError(f"the model has no parts of items of shape {shape}: fit it, or pull it anew")
        return self.model.propagate(parts.to(torch.promote_types(parts.dtype, torch.float32)), self.graph())

    # -- fit -------------------------------------------------------------------------------------------------------

    def fusion_weights(self, step: int) -> Tensor:
        """Return lambda of each item (I,), the same in every process.

        Args:
            step: number that tells the forwards of a run apart.
        """
        generator = torch.Generator(self.device).manual_seed((self._seed + step * 0x9E3779B97F4A7C15) % 2**63)
        both = torch.full((int(self.num_items or 0), 2), self.alpha, device=self.device)
        # What torch.distributions.Beta draws, which takes no generator.
        return torch._sample_dirichlet(both, generator=generator)[:, 0].clamp(0, 1)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of one batch."""
        parts, fused = self._encode(self.fusion_weights((self.current_epoch << 32) + batch_idx))
        losses = self.losses(batch, parts, fused)
        apart = losses["user_uniformity"] + losses["item_uniformity"]
        loss = losses["alignment"] + self.uniformity_weight * apart / 2
        logged = {f"train/{name}": value for name, value in losses.items()}
        self.log_dict({"train/loss": loss, **logged}, batch_size=len(batch["user"]))
        self._log_statistics(fused[batch["negative"]])
        return loss

    def losses(self, batch: Mapping[str, Tensor], parts: Tensor, fused: Tensor) -> dict[str, Tensor]:
        """Return the terms of the loss, ``alignment``, ``user_uniformity`` and ``item_uniformity``, unweighted.

        Args:
            batch: ``user``, ``positive`` and ``negative``, (B,) each.
            parts: of all items, (I, S d).
            fused: unit features of all items, (I, d).
        """
        users, items = self.model.propagate(parts, self.graph())
        user = self.model.user_embeddings(users, batch["user"])
        # The loss needs the items of the batch alone.
        rows = torch.cat([batch["positive"], batch["negative"]])
        positive, negative = self.model.item_embeddings(items, self.item_graph(), rows).tensor_split(2)
        given: dict[str, Any] = {"gather": self._spans_processes}
        blocks = {**given, "chunk_size": self.chunk_size}
        return {
            "alignment": alignment_loss(user, positive, **given),
            "user_uniformity": uniformity_loss(user, **blocks),
            "item_uniformity": calibrated_uniformity_loss(
                negative, fused[batch["negative"]], detach_similarity=self.detach_similarity, **self.bounds, **blocks
            ),
        }

    @property
    def _spans_processes(self) -> bool:
        return self._trainer is not None and self.trainer.training and self.trainer.world_size > 1

    def _log_statistics(self, fused: Tensor) -> None:
        if self.global_step % max(1, getattr(self.trainer, "log_every_n_steps", 50)):
            return
        found = calibration_statistics(fused, **self.bounds, gather=self._spans_processes, chunk_size=self.chunk_size)
        self.log_dict({f"cm3/{name}": value for name, value in found.items()}, batch_size=len(fused))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam; LightningCLI's ``optimizer`` and ``lr_scheduler`` take its place when given."""
        return torch.optim.Adam(self.parameters(), lr=self.lr, weight_decay=self.weight_decay)

    # -- new items -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def add_items(
        self,
        ids: Sequence[str],
        features: Mapping[str, Tensor],
        *,
        known_features: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Add items that have features and no interactions; from then on they are recommended, and stored with the model.

        A new item is what its features say, and the mean over its neighbours among the items of training. `recommend` with
        ``score="cosine"`` compares it fairly: inner products favour items with many interactions. Training again drops it.

        Args:
            ids: n new ids.
            features: modality -> (n, D_m). A modality may be left out, as if all of them lacked it; a row of zeros is an
                item that lacks it.
            known_features: features of the items of training, by modality, in their order (zeros for those that lack one),
                where the model was not trained with ``keep_features=True``.

        Raises:
            InputError: an id exists, the features do not fit, or those of the known items are not at hand.
        """
        names = names_to_tensor([*self.items.names, *ids])
        encoders, widths = self.model.encoders, self.feature_dims or {}
        known = known_rows(known_features, self.item_features, widths, items=self.num_items or 0)
        given, present = new_rows(features, widths, items=len(ids), like=self.model.user_parts)
        near = nearest_known(
            given, known, present, k=self.neighbours, modality_weights=self._weights() or [1.0] * len(widths)
        )
        parts = encoders(given, present, self.eval_lambda)[0]
        rows = self.model.new_item_embeddings(parts, self._propagated()[1], self.item_graph(), near)
        self.added_items = (
            rows if self.added_items is None else torch.cat([self.added_items, rows.to(self.added_items)])
        )
        self.item_id_bytes = names.to(self.device)
        self._forget()


def _check(**numbers: Any) -> None:
    lowest = {"dim": 1, "hops": 0, "item_hops": 0, "neighbours": 1, "uniformity_weight": 0, "weight_decay": 0}
    for name, value in numbers.items():
        if name in ("alpha", "lr"):
            good, rule = 0 < value < float("inf"), "positive"
        elif name == "eval_lambda":
            good, rule = 0 <= value <= 1, "in 0 … 1"
        else:
            good, rule = lowest[name] <= value < float("inf"), f"finite and at least {lowest[name]}"
        if not good:
            raise InputError(f"{name} must be {rule}, got {value}")


def _check_choices(**chosen: str) -> None:
    for name, value in chosen.items():
        require_choice(name, value, _CHOICES[name])
