"""One score an image, and what layers inside a network have to do with it: with its own weights, or after a meta step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from zoo.errors import InputError
from zoo.layer_taps import Capture, LayerTaps, undisturbed
from zoo.losses.contracts import require_labels, working_dtype

__all__ = ["Passed", "Score", "ScorePasses", "Targets"]

Score = Callable[[Any, Any], Tensor]
Targets = int | Sequence[int] | Tensor | None


class Passed(NamedTuple):
    """What the passes over a batch gave; nothing has a graph.

    Attributes:
        captures: activation and gradient of each layer.
        scores: the score (B,) of each image, in float32 or float64.
        targets: what was explained, with one row an image; None if a function decides.
        output: what the network returned, None if it is no tensor.
    """

    captures: dict[str, Capture]
    scores: Tensor
    targets: Tensor | None
    output: Tensor | None


class ScorePasses:
    """Runs a network and goes back from its scores to its layers, without touching it.

    The weights take part as constants, by `torch.func.functional_call`: whether they are trained or frozen, nothing in
    front of the first layer is recorded, and ``.grad`` stays as it is.

    Args:
        taps: the network and the layers.
        score: takes the output and the targets that belong to it, and returns one score an image; the logit of the class,
            or the cosine with an embedding, if omitted.
        meta_lr: size of one step of gradient descent on each image beforehand, none if omitted.

    Raises:
        InputError: a step that is not finite.
    """

    def __init__(self, taps: LayerTaps, score: Score | None = None, meta_lr: float | None = None) -> None:
        if meta_lr is not None and not math.isfinite(meta_lr):
            raise InputError(f"meta_lr must be finite, got {meta_lr}")
        self.taps = taps
        self.score = score
        self.meta_lr = meta_lr

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def run(self, images: Tensor, targets: Targets = None) -> Passed:
        """Return the captures of a batch, in whatever mode of gradients, inference and precision it is called.

        Args:
            images: (B, C, H, W) in floating point, at least one.
            targets: as for `zoo.saliency.saliency`.

        Raises:
            InputError: images, targets, output or layers that do not fit each other.
        """
        if images.ndim != 4 or not images.is_floating_point() or len(images) == 0:
            raise InputError(
                f"images must be (B, C, H, W) in floating point, at least one, got shape {tuple(images.shape)} of "
                f"{images.dtype}"
            )
        rows = _rows(targets, images, embedding=self.score is None)
        model = self.taps.model
        with undisturbed(model, images.device):
            plain = {name: parameter.detach() for name, parameter in model.named_parameters()}
            dtype = next((p.dtype for p in plain.values() if p.is_floating_point()), images.dtype)
            # Clones: what inference mode made cannot be recorded, and the network may change its input in place.
            x = images.detach().clone().to(dtype)
            y = None if rows is None else rows.detach().clone()
            if self.meta_lr is None:
                return self._pass(plain, x, y)
            return _joined(
                [
                    self._pass(*self._after_step(plain, x[row : row + 1], None if y is None else y[row : row + 1]))
                    for row in range(len(x))
                ]
            )

    def _pass(self, parameters: dict[str, Tensor], x: Tensor, targets: Tensor | None) -> Passed:
        def back(output: Any) -> Passed:
            scores, chosen = self._scores(output, targets, len(x))
            captures = self.taps.captures(scores)
            return Passed(captures, scores.detach(), chosen, output.detach() if isinstance(output, Tensor) else None)

        with self.taps:
            passed: Passed = _call(self.taps.model, parameters, x, back)
        return passed

    def _after_step(
        self, plain: dict[str, Tensor], x: Tensor, targets: Tensor | None
    ) -> tuple[dict[str, Tensor], Tensor, Tensor | None]:
        """Return all parameters after one step of plain gradient descent on one image, with what `_pass` needs else."""
        assert self.meta_lr is not None
        leaves = {n: p.detach().requires_grad_() if p.is_floating_point() else p for n, p in plain.items()}
        names = [name for name, leaf in leaves.items() if leaf.requires_grad]

        def back(output: Any) -> tuple[tuple[Tensor | None, ...], Tensor | None]:
            scores, chosen = self._scores(output, targets, len(x))
            if self.score is None and chosen is not None and not chosen.is_floating_point():
                loss = F.cross_entropy(output.to(working_dtype(output)), chosen)
            else:
                loss = -scores.sum()
            return torch.autograd.grad(loss, [leaves[name] for name in names], allow_unused=True), chosen

        gradients, explained = _call(self.taps.model, leaves, x, back)
        stepped = dict(plain)
        for name, gradient in zip(names, gradients, strict=True):
            if gradient is not None:
                stepped[name] = plain[name] - self.meta_lr * gradient
        return stepped, x, explained

    def _scores(self, output: Any, targets: Tensor | None, rows: int) -> tuple[Tensor, Tensor | None]:
        """Return one score an image, in float32 or float64, and what was explained."""
        if self.score is not None:
            scores = self.score(output, targets)
            if not isinstance(scores, Tensor) or scores.shape != (rows,):
                raise InputError(f"score must return one number an image, shape ({rows},), got {_told(scores)}")
            return scores.to(working_dtype(scores)), targets
        if not isinstance(output, Tensor) or output.ndim != 2 or len(output) != rows:
            raise InputError(
                f"the network must return logits or embeddings ({rows}, K), got {_told(output)}; give score="
            )
        values = output.to(working_dtype(output))
        if targets is not None and targets.is_floating_point():
            if targets.shape != output.shape:
                raise InputError(
                    f"targets in floating point must be embeddings as wide as the network's, {output.shape[1]}, got shape "
                    f"{tuple(targets.shape)}; classes have an integer type"
                )
            return F.cosine_similarity(values, targets.to(values.dtype), dim=1), targets
        classes = output.argmax(1) if targets is None else targets
        require_labels("targets", classes, rows=rows, classes=output.shape[1])
        return values.gather(1, classes.long().unsqueeze(1)).squeeze(1), classes.long()


class _WayBack(nn.Module):
    """A network, and what is done with its output before the weights that took part are gone."""

    def __init__(self, model: nn.Module, back: Callable[[Any], Any]) -> None:
        super().__init__()
        self.model = model
        self.back = back

    def forward(self, x: Tensor) -> Any:
        return self.back(self.model(x))


def _call(model: nn.Module, parameters: dict[str, Tensor], x: Tensor, back: Callable[[Any], Any]) -> Any:
    """Run a network with these parameters, and go back while they are in place: checkpoints are computed anew then."""
    return functional_call(_WayBack(model, back), {f"model.{name}": value for name, value in parameters.items()}, (x,))


def _rows(targets: Targets, images: Tensor, *, embedding: bool) -> Tensor | None:
    """Return targets as a tensor with one row an image; a vector in floating point may be one embedding for all."""
    if targets is None:
        return None
    rows = torch.as_tensor(targets, device=images.device)
    if rows.ndim == 0 or (embedding and rows.ndim == 1 and rows.is_floating_point()):
        rows = rows.expand(len(images), *rows.shape)
    if len(rows) != len(images):
        raise InputError(f"targets must be one for all images or one each, {len(images)}, got {len(rows)}")
    return rows


def _joined(passes: list[Passed]) -> Passed:
    """Put the passes of single images together."""
    captures = {
        name: Capture(
            torch.cat([one.captures[name].activation for one in passes]),
            torch.cat([one.captures[name].gradient for one in passes]),
        )
        for name in passes[0].captures
    }
    targets = [one.targets for one in passes if one.targets is not None]
    outputs = [one.output for one in passes if one.output is not None]
    scores = torch.cat([one.scores for one in passes])
    return Passed(captures, scores, torch.cat(targets) if targets else None, torch.cat(outputs) if outputs else None)


def _told(value: object) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__
