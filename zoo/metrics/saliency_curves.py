"""Insertion and deletion: how a network's score changes while pixels come or go in the order of a saliency map."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as transforms

from zoo.errors import InputError, require_choice
from zoo.layer_taps import undisturbed
from zoo.losses.contracts import require_labels, require_number, working_dtype
from zoo.metrics.embeddings import RowsMetric, settings_digest
from zoo.metrics.saliency_ranks import require_maps, spread
from zoo.score_passes import Score, Targets

__all__ = ["Baseline", "InsertionDeletion", "SaliencyCurves", "insertion_deletion"]

Baseline = Literal["blur", "zero", "mean"]

_NARROW = 1e-2


class SaliencyCurves(NamedTuple):
    """Scores of images that are taken apart or put together step by step.

    Attributes:
        shares: shares (S + 1,) of the pixels that were changed, 0 … 1, float64.
        insertion: scores (B, S + 1) while the most salient pixels come in first: the baseline, …, the image.
        deletion: scores (B, S + 1) while they go first: the image, …, the baseline.
    """

    shares: Tensor
    insertion: Tensor
    deletion: Tensor

    @property
    def insertion_area(self) -> Tensor:
        """Area (B,) under each insertion curve, by trapezoids, float64; higher is better."""
        return torch.trapezoid(self.insertion.double(), self.shares, dim=1)

    @property
    def deletion_area(self) -> Tensor:
        """Area (B,) under each deletion curve, by trapezoids, float64; lower is better."""
        return torch.trapezoid(self.deletion.double(), self.shares, dim=1)


def insertion_deletion(
    model: nn.Module,
    images: Tensor,
    maps: Tensor,
    targets: Targets = None,
    *,
    steps: int | None = None,
    insertion_baseline: Baseline = "blur",
    deletion_baseline: Baseline = "zero",
    score: Score | None = None,
    batch_size: int = 64,
    blur_size: int = 11,
    blur_sigma: float = 5.0,
) -> SaliencyCurves:
    """Score each image while its pixels are taken away, and put in, from the most to the least salient.

    The network is run in eval mode, eagerly and without autocast, and left as it was, as by `zoo.saliency.saliency`; in
    any mode of gradients and inference. It makes 2 (S + 1) passes an image. Of equally salient pixels the first goes first,
    row by row from the top. The curves of an image do not depend on the rest of the batch.

    Source: Petsiuk, Das, Saenko: "RISE: Randomized Input Sampling for Explanation of Black-box Models" (BMVC 2018, arXiv
    1806.07421), cited from memory: probability of the class, as many pixels a step as a row has, a Gaussian of 11 pixels
    and standard deviation 5 for insertion, zeros for deletion. Deliberate difference: blurring mirrors the image at its
    edges, where the release fills up with zeros.

    Args:
        model: a network that is called with the images, on their device.
        images: (B, C, H, W) in floating point, normalised as the network expects.
        maps: saliency (B, 1, H, W), finite, of the size of the images.
        targets: classes, a number for all images or one each; the most likely if omitted. Anything with B rows where
            `score` is given.
        steps: S, the number of equal parts in which the pixels are changed, at most H W; H if omitted.
        insertion_baseline: what an image begins as: ``"blur"``, ``"zero"`` (the mean of the data, where images are
            normalised) or ``"mean"``, of each channel of the image.
        deletion_baseline: what it ends as.
        score: takes the output of the network and the rows of `targets` that belong to it, and returns one score an image
            (B,); the probability of the class, by softmax, if omitted.
        batch_size: images at a time.
        blur_size: pixels that the blur is wide, odd; at most 2 min(H, W) - 1 are taken.
        blur_sigma: its standard deviation in pixels.

    Returns:
        The curves, in float32 (float64 for float64).

    Raises:
        InputError: arguments that do not fit each other, an option out of range, or maps that are not finite (looked at on
            every device).

    Example:
        A network that looks at one pixel, and a map that knows it:

        >>> network = nn.Sequential(nn.Flatten(), nn.Linear(4, 1, bias=False))
        >>> _ = network[1].weight.data.copy_(torch.tensor([[0.0, 0.0, 1.0, 0.0]]))
        >>> image, knows = torch.ones(1, 1, 2, 2), torch.tensor([[[[0.0, 0.0], [9.0, 0.0]]]])
        >>> curves = insertion_deletion(
        ...     network, image, knows, steps=4, score=lambda output, _: output[:, 0], insertion_baseline="zero"
        ... )
        >>> curves.insertion, curves.deletion_area
        (tensor([[0., 1., 1., 1., 1.]]), tensor([0.1250], dtype=torch.float64))
    """
    _check_images(images, maps)
    pixels = maps[0].numel()
    steps = _check_steps(steps, pixels, images.shape[2])
    _check_options(insertion_baseline, deletion_baseline, batch_size, blur_size, blur_sigma)
    rows = _rows(targets, images)
    counts = torch.arange(steps + 1, device=images.device) * pixels // steps
    with undisturbed(model, images.device), torch.no_grad():
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), images.dtype)
        x = images.detach().to(dtype)
        run = functools.partial(_scores, model, score)
        if rows is None and score is None:
            rows = torch.cat([_logits(model(part.clone()), len(part)).argmax(1) for part in torch.split(x, batch_size)])
        order = maps.detach().to(images.device).flatten(1).sort(dim=1, descending=True, stable=True).indices
        ranks = order.argsort(1).view(maps.shape)
        baselines = {
            name: _baseline(name, x, blur_size, blur_sigma) for name in (insertion_baseline, deletion_baseline)
        }
        steps_of = functools.partial(_curves, run, ranks=ranks, counts=counts, targets=rows, batch_size=batch_size)
        insertion = steps_of(upper=x, lower=baselines[insertion_baseline])
        deletion = steps_of(upper=baselines[deletion_baseline], lower=x)
    return SaliencyCurves(counts.double() / pixels, insertion, deletion)


class InsertionDeletion(RowsMetric):
    """Areas under the insertion and the deletion curve, means over images; see `insertion_deletion`.

    Insertion is better when higher and deletion when lower. Kept are two numbers an image. A sampler that pads a shard by
    repeating samples makes those count twice. The network is given with each batch, so that the metric does not hold it.

    Source: as for `insertion_deletion`.

    Args:
        steps: as for `insertion_deletion`.
        insertion_baseline: as for `insertion_deletion`.
        deletion_baseline: as for `insertion_deletion`.
        score: as for `insertion_deletion`.
        batch_size: as for `insertion_deletion`.
        blur_size: as for `insertion_deletion`.
        blur_sigma: as for `insertion_deletion`.

    Raises:
        InputError: an option out of range.

    Example:
        >>> metric = InsertionDeletion(steps=2, insertion_baseline="zero", score=lambda output, _: output.mean((1, 2, 3)))
        >>> metric.update(nn.Identity(), torch.ones(3, 1, 2, 2), torch.rand(3, 1, 2, 2))
        >>> metric.compute()["insertion"], metric.compute()["images"]
        (tensor(0.5000), tensor(3))
    """

    is_differentiable = False
    full_state_update = False

    settings: Tensor

    def __init__(
        self,
        *,
        steps: int | None = None,
        insertion_baseline: Baseline = "blur",
        deletion_baseline: Baseline = "zero",
        score: Score | None = None,
        batch_size: int = 64,
        blur_size: int = 11,
        blur_sigma: float = 5.0,
    ) -> None:
        super().__init__()
        if steps is not None and steps < 1:
            raise InputError(f"steps must be at least 1, got {steps}")
        _check_options(insertion_baseline, deletion_baseline, batch_size, blur_size, blur_sigma)
        self.steps = steps
        self.insertion_baseline: Baseline = insertion_baseline
        self.deletion_baseline: Baseline = deletion_baseline
        self.score = score
        self.batch_size = batch_size
        self.blur_size = blur_size
        self.blur_sigma = blur_sigma
        self._add("insertion", torch.float64)
        self._add("deletion", torch.float64)
        name = getattr(score, "__qualname__", type(score).__name__)
        digest = settings_digest(steps, insertion_baseline, deletion_baseline, name, blur_size, float(blur_sigma))
        self.add_state("settings", digest, dist_reduce_fx="max")

    def update(self, model: nn.Module, images: Tensor, maps: Tensor, targets: Targets = None) -> None:
        """Take the images of a batch apart and put them together; an empty one adds nothing.

        Args:
            model: as for `insertion_deletion`; another network may come with each batch.
            images: as for `insertion_deletion`.
            maps: as for `insertion_deletion`.
            targets: as for `insertion_deletion`.

        Raises:
            InputError: as for `insertion_deletion`.
        """
        if images.shape[:1] == (0,) == maps.shape[:1]:
            return
        curves = insertion_deletion(
            model,
            images,
            maps,
            targets,
            steps=self.steps,
            insertion_baseline=self.insertion_baseline,
            deletion_baseline=self.deletion_baseline,
            score=self.score,
            batch_size=self.batch_size,
            blur_size=self.blur_size,
            blur_sigma=self.blur_sigma,
        )
        self.keep("insertion", curves.insertion_area)
        self.keep("deletion", curves.deletion_area)

    def compute(self) -> dict[str, Tensor]:
        """Return mean areas and their standard deviations over the images of all processes.

        Returns:
            Scalars ``insertion``, ``insertion_std``, ``deletion``, ``deletion_std``, float32, in units of the score, NaN
            without an image; the deviations are of the images at hand, divided by their number. ``images``: how many.
        """
        found = {}
        for name in ("insertion", "deletion"):
            areas = self.numbers(name)
            found[name] = areas.mean().float()
            found[f"{name}_std"] = spread(areas).float()
        return found | {"images": torch.tensor(len(self.numbers("insertion")), device=self.device)}


def _curves(
    run: Callable[[Tensor, Tensor | None], Tensor],
    upper: Tensor,
    lower: Tensor,
    ranks: Tensor,
    *,
    counts: Tensor,
    targets: Tensor | None,
    batch_size: int,
) -> Tensor:
    """Score (B, S + 1) images whose pixels of the first ranks come from `upper` and the others from `lower`."""
    parts = []
    for flat in torch.split(torch.arange(len(ranks) * len(counts), device=ranks.device), batch_size):
        image, step = flat // len(counts), flat % len(counts)
        mixed = torch.where(ranks[image] < counts[step].view(-1, 1, 1, 1), upper[image], lower[image])
        parts.append(run(mixed, None if targets is None else targets[image]))
    return torch.cat(parts).view(len(ranks), len(counts))


def _scores(model: nn.Module, score: Score | None, images: Tensor, targets: Tensor | None) -> Tensor:
    output = model(images)
    if score is None:
        assert targets is not None, "the most likely classes are looked up beforehand"
        logits = _logits(output, len(images))
        require_labels("targets", targets, rows=len(images), classes=logits.shape[1])
        return logits.softmax(1).gather(1, targets.long().unsqueeze(1)).squeeze(1)
    scores = score(output, targets)
    if not isinstance(scores, Tensor) or scores.shape != (len(images),):
        told = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise InputError(f"score must return one number an image, shape ({len(images)},), got {told}")
    return scores.to(working_dtype(scores))


def _logits(output: Any, rows: int) -> Tensor:
    if not isinstance(output, Tensor) or output.ndim != 2 or len(output) != rows:
        told = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise InputError(f"the network must return logits ({rows}, K), got {told}; give score=")
    return output.to(working_dtype(output))


def _baseline(name: Baseline, images: Tensor, size: int, sigma: float) -> Tensor:
    if name == "zero":
        return torch.zeros_like(images)
    if name == "mean":
        return images.mean((2, 3), keepdim=True).expand_as(images)
    # A kernel so narrow that the neighbours of a pixel weigh exp(-5000) is the pixel alone, and would be 0 / 0.
    if sigma < _NARROW:
        return images
    # Mirrored edges: no more than all pixels but one on each side.
    sizes = [min(size, 2 * side - 1) for side in (images.shape[3], images.shape[2])]
    blurred: Tensor = transforms.gaussian_blur(images, sizes, [sigma, sigma])
    return blurred


def _rows(targets: Targets, images: Tensor) -> Tensor | None:
    if targets is None:
        return None
    rows = torch.as_tensor(targets, device=images.device).detach()
    rows = rows.expand(len(images)) if rows.ndim == 0 else rows
    if len(rows) != len(images):
        raise InputError(f"targets must be one for all images or one each, {len(images)}, got {len(rows)}")
    return rows


def _check_images(images: Tensor, maps: Tensor) -> None:
    require_maps("maps", maps)
    if images.ndim != 4 or not images.is_floating_point() or len(images) == 0:
        raise InputError(
            f"images must be (B, C, H, W) in floating point, at least one, got shape {tuple(images.shape)} of {images.dtype}"
        )
    if maps.shape[0] != images.shape[0] or maps.shape[2:] != images.shape[2:]:
        raise InputError(
            f"maps must be one an image and of its size, {(len(images), 1, *images.shape[2:])}, got {tuple(maps.shape)}"
        )
    broken = maps.detach().isfinite().flatten(1).all(1).logical_not().nonzero().flatten().tolist()
    if broken:
        raise InputError(
            f"maps must be finite, {len(broken)} of {len(maps)} hold NaN or infinity, the first at position {broken[0]}; "
            "leave those images out"
        )


def _check_steps(steps: int | None, pixels: int, rows: int) -> int:
    steps = rows if steps is None else steps
    if not 1 <= steps <= pixels:
        raise InputError(f"steps must be in 1 … {pixels}, the number of pixels, got {steps}")
    return steps


def _check_options(insertion: str, deletion: str, batch_size: int, blur_size: int, blur_sigma: float) -> None:
    require_choice("insertion_baseline", insertion, get_args(Baseline))
    require_choice("deletion_baseline", deletion, get_args(Baseline))
    require_number("blur_sigma", blur_sigma, positive=True)
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, got {batch_size}")
    if blur_size < 1 or blur_size % 2 == 0:
        raise InputError(f"blur_size must be odd and at least 1, got {blur_size}")
