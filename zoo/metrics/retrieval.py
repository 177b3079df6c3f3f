"""Recall of retrieval between images and texts, with several texts an image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zoo.errors import InputError
from zoo.metrics.embeddings import (
    TIE,
    RowsMetric,
    cosines,
    first_of_each,
    require_embeddings,
    require_ids,
    require_ks,
    unit_rows,
)
from zoo.metrics.neighbours import block_rows

__all__ = ["RetrievalRecall"]

# The float32 scores, a copy with the foreign ones masked, and up to four masks.
_BYTES_PER_SCORE = 12


class RetrievalRecall(RowsMetric):
    """Share of queries that find a match among the k nearest items by cosine, image to text and text to image.

    An image finds a match if any of its texts is among the k nearest texts, a text if its image is among the k nearest
    images. The rank of a query is 1 + the number of foreign items that are not farther than its nearest match; "not
    farther" means a cosine that is not lower by more than 1e-6. So ties count against the query: embeddings that are
    all alike, or all zero, score near 0 and not 1. An item with NaN or infinity counts as nearer for every query it
    does not match; a query with them, or whose matches all have them, is found nowhere.

    Images with the same id are one image, of which the first is kept, so that batches of (image, text) pairs repeat an
    image as often as it has texts. Texts with the same text id are one text. With both ids the result is exact under
    samplers that pad a shard by repeating samples; without them those count twice.

    An image without a text, or a text without its image, is no query, yet it stays in the gallery as a distractor.

    Kept are unit rows in float32, which every process gathers at the end: 4 (images + texts) D bytes. Scores are
    computed for `chunk_size` queries at a time, in the precision that `torch.set_float32_matmul_precision` allows, and
    their matrix is never held.

    Source: R@k and the median rank as they are customary for COCO and Flickr30k; the project's notes on CWCL (section
    5) name R@1/5/10 both ways. How ties, doubles and rows that are not finite count is ours.

    Args:
        k: one k or several, at least 1. A k above the size of a gallery finds every query that has finite embeddings.
        chunk_size: queries a block; None takes as many as need 64 MiB, at least one.

    Raises:
        InputError: `k` or `chunk_size` is out of range.

    Example:
        >>> recall = RetrievalRecall(k=1)
        >>> images, texts = torch.eye(2), torch.tensor([[1.0, 0.1], [0.9, 0.2], [0.8, 0.3], [0.1, 1.0]])
        >>> recall.update(images, texts, torch.tensor([0, 1]), torch.tensor([0, 0, 1, 1]))
        >>> {name: value.item() for name, value in recall.compute().items()}  # doctest: +NORMALIZE_WHITESPACE
        {'image_to_text/r1': 1.0, 'image_to_text/median_rank': 1.0,
         'text_to_image/r1': 0.75, 'text_to_image/median_rank': 1.0}
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    def __init__(self, k: int | Sequence[int] = (1, 5, 10), *, chunk_size: int | None = None) -> None:
        super().__init__()
        self.k = require_ks("k", k)
        block_rows(chunk_size, 1)
        self.chunk_size = chunk_size
        for name in ("image_embeddings", "text_embeddings"):
            self.add_rows(name)
        for name in ("image_ids", "text_image_ids", "text_ids"):
            self.add_numbers(name)

    def update(
        self,
        image_embeddings: Tensor,
        text_embeddings: Tensor,
        image_ids: Tensor | None = None,
        text_image_ids: Tensor | None = None,
        text_ids: Tensor | None = None,
    ) -> None:
        """Keep a batch. A batch that is refused leaves what is kept as it was.

        - Neither id: row i of both is a pair, and every row is another image.
        - ``image_ids`` alone: row i of both is a pair, and an image may come again with its id.
        - ``image_ids`` and ``text_image_ids``: any number of both, an image in another batch than its texts too.

        Args:
            image_embeddings: embeddings (I, D) of images, of any length; detached here.
            text_embeddings: embeddings (T, D) of texts.
            image_ids: numbers (I,) of the images, at least 0, the same over all batches and processes.
            text_image_ids: numbers (T,) of the images that the texts belong to.
            text_ids: numbers (T,) of the texts, at least 0; a text whose number was there already is left out.

        Raises:
            InputError: wrong shapes or types, negative ids, or as many images as texts are needed and not given. The
                ids are looked at on every device.
        """
        require_embeddings("image_embeddings", image_embeddings)
        require_embeddings("text_embeddings", text_embeddings)
        images, texts = len(image_embeddings), len(text_embeddings)
        if image_embeddings.shape[1] != text_embeddings.shape[1]:
            raise InputError(
                f"text_embeddings must have the width of image_embeddings, {image_embeddings.shape[1]}, "
                f"got {text_embeddings.shape[1]}"
            )
        if text_image_ids is None and images != texts:
            raise InputError(
                f"image_embeddings and text_embeddings must be pairs, got {images} and {texts} rows; "
                "say which image a text belongs to by image_ids and text_image_ids"
            )
        if text_image_ids is not None and image_ids is None:
            raise InputError("text_image_ids needs image_ids, the numbers that it refers to")
        for name, ids, rows in (
            ("image_ids", image_ids, images),
            ("text_image_ids", text_image_ids, texts),
            ("text_ids", text_ids, texts),
        ):
            if ids is not None:
                require_ids(name, ids, rows)
        self.keep("image_embeddings", unit_rows(image_embeddings))
        self.keep("text_embeddings", unit_rows(text_embeddings))
        self.keep("image_ids", _or_unnumbered(image_ids, images))
        self.keep("text_image_ids", _or_unnumbered(image_ids if text_image_ids is None else text_image_ids, texts))
        self.keep("text_ids", _or_unnumbered(text_ids, texts))

    def compute(self) -> dict[str, Tensor]:
        """Rank the items of all processes.

        Returns:
            `image_to_text/r<k>` and `text_to_image/r<k>` in 0 … 1 and `…/median_rank` from 1, each a float32 scalar.
            NaN in a direction that has no query.

        Raises:
            InputError: batches or processes gave embeddings of different width.
        """
        # Rows without a number come in pairs, so the n-th unnumbered image and the n-th unnumbered text belong together.
        image_ids, text_image_ids = _numbered(self.numbers("image_ids")), _numbered(self.numbers("text_image_ids"))
        kept_images, kept_texts = first_of_each(image_ids), first_of_each(_numbered(self.numbers("text_ids")))
        images, image_ids = self.matrix("image_embeddings")[kept_images], image_ids[kept_images]
        texts, text_image_ids = self.matrix("text_embeddings")[kept_texts], text_image_ids[kept_texts]
        result = self._direction("image_to_text", images, image_ids, texts, text_image_ids)
        return result | self._direction("text_to_image", texts, text_image_ids, images, image_ids)

    def _direction(
        self, name: str, queries: Tensor, query_ids: Tensor, gallery: Tensor, gallery_ids: Tensor
    ) -> dict[str, Tensor]:
        rows = block_rows(self.chunk_size, _BYTES_PER_SCORE * len(gallery))
        blocks = zip(torch.split(queries, rows), torch.split(query_ids, rows), strict=True)
        ranks = torch.cat([_ranks(block, ids, gallery, gallery_ids) for block, ids in blocks])
        # The rank behind the gallery is not found, however large k is.
        result = {f"{name}/r{k}": (ranks <= min(k, len(gallery))).float().mean() for k in self.k}
        return result | {f"{name}/median_rank": _median(ranks)}


