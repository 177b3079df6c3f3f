"""Zero-shot classification: prompts of each class against the embeddings of samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor
from torchmetrics import Metric

from zoo.errors import InputError, require_choice
from zoo.losses.contracts import require_labels
from zoo.metrics.embeddings import TIE, cosines, require_embeddings, require_ks, settings_digest, unit_rows

__all__ = ["ZeroShotAccuracy", "class_embeddings", "class_prompts"]


def class_prompts(class_names: Sequence[str], templates: Sequence[str] = ("a photo of a {}.",)) -> list[list[str]]:
    """Fill the names of classes into templates.

    Args:
        class_names: names of the classes.
        templates: sentences with `{}` where the name goes; other braces stay as they are.

    Returns:
        One list of prompts a class, in the order of the templates.

    Raises:
        InputError: a string in place of a list, nothing in a list, or a template without `{}`.

    Example:
        >>> class_prompts(["cat", "dog"], ["a photo of a {}.", "a {} in the snow."])
        [['a photo of a cat.', 'a cat in the snow.'], ['a photo of a dog.', 'a dog in the snow.']]
    """
    _require_strings("class_names", class_names)
    _require_strings("templates", templates)
    for template in templates:
        if "{}" not in template:
            raise InputError(f"templates must hold {{}} where the name of the class goes, got {template!r}")
    return [[template.replace("{}", name) for template in templates] for name in class_names]


@torch.no_grad()
def class_embeddings(
    encode: Callable[[list[str]], Tensor], prompts: Sequence[Sequence[str]], *, batch_size: int = 256
) -> Tensor:
    """Embed each class as the mean direction of its prompts: unit vector a prompt, mean over the prompts, unit vector.

    Without gradients. Whether the text tower is in eval mode is the caller's affair.

    Source: the project's notes on CWCL (section 5), for the prompt ensembling of CLIP (arXiv 2103.00020, section 3.1.4,
    cited from memory).

    Args:
        encode: prompts -> embeddings (B, D), of any length.
        prompts: prompts of each class, as many as one likes; `class_prompts` makes them from names and templates.
        batch_size: how many prompts `encode` gets at once at most.

    Returns:
        Unit rows (K, D), float32 (float64 if `encode` returns that), on the device of `encode`. A class whose prompts
        cancel, or are all embedded as zero, has a row of zeros; one with a NaN among its prompts has NaN.

    Raises:
        InputError: no class, a class without prompts, a string in place of a list, or an `encode` that returns anything
            but one row a prompt.

    Example:
        >>> vectors = {"north": [0.0, 2.0], "up": [0.0, 5.0], "east": [3.0, 0.0]}
        >>> encode = lambda texts: torch.tensor([vectors[text] for text in texts])
        >>> class_embeddings(encode, [["north", "up"], ["east"]])
        tensor([[0., 1.],
                [1., 0.]])
    """
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, got {batch_size}")
    if isinstance(prompts, str) or not prompts:
        raise InputError(f"prompts must be one list of strings a class, got {prompts!r}")
    for position, sentences in enumerate(prompts):
        _require_strings(f"prompts[{position}]", sentences)
    texts = [text for sentences in prompts for text in sentences]
    parts = []
    for start in range(0, len(texts), batch_size):
        batch = texts[start : start + batch_size]
        rows = encode(batch)
        require_embeddings("what encode returns", rows)
        if len(rows) != len(batch):
            raise InputError(f"encode must return one row a prompt, got {len(rows)} for {len(batch)} prompts")
        parts.append(unit_rows(rows))
    by_class = torch.split(torch.cat(parts), [len(sentences) for sentences in prompts])
    return unit_rows(torch.stack([rows.mean(0) for rows in by_class]))


class ZeroShotAccuracy(Metric):
    """Share of samples whose class is among the k classes nearest by cosine.

    A class counts as nearer than that of the sample unless its cosine is lower by more than 1e-6. So ties count against
    the sample, whatever the order of the classes: a tower that embeds everything alike scores 0 and not 1/K, and so do
    samples embedded as zero. An argmax takes the first of tied classes instead. Embeddings with NaN or infinity are
    wrong, and so are all samples if a class has them (except those whose class is still among the k).

    Cosines are float32, under autocast too, in the precision that `torch.set_float32_matmul_precision` allows. Kept are
    counts, which are added over processes. A sampler that pads a shard by repeating samples makes those count twice.

    With one k as a number the result is a scalar, which `self.log("val/zero_shot", metric)` of Lightning takes. With
    several it is a dictionary for `self.log_dict(metric.compute())` in `on_validation_epoch_end`, with a
    `metric.reset()` after it, or for a `MetricCollection`.

    Args:
        class_embeddings: embeddings (K, D) of the classes, of any length, detached here; None if `set_classes` gives
            them before the first batch.
        k: one k or several, in 1 … K.
        average: `"micro"` weighs samples alike, `"macro"` classes, those without samples left out.

    Raises:
        InputError: an option out of range, k above K, or class embeddings that are no matrix.

    Example:
        >>> metric = ZeroShotAccuracy(torch.eye(3), k=(1, 2))
        >>> metric.update(torch.tensor([[5.0, 1.0, 0.0], [3.0, 2.0, 0.0]]), torch.tensor([0, 1]))
        >>> metric.compute()
        {'top1': tensor(0.5000), 'top2': tensor(1.)}
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    hits: Tensor
    counts: Tensor
    settings: Tensor

    def __init__(
        self,
        class_embeddings: Tensor | None = None,
        *,
        k: int | Sequence[int] = (1, 5),
        average: Literal["micro", "macro"] = "micro",
    ) -> None:
        super().__init__()
        require_choice("average", average, ("micro", "macro"))
        self.k = require_ks("k", k)
        self.scalar = isinstance(k, int)
        self.average = average
        self.class_embeddings: Tensor | None = None
        if class_embeddings is None:
            self._add_counts(0)
        else:
            self.set_classes(class_embeddings)

    def set_classes(self, class_embeddings: Tensor) -> None:
        """Replace the class embeddings, as at the start of an epoch; their number may change.

        Args:
            class_embeddings: embeddings (K, D), of any length; detached here.

        Raises:
            InputError: no matrix, k above K, or samples counted already with the old ones.
        """
        require_embeddings("class_embeddings", class_embeddings)
        if self.update_called:
            raise InputError("class_embeddings cannot change between batches of one result; call reset() first")
        if max(self.k) > len(class_embeddings):
            raise InputError(
                f"k must be at most the number of classes, got {max(self.k)} for {len(class_embeddings)} classes"
            )
        self.class_embeddings = unit_rows(class_embeddings).to(self.device, torch.float32)
        self._add_counts(len(class_embeddings))

    def update(self, embeddings: Tensor, targets: Tensor) -> None:
        """Count a batch; an empty one adds nothing.

        Args:
            embeddings: embeddings (B, D) of samples, of any length; detached here.
            targets: labels (B,) in 0 … K - 1. Their contents are looked at on every device.

        Raises:
            InputError: wrong shapes or types, labels out of range, or no class embeddings yet.
        """
        if self.class_embeddings is None:
            raise InputError("class_embeddings are missing; call set_classes(class_embeddings) before the first batch")
        classes = self.class_embeddings = self.class_embeddings.to(self.device)
        require_embeddings("embeddings", embeddings)
        if embeddings.shape[1] != classes.shape[1]:
            raise InputError(
                f"embeddings must have the width of class_embeddings, {classes.shape[1]}, got {embeddings.shape[1]}"
            )
        # On the CPU, where the range of the labels is looked at.
        require_labels("targets", targets.cpu(), rows=len(embeddings), classes=len(classes))
        targets = targets.to(self.device, torch.int64)
        scores = cosines(unit_rows(embeddings).to(self.device, torch.float32), classes)
        own = scores.gather(1, targets.unsqueeze(1))
        # Not "at least as near", which NaN would pass. The class itself is among them and makes ranks begin with 1.
        ranks = (scores < own - TIE).logical_not().sum(1, keepdim=True)
        hits = (ranks <= torch.tensor(self.k, device=self.device)) & own.isfinite()
        # Not in place: a reset inside inference_mode leaves tensors that cannot be changed outside of it.
        self.hits = self.hits.index_add(0, targets, hits.to(self.hits.dtype))
        self.counts = self.counts.index_add(0, targets, torch.ones_like(targets, dtype=self.counts.dtype))

    def compute(self) -> Tensor | dict[str, Tensor]:
        """Divide hits by samples, over all processes.

        Returns:
            Shares in 0 … 1, float32: a scalar for a single k, else `{"top1": …, "top5": …}`. NaN if there was no
            sample.
        """
        if self.average == "micro":
            shares = self.hits.sum(0) / self.counts.sum()
        else:
            seen = self.counts > 0
            shares = (self.hits[seen] / self.counts[seen].unsqueeze(1)).mean(0)
        return shares[0] if self.scalar else {f"top{k}": share for k, share in zip(self.k, shares, strict=True)}

    def _add_counts(self, classes: int) -> None:
        zeros = torch.zeros(classes, dtype=torch.int64, device=self.device)
        self.add_state("hits", zeros.unsqueeze(1).repeat(1, len(self.k)), dist_reduce_fx="sum")
        self.add_state("counts", zeros, dist_reduce_fx="sum")
        digest = settings_digest(self.class_embeddings, self.k).to(self.device)
        self.add_state("settings", digest, dist_reduce_fx="max")


def _require_strings(name: str, value: Sequence[str]) -> None:
    if isinstance(value, str):
        raise InputError(f"{name} must be a list of strings, got the string {value!r}; put it into a list")
    if not value or not all(isinstance(item, str) for item in value):
        raise InputError(f"{name} must be a list of at least one string, got {value!r}")
