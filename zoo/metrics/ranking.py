"""Recommendation against all items: Recall, NDCG, Precision and MAP at several lengths of the list."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.errors import InputError, require_choice
from zoo.interaction_graph import PairLists, require_lists
from zoo.metrics.embeddings import RowsMetric, require_embeddings, require_ks, settings_digest
from zoo.metrics.top_items import DEFAULT_MEMORY, ScoreName, ranked_items

__all__ = ["MEASURES", "FullRanking", "ranking_values"]

MEASURES = ("recall", "ndcg", "precision", "map")

# Values are summed as whole numbers of 2^-36, whose sum does not depend on the order: 2^27 users are no overflow.
_UNIT = 2.0**36


def ranking_values(hits: Tensor, held_out: Tensor, ks: Sequence[int]) -> Tensor:
    """Recall, NDCG, Precision and MAP of each user's list.

    With h_j whether place j of the list holds one of the user's n held-out items, j = 1, 2, …:

        recall@K     sum_{j<=K} h_j / n
        ndcg@K       sum_{j<=K} h_j / log2(j + 1)  /  sum_{j<=min(n, K)} 1 / log2(j + 1)
        precision@K  sum_{j<=K} h_j / K
        map@K        sum_{j<=K} h_j (h_1 + … + h_j) / j  /  min(n, K)

    Source: section 3 of the project's notes on CM3 (the definitions of MMRec's evaluation; RecBole's Recall and NDCG are
    the same).

    Args:
        hits: (users, places), bool, the best place first. Places behind the last are misses.
        held_out: whole numbers (users,): n. A user with none has the value 0 throughout.
        ks: lengths of the list, at least 1.

    Returns:
        (4, users, lengths) in 0 … 1, float64, in the order of `MEASURES`.

    Raises:
        InputError: shapes or types that do not fit, fewer held-out items than hits (looked at on the CPU only), or lengths
            that are not positive and different.

    Example:
        >>> ranking_values(torch.tensor([[False, True]]), torch.tensor([1]), [1, 2]).round(decimals=4).squeeze()
        tensor([[0.0000, 1.0000],
                [0.0000, 0.6309],
                [0.0000, 0.5000],
                [0.0000, 0.5000]], dtype=torch.float64)
    """
    ks = require_ks("ks", ks)
    _check_hits(hits, held_out)
    longest = max(ks)
    hits = F.pad(hits.double(), (0, max(0, longest - hits.shape[1])))[:, :longest]
    places = torch.arange(1, longest + 1, device=hits.device, dtype=hits.dtype)
    at = torch.tensor(ks, device=hits.device)
    found = hits.cumsum(1)
    gains = (places + 1).log2().reciprocal()
    best = F.pad(gains.cumsum(0), (1, 0))
    reachable = torch.minimum(held_out.unsqueeze(1), at)  # min(n, K)
    # Without held-out items there are no hits: 0 / 1.
    values = [
        found[:, at - 1] / held_out.clamp_min(1).unsqueeze(1),
        (hits * gains).cumsum(1)[:, at - 1] / best[reachable.clamp_min(1)],
        found[:, at - 1] / at,
        (hits * found / places).cumsum(1)[:, at - 1] / reachable.clamp_min(1),
    ]
    return torch.stack(values)


def _check_hits(hits: Tensor, held_out: Tensor) -> None:
    if hits.ndim != 2 or hits.dtype != torch.bool:
        raise InputError(f"hits must be bool (users, places), got {hits.dtype} of shape {tuple(hits.shape)}")
    if held_out.dtype not in (torch.int64, torch.int32) or held_out.shape != hits.shape[:1]:
        raise InputError(
            f"held_out must be one whole number a user, int64 of shape ({len(hits)},), got {held_out.dtype} of shape "
            f"{tuple(held_out.shape)}"
        )
    if hits.device.type == "cpu" and bool((hits.sum(1) > held_out).any()):
        raise InputError("held_out must be at least the number of hits of a user")


class FullRanking(RowsMetric):  # for its states of whole numbers, which keep their type; there are no rows
    """Recall, NDCG, Precision and MAP of each user's best items among all, averaged over users with equal weight.

    Users without a held-out item do not count. Items to leave out of a list (as a rule those of training) are given with
    each batch; held-out items among them count as misses. See `ranking_values` for the formulas, which are MMRec's:
    recall is divided by n and not by min(n, K), precision always by K.

    Lists are those of `topk_items`: exact, of equal scores the lower item first, streamed in blocks under a memory
    budget. Embeddings that are not finite are never found and find nothing.

    Kept are sums of whole numbers and a count, which processes add up: the result is the same, to the last bit, for any
    batches, blocks, shards and devices, provided that no user is given twice. Samplers that pad a shard by repeating
    users have to be told not to.

    Args:
        k: one length of the list or several, at least 1.
        score: `"dot"` or `"cosine"`, as for `topk_items`.
        memory: bytes that a block of scores may take.

    Raises:
        InputError: an option is out of range.

    Example:
        Item 1 is the best for the only user, then item 0, who is held out:

        >>> metric = FullRanking(k=(1, 2))
        >>> held_out = PairLists(torch.tensor([0, 1]), torch.tensor([0]))
        >>> metric.update(torch.tensor([[1.0]]), torch.tensor([[2.0], [3.0], [1.0]]), held_out)
        >>> {name: round(float(value), 4) for name, value in metric.compute().items()}  # doctest: +NORMALIZE_WHITESPACE
        {'recall@1': 0.0, 'recall@2': 1.0, 'ndcg@1': 0.0, 'ndcg@2': 0.6309,
         'precision@1': 0.0, 'precision@2': 0.5, 'map@1': 0.0, 'map@2': 0.5}
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    def __init__(
        self, k: int | Sequence[int] = (5, 10, 20, 50), *, score: ScoreName = "dot", memory: int = DEFAULT_MEMORY
    ) -> None:
        super().__init__()
        self.k = require_ks("k", k)
        require_choice("score", score, ("dot", "cosine"))
        if memory < 1:
            raise InputError(f"memory must be at least 1 byte, got {memory}")
        self.score: ScoreName = score
        self.memory = memory
        self.sums: Tensor
        self.users: Tensor
        self.add_state("sums", torch.zeros(len(MEASURES), len(self.k), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("users", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("settings", settings_digest(self.k, score), dist_reduce_fx="max")

    def update(
        self, user_embeddings: Tensor, item_embeddings: Tensor, held_out: PairLists, seen: PairLists | None = None
    ) -> None:
        """Rank all items for a batch of users.

        Args:
            user_embeddings: (B, d).
            item_embeddings: (I, d), of all items, in every batch.
            held_out: the items that each of the B users is to find, by position: `lists.select(user_numbers)`.
            seen: the items that each of them is not to find; None for none.

        Raises:
            InputError: wrong shapes or types, or items that do not exist.
        """
        require_embeddings("user_embeddings", user_embeddings)
        require_embeddings("item_embeddings", item_embeddings)
        require_lists("held_out", held_out, rows=len(user_embeddings), columns=len(item_embeddings))
        if seen is not None:
            require_lists("seen", seen, rows=len(user_embeddings), columns=len(item_embeddings))
        found = ranked_items(
            user_embeddings,
            item_embeddings,
            max(self.k),
            score=self.score,
            exclude=seen,
            memory=self.memory,
        )
        held_out = held_out.to(found.device)
        hits, lengths = held_out.contains(found), held_out.lengths()
        if hits.device.type == "mps":  # which has no float64
            hits, lengths = hits.cpu(), lengths.cpu()
        values = ranking_values(hits, lengths, self.k)
        self.sums += values.mul_(_UNIT).round_().to(torch.int64).sum(1).to(self.device)
        self.users += (lengths > 0).sum().to(self.device)

    def compute(self) -> dict[str, Tensor]:
        """Average over the users of all processes.

        Returns:
            `recall@K`, `ndcg@K`, `precision@K` and `map@K` for each K, float32 scalars in 0 … 1; NaN without a user.
        """
        # On the CPU, because MPS has no float64.
        means = (self.sums.cpu().double() / _UNIT / self.users.cpu()).float().to(self.device)
        return {
            f"{measure}@{k}": means[row, column]
            for row, measure in enumerate(MEASURES)
            for column, k in enumerate(self.k)
        }