def _ranks(queries: Tensor, query_ids: Tensor, gallery: Tensor, gallery_ids: Tensor) -> Tensor:
    """Ranks from 1 of the queries that have a match; one behind the gallery if no cosine with a match is a number."""
    if len(gallery) == 0:
        return query_ids[:0]
    scores = cosines(queries, gallery)
    own = query_ids.unsqueeze(1) == gallery_ids
    best = scores.masked_fill(own.logical_not() | scores.isnan(), -torch.inf).amax(1, keepdim=True)
    foreign = (scores < best - TIE).logical_or_(own).logical_not_()
    ranks = torch.where(best.squeeze(1) == -torch.inf, len(gallery) + 1, foreign.sum(1) + 1)
    return ranks[own.any(1)]


def _median(ranks: Tensor) -> Tensor:
    if len(ranks) == 0:
        return torch.full((), torch.nan, device=ranks.device)
    middle = ranks.sort().values[[(len(ranks) - 1) // 2, len(ranks) // 2]]
    return middle.float().mean()


def _or_unnumbered(ids: Tensor | None, rows: int) -> Tensor:
    return torch.full((rows,), -1) if ids is None else ids


def _numbered(ids: Tensor) -> Tensor:
    """Number the rows without a number -1, -2, …, which no id is."""
    missing = ids < 0
    return torch.where(missing, -missing.cumsum(0), ids)
