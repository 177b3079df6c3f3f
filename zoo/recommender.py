"""`RecommenderModule`: evaluation against all items, and lists of items for users."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from zoo.embedding_export import write_embeddings
from zoo.errors import InputError
from zoo.interaction_graph import PairLists, pair_lists
from zoo.interaction_model import InteractionModel
from zoo.metrics.ranking import FullRanking
from zoo.metrics.top_items import ScoreName, topk_items

__all__ = ["Recommendations", "RecommenderModule"]

# Users of the stored check that a loaded model scores as it did, and up to how many items there is one.
_EXAMPLE_USERS = 4
_EXAMPLE_ITEMS = 1 << 20
_NEW_USER = " For a new user give histories={id: [ids of items]}, where an empty list stands for no history."


class Recommendations(NamedTuple):
    """What `RecommenderModule.recommend` and `similar_items` return: a list for each id asked, the best first."""

    items: list[list[str]]
    scores: list[list[float]]


class RecommenderModule(InteractionModel):
    """Users, items and their embeddings; a subclass says how these come about and are learned.

    A batch of training is a dict of whole numbers (B,), ``user``, ``positive`` and ``negative``; one of evaluation has
    ``user`` (B,) and ``held_out``, the offsets and items of these users' `zoo.interaction_graph.PairLists`.

    Args:
        num_users: number of users, if known.
        num_items: number of items, if known.
        score: ``"dot"`` or ``"cosine"``.
        k: lengths of the lists in evaluation.
        mask_validation: whether the test leaves out the items of validation as well.
    """

    def __init__(
        self,
        *,
        num_users: int | None,
        num_items: int | None,
        score: ScoreName,
        k: Sequence[int],
        mask_validation: bool,
    ) -> None:
        super().__init__(num_users=num_users, num_items=num_items)
        self.score: ScoreName = score
        self.ranking = FullRanking(tuple(k), score=score)
        self.mask_validation = mask_validation

    # -- evaluation ------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores (B, items) of users (B,), given as numbers of the order of ``users.names``."""
        users, items = self.embeddings()
        users = users[x]
        if self.score == "cosine":
            users, items = nn.functional.normalize(users, dim=1), nn.functional.normalize(items, dim=1)
        return users @ items.t()

    def example_input(self, generator: torch.Generator) -> Tensor | None:
        """Return the numbers of the first users, or None where there are too many items to score them at every load."""
        if self.recommender is None or len(self.items) > _EXAMPLE_ITEMS:
            return None
        return torch.arange(min(_EXAMPLE_USERS, self.num_users or 0))

    def on_validation_epoch_start(self) -> None:
        """Compute the embeddings anew from the parameters as they are now."""
        self._embeddings = None
        self.ranking.reset()

    def on_test_epoch_start(self) -> None:
        """See `on_validation_epoch_start`."""
        self.on_validation_epoch_start()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Rank all items for the users of a batch."""
        self._rank(batch, self.seen())

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Rank all items for the users of a batch."""
        self._rank(batch, self.table("masked", self._read_masked) if self.mask_validation else self.seen())

    def _read_masked(self) -> PairLists:
        data: Any = getattr(self.trainer, "datamodule", None)
        if data is None:
            raise InputError("mask_validation needs the interactions of validation: give a data module")
        seen = self.seen()
        users, items = data.interactions["val"].to(self.device)
        rows, columns = torch.cat([seen.rows(), users]), torch.cat([seen.columns, items])
        assert self.num_users is not None
        assert self.num_items is not None
        return pair_lists(rows, columns, num_rows=self.num_users, num_columns=self.num_items)

    def _rank(self, batch: Any, seen: PairLists) -> None:
        users, items = self.embeddings()
        rows = batch["user"]
        self.ranking.update(users[rows], items[: self.num_items], PairLists(*batch["held_out"]), seen.select(rows))

    def on_validation_epoch_end(self) -> None:
        """Log the measures of the split."""
        self._log_measures("val")

    def on_test_epoch_end(self) -> None:
        """Log the measures of the split."""
        self._log_measures("test")

    def _log_measures(self, split: str) -> None:
        found = {f"{split}/{name}": value for name, value in self.ranking.compute().items() if not value.isnan()}
        self.ranking.reset()
        # Every process has computed the value of all of them; the mean only says so to Lightning.
        self.log_dict(found, sync_dist=True)

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Return ``user`` (B,), and ``item`` and ``score`` (B, longest k) of the best items that they have not seen."""
        users, items = self.embeddings()
        rows = batch["user"]
        best = topk_items(
            users[rows],
            items[: self.num_items],
            max(self.ranking.k),
            score=self.score,
            exclude=self.seen().select(rows),
        )
        return {"user": rows, "item": best.items, "score": best.scores}

    # -- recommendations -------------------------------------------------------------------------------------------

    def recommend(
        self,
        user_ids: Sequence[str],
        k: int = 10,
        *,
        exclude_seen: bool = True,
        candidates: Sequence[str] | None = None,
        histories: Mapping[str, Sequence[str]] | None = None,
        score: ScoreName | None = None,
    ) -> Recommendations:
        """Find the best items of users.

        Args:
            user_ids: ids of users, in any order.
            k: items of each list, at least 1. A list is shorter where fewer items are left.
            exclude_seen: leave out the items that a user had in training, or has in `histories`.
            candidates: ids of the items that count; None for all.
            histories: for users whom the model does not know: id -> ids of their items. Such a user is the mean of these
                items' embeddings, and that of all users without any.
            score: `"dot"` or `"cosine"`; the model's own if omitted. Cosines do not disadvantage items of `add_items`.

        Returns:
            Ids and scores.

        Raises:
            InputError: an unknown id, or an option out of range.
        """
        if isinstance(user_ids, str):
            self.users.positions(user_ids)  # which refuses it
        histories = dict(histories or {})
        known = [name for name in user_ids if name not in histories]
        places = dict(zip(known, self.users.positions(known, _NEW_USER), strict=True))
        had = {name: self.items.positions(names) for name, names in histories.items()}
        users, items = self.embeddings()
        chosen, rows, columns = [], [], []
        seen = self.seen().to("cpu")
        for row, name in enumerate(user_ids):
            if name in had:
                chosen.append(items[had[name]].mean(0) if had[name] else users.mean(0))
                own = had[name]
            else:
                chosen.append(users[places[name]])
                own = seen.columns[seen.offsets[places[name]] : seen.offsets[places[name] + 1]].tolist()
            columns += own
            rows += [row] * len(own)
        if not chosen:
            return Recommendations([], [])
        excluded = pair_lists(
            torch.tensor(rows, dtype=torch.int64), torch.tensor(columns, dtype=torch.int64),
            num_rows=len(chosen), num_columns=len(items),
        )  # fmt: skip
        picked = None if candidates is None else torch.tensor(self.items.positions(candidates), dtype=torch.int64)
        best = topk_items(
            torch.stack(chosen), items, k, score=score or self.score, candidates=picked,
            exclude=excluded if exclude_seen else None,
        )  # fmt: skip
        return self._named(best.items, best.scores)

    def similar_items(self, item_ids: Sequence[str], k: int = 10) -> Recommendations:
        """Find the items nearest to items by the cosine of their embeddings, themselves left out.

        Args:
            item_ids: ids of items.
            k: items of each list, at least 1.

        Returns:
            Ids and cosines.

        Raises:
            InputError: an unknown id, or `k` below 1.
        """
        places = torch.tensor(self.items.positions(item_ids), dtype=torch.int64)
        items = self.embeddings()[1]
        themselves = PairLists(torch.arange(len(places) + 1), places)
        best = topk_items(items[places.to(items.device)], items, k, score="cosine", exclude=themselves)
        return self._named(best.items, best.scores)

    def _named(self, items: Tensor, scores: Tensor) -> Recommendations:
        names = self.items.names
        rows = [
            [(names[item], value) for item, value in zip(*row, strict=True) if item >= 0]
            for row in zip(items.tolist(), scores.tolist(), strict=True)
        ]
        return Recommendations(
            [[name for name, _ in row] for row in rows], [[value for _, value in row] for row in rows]
        )

    def export_embeddings(self, path: str | Path) -> Path:
        """Write the embeddings of users and items for a search engine, with the measure ``"ip"`` or ``"cos"``.

        Args:
            path: a file that ends in ``.npz`` or ``.parquet``; see `zoo.embedding_export.write_embeddings`.

        Returns:
            The path.

        Raises:
            InputError: another suffix, or no such folder.
        """
        users, items = self.embeddings()
        measure: Literal["ip", "cos"] = "ip" if self.score == "dot" else "cos"
        return write_embeddings(
            path, users=users, items=items, user_ids=self.users.names, item_ids=self.items.names, measure=measure
        )
