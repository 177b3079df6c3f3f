"""NormGrad and its relatives: where in an image a network finds what speaks for a class.

Rebuffi, Fong, Ji, Vedaldi: "There and Back Again: Revisiting Backpropagation Saliency Methods" (CVPR 2020; arXiv
2004.02866). Many saliency methods are one: activations x_u and gradients g_u of the score at the places u of a layer, put
together to one number a place. NormGrad takes the size of what each place contributes to the gradient of an identity layer
that one imagines there; `zoo.contributions` has the table, `METHODS` names what comes out of it:

    normgrad       |x_u| |g_u|                      conv1x1, norm
    selective      |(x_u * g_u)+|                   scaling, selective
    gradient       max_k |g_ku|                     bias, absmax
    gradient_sum   sum_k g_ku                       bias, sum
    linear         sum_k x_ku g_ku                  scaling, sum
    hirescam       its positive part
    layercam       sum_k (x_ku g_ku)+               scaling, positive
    gradcam        (sum_k x_ku mean_v g_kv)+        scaling, sum, of the gradient's mean over places

*Where NormGrad cannot tell classes apart*: directly before global average pooling and a linear classifier (``layer4`` of a
ResNet) the gradient is the same at every place. |x_u| |g| is then |x_u| times a number, the same map for every class once
it is normalised; maps of ``bias`` are constant. `saliency` warns and names what does depend on the class there.

Read: the opening of the paper and the authors' released codes, as the project's notes describe them; not read: the rest of
the paper. Deliberate differences from the releases:

- one pass there and one back for all layers and images; the releases take one image, and one layer a pass;
- the meta step is made for each image by itself; the release takes the mean of the batch, so images disturb each other;
- nothing of the network is touched: no ``.grad``, no mode, no weight, no random number;
- scores are plain logits, as in the paper; one release goes back from their negative and turns the sign afterwards.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from zoo.combined_maps import Combine, combine_maps, normalize_map, resize_map
from zoo.contributions import Aggregate, Extract, contribution_map
from zoo.errors import InputError, require_choice
from zoo.layer_taps import Capture, LayerTaps, convolution_input, find_layers
from zoo.randomization import RandomizationCheck, randomization_check
from zoo.score_passes import Score, ScorePasses, Targets

__all__ = [
    "METHODS",
    "LayerMaps",
    "Method",
    "RandomizationCheck",
    "chosen_method",
    "combine_maps",
    "contribution_map",
    "layer_maps",
    "normalize_map",
    "randomization_check",
    "saliency",
]

# A gradient counts as the same at every place, if it differs by no more than this share of its largest entry.
_SAME = 1e-5


class Method(NamedTuple):
    """One way to make a map of activations and gradients.

    Attributes:
        extract: as for `zoo.contributions.contribution_map`.
        aggregate: the same.
        mean_gradient: replace the gradient by its mean over all places (Grad-CAM).
        positive: keep the positive part of the map.
    """

    extract: Extract
    aggregate: Aggregate
    mean_gradient: bool = False
    positive: bool = False


METHODS: Mapping[str, Method] = {
    "normgrad": Method("conv1x1", "norm"),
    "selective": Method("scaling", "selective"),
    "gradient": Method("bias", "absmax"),
    "gradient_sum": Method("bias", "sum"),
    "linear": Method("scaling", "sum"),
    "hirescam": Method("scaling", "sum", positive=True),
    "layercam": Method("scaling", "positive"),
    "gradcam": Method("scaling", "sum", mean_gradient=True, positive=True),
}


class LayerMaps(NamedTuple):
    """What `layer_maps` returns; nothing has a graph.

    Attributes:
        maps: the raw map (B, 1, H_l, W_l) of each layer, by the name that was given.
        scores: the score (B,) of each image.
        targets: what was explained, the classes (B,) where none were given; None if `score` decides.
        output: what the network returned, (B, …), with the weights after the meta step if there was one; None if it is
            no tensor.
    """

    maps: dict[str, Tensor]
    scores: Tensor
    targets: Tensor | None
    output: Tensor | None


def saliency(
    model: nn.Module,
    images: Tensor,
    targets: Targets = None,
    *,
    layers: str | Sequence[str],
    method: str | Method | None = None,
    extract: Extract | None = None,
    aggregate: Aggregate | None = None,
    kernel_size: int = 3,
    combine: Combine = "geomean",
    weights: Sequence[float] | None = None,
    score: Score | None = None,
    meta_lr: float | None = None,
    size: Literal["input", "layer"] | tuple[int, int] = "input",
    prefix_tokens: int | None = None,
    channels_last: bool | None = None,
) -> Tensor:
    """Map how much each place of an image matters to the score of a class, at one layer or several together.

    One forward pass and one backward pass, which ends at the first of the layers and computes no gradient of weights. The
    network may be frozen, compiled, in training, inside a LightningModule, or called in `torch.inference_mode`; it is run
    in eval mode, eagerly and without autocast, and left as it was. The value of an image does not depend on the rest of the
    batch. A layer that is called several times counts with its last call.

    Args:
        model: a network that is called with the images, on their device; weights in half precision are run as they are.
        images: (B, C, H, W) in floating point, normalised as the network expects.
        targets: what to explain. Classes: a number for all images or one each, by their logit; the most likely if omitted.
            Embeddings, (B, D) or (D,) in floating point: the cosine with the network's output, such as a text's for the
            image side of CLIP. Anything with B rows where `score` is given.
        layers: names of modules as in ``named_modules()``; what stands in front may be left out where it is clear;
            `zoo.stage_names.stage_names` lists the stages of a network. A name that ends in ``:input`` stands for what goes
            into the module, "" for the images. Of vision transformers whose class token is classified, take an earlier place
            than the output of the last block, such as ``blocks.11.norm1``: no patch influences the class from there.
        method: a name of `METHODS`, or a `Method`; `extract` and `aggregate` instead if omitted.
        extract: the imagined identity layer, ``"conv1x1"`` if omitted, or ``"conv"``: the layers are convolutions and their
            own weights are taken; see `zoo.contributions.contribution_map`.
        aggregate: what makes one number of a contribution, ``"norm"`` if omitted.
        kernel_size: N of ``"convNxN"`` and ``"depthwise"``, odd.
        combine: how several layers are put together; see `zoo.combined_maps.combine_maps`.
        weights: of the layers, equal if omitted.
        score: takes the output of the network and the rows of `targets` that belong to it, and returns one score for each
            image (B,), for networks whose output is no tensor of logits. Called with one image at a time under `meta_lr`.
        meta_lr: make a step of gradient descent of this size on each image first, without touching the network: on the
            cross-entropy of the class that is explained, on minus the score elsewhere. The released code takes 0.0025 in
            most places; a negative number steps away from the class. The maps are those of the network after the step.
            Takes one more pass an image, and the images one by one.
        size: of the result: ``"input"``, ``"layer"`` for the largest map of the layers, or rows and columns.
        prefix_tokens: tokens in front of the image's, such as the class token; the network's own number if omitted.
        channels_last: whether outputs of four dimensions are (B, H, W, C); seen from the layer and the network if omitted.

    Returns:
        (B, 1, H, W) without a graph, in float32 (float64 for float64). One layer: the raw map, in units of the score,
        comparable between images; `normalize_map` stretches it to [0, 1]. Several layers: a map in [0, 1].

    Raises:
        InputError: arguments that do not fit each other, a layer that is not there, is not called, does not influence the
            score, or gives neither maps nor tokens of a known grid.

    Warns:
        UserWarning: the map cannot depend on the class, the gradient is zero everywhere, or a layer is left out of the
            combination because its map is constant.

    Example:
        A network that looks at the brightest place of an image:

        >>> network = nn.Sequential(nn.ReLU(), nn.MaxPool2d(4), nn.Flatten(), nn.Linear(1, 2))
        >>> image = torch.zeros(1, 1, 4, 4)
        >>> image[0, 0, 3, 1] = 1.0
        >>> saliency(network, image, 1, layers="0").argmax().item()
        13
    """
    how = chosen_method(method, extract, aggregate)
    taps = LayerTaps(
        model,
        find_layers(model, layers),
        convolutions=how.extract == "conv",
        prefix_tokens=prefix_tokens,
        channels_last=channels_last,
    )
    found = _layer_maps(ScorePasses(taps, score, meta_lr), images, targets, how, kernel_size)
    maps = list(found.maps.values())
    target_size = _size(size, images)
    if len(maps) == 1:
        if weights is not None:
            raise InputError("weights weigh several layers against each other, but layers is one")
        return maps[0] if target_size is None else resize_map(maps[0], target_size)
    _warn_constant(found.maps)
    return combine_maps(maps, weights, combine, size=target_size)


def layer_maps(
    model: nn.Module,
    images: Tensor,
    targets: Targets = None,
    *,
    layers: str | Sequence[str],
    method: str | Method | None = None,
    extract: Extract | None = None,
    aggregate: Aggregate | None = None,
    kernel_size: int = 3,
    score: Score | None = None,
    meta_lr: float | None = None,
    prefix_tokens: int | None = None,
    channels_last: bool | None = None,
) -> LayerMaps:
    """Return the raw map of each layer in its own size, with scores, classes and output of the same pass.

    Args:
        model: as for `saliency`.
        images: as for `saliency`.
        targets: as for `saliency`.
        layers: as for `saliency`.
        method: as for `saliency`.
        extract: as for `saliency`.
        aggregate: as for `saliency`.
        kernel_size: as for `saliency`.
        score: as for `saliency`.
        meta_lr: as for `saliency`.
        prefix_tokens: as for `saliency`.
        channels_last: as for `saliency`.

    Returns:
        See `LayerMaps`.

    Raises:
        InputError: as for `saliency`.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
        >>> found = layer_maps(network, torch.randn(5, 1, 4, 4), layers=["0", "1"], method="selective")
        >>> found.maps["1"].shape, found.targets.shape, found.output.shape
        (torch.Size([5, 1, 2, 2]), torch.Size([5]), torch.Size([5, 3]))
    """
    how = chosen_method(method, extract, aggregate)
    taps = LayerTaps(
        model,
        find_layers(model, layers),
        convolutions=how.extract == "conv",
        prefix_tokens=prefix_tokens,
        channels_last=channels_last,
    )
    return _layer_maps(ScorePasses(taps, score, meta_lr), images, targets, how, kernel_size)


def _layer_maps(passes: ScorePasses, images: Tensor, targets: Targets, method: Method, kernel_size: int) -> LayerMaps:
    found = passes.run(images, targets)
    _warn_blind(found.captures, method)
    maps = {}
    with torch.no_grad():
        for name, capture in found.captures.items():
            module = passes.taps.module(name) if method.extract == "conv" else None
            maps[name] = _map(capture, method, kernel_size, module)
    return LayerMaps(maps, found.scores, found.targets, found.output)


def _map(capture: Capture, method: Method, kernel_size: int, module: nn.Module | None) -> Tensor:
    activation, gradient = capture
    window: dict[str, Any] = {"kernel_size": kernel_size}
    if module is not None:
        assert isinstance(module, nn.Conv2d), "LayerTaps refuses anything else"
        activation = convolution_input(module, activation)
        window = {name: getattr(module, name) for name in ("kernel_size", "stride", "dilation", "groups")}
        window["padding"] = 0
    if method.mean_gradient:
        gradient = gradient.mean((2, 3), keepdim=True).expand_as(gradient)
    result = contribution_map(activation, gradient, extract=method.extract, aggregate=method.aggregate, **window)
    return result.clamp_min(0) if method.positive else result


def chosen_method(method: str | Method | None, extract: Extract | None, aggregate: Aggregate | None) -> Method:
    """Return the method that the options of `saliency` stand for.

    Args:
        method: as for `saliency`.
        extract: as for `saliency`.
        aggregate: as for `saliency`.

    Raises:
        InputError: an unknown name, or a method beside `extract` or `aggregate`.
    """
    if method is not None and (extract is not None or aggregate is not None):
        raise InputError("method stands for extract and aggregate: give one or the other")
    if isinstance(method, Method):
        return method
    if method is not None:
        require_choice("method", method, tuple(METHODS))
        return METHODS[method]
    require_choice("extract", extract or "conv1x1", get_args(Extract))
    require_choice("aggregate", aggregate or "norm", get_args(Aggregate))
    return Method(extract or "conv1x1", aggregate or "norm")


def _size(size: str | tuple[int, int], images: Tensor) -> tuple[int, int] | None:
    if size == "input":
        return images.shape[2], images.shape[3]
    if size == "layer":
        return None
    if isinstance(size, str) or len(size) != 2 or min(size) < 1:
        raise InputError(f"size must be 'input', 'layer' or two numbers of at least 1, got {size!r}")
    return (size[0], size[1])


def _warn_blind(captures: dict[str, Capture], method: Method) -> None:
    """Say where the map is zero, or the same for every class."""
    zero, blind = [], []
    for name, (activation, gradient) in captures.items():
        highest = gradient.abs().amax()
        if not bool(highest):
            zero.append(name)
        elif gradient.shape[2:].numel() > 1 and not method.mean_gradient:
            same = bool(gradient.sub(gradient[:, :, :1, :1]).abs().amax() <= _SAME * highest)
            if same and _rank_one(method, activation):
                blind.append(name)
    if zero:
        warnings.warn(
            f"the gradient of the score is zero everywhere at {', '.join(map(repr, zero))}, and so is the map. Where the "
            "class token is classified, no patch matters after the last block: take its norm1 or an earlier block. Weights "
            "that start at zero give no gradient before they are trained.",
            UserWarning,
            stacklevel=4,
        )
    if blind:
        warnings.warn(
            f"{', '.join(map(repr, blind))}: the gradient is the same at every place, as it is directly before global "
            f"average pooling, and extract={method.extract!r} gives the same map for every class, up to its scale. Take "
            "method='selective' or 'gradcam', or an earlier layer.",
            UserWarning,
            stacklevel=4,
        )


def _rank_one(method: Method, activation: Tensor) -> bool:
    """Whether a gradient that is the same everywhere leaves nothing of the class in the map but its scale."""
    if method.extract == "bias":
        return True
    if method.extract not in ("conv1x1", "convNxN", "conv"):
        return False
    # Positive and negative activations, taken apart, are weighed by the class; behind a ReLU there are no negative ones.
    return method.aggregate in ("norm", "absmax", "sum") or not bool((activation < 0).any())


def _warn_constant(maps: dict[str, Tensor]) -> None:
    for name, one in maps.items():
        count = int((normalize_map(one) == 0).flatten(1).all(1).sum())
        if count:
            warnings.warn(
                f"the map of {name!r} is constant for {count} of {len(one)} images and is left out of their combination",
                UserWarning,
                stacklevel=3,
            )
