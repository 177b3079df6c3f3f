"""Whether a saliency map depends on what the network has learnt: its weights are replaced by random ones, step by step.

Adebayo, Gilmer, Muelly, Goodfellow, Hardt, Kim: "Sanity Checks for Saliency Maps" (NeurIPS 2018; arXiv 1810.03292), the
model parameter randomization test; not read, known from the project's notes on NormGrad, section 1.9. Deliberate
differences from the script in the branch of TorchRay that the notes describe:

- the class that is explained is that of the trained network throughout; the script takes the most likely class of the
  randomised one, so that another class is explained each time;
- the result is the rank correlation; the script keeps the p-value in its place;
- the network is copied, and neither it nor the random numbers of the caller are touched.

A map that is the same for every class, such as NormGrad's directly before global average pooling, does not change when the
classifier behind is randomised: take another layer or ``method="selective"``.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import warnings
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from zoo.combined_maps import Combine
from zoo.contributions import Aggregate, Extract
from zoo.errors import InputError, require_choice
from zoo.image_grid import write_png
from zoo.layer_taps import find_layers, undisturbed
from zoo.metrics.saliency_ranks import map_correlation
from zoo.score_passes import Score, Targets

if TYPE_CHECKING:
    from zoo.saliency import Method

__all__ = ["RandomizationCheck", "randomization_check", "randomize"]

Mode = Literal["cascading", "independent"]

# What a normalisation has before training, where it cannot reset itself: torchvision's and timm's frozen ones.
_UNTRAINED = {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0}
_INK, _SIGNED, _ABSOLUTE = "#222222", "#0072b2", "#d55e00"  # Okabe and Ito


class RandomizationCheck(NamedTuple):
    """How much the maps of randomised networks resemble those of the trained one.

    Attributes:
        mode: ``"cascading"``: everything up to a module is random; ``"independent"``: only that module is.
        modules: names of the modules, in the order in which they were randomised.
        rho: Spearman's correlation (M, B) with the map of the trained network, a module and image, float64, on the CPU;
            NaN where one of the two maps is constant or not finite.
        rho_absolute: the same of the absolute values of the maps.
        targets: what was explained, with one row an image; None if a function decides.

    Example:
        >>> rho = torch.tensor([[0.5, 0.7, torch.nan], [0.0, 0.2, 0.1]])
        >>> check = RandomizationCheck("cascading", ("fc", "conv"), rho, rho.abs(), None)
        >>> print(check.table())
        | module | rho | rho of absolute values | images |
        |---|---|---|---|
        | `fc` | 0.600 ± 0.100 | 0.600 ± 0.100 | 2 of 3 |
        | `conv` | 0.100 ± 0.082 | 0.100 ± 0.082 | 3 of 3 |
    """

    mode: str
    modules: tuple[str, ...]
    rho: Tensor
    rho_absolute: Tensor
    targets: Tensor | None

    @property
    def mean(self) -> Tensor:
        """Mean (M,) of `rho` over the images that have one, NaN where none has."""
        return self.rho.nanmean(1)

    @property
    def std(self) -> Tensor:
        """Standard deviation (M,) of `rho` over those images, divided by their number."""
        return _spread(self.rho)

    @property
    def mean_absolute(self) -> Tensor:
        """Mean (M,) of `rho_absolute`."""
        return self.rho_absolute.nanmean(1)

    @property
    def std_absolute(self) -> Tensor:
        """Standard deviation (M,) of `rho_absolute`."""
        return _spread(self.rho_absolute)

    def table(self) -> str:
        """Return a Markdown table: a row a module, mean ± standard deviation, and the images behind them."""
        lines = ["| module | rho | rho of absolute values | images |", "|---|---|---|---|"]
        images = self.rho.shape[1]
        for row, name in enumerate(self.modules):
            signed = f"{self.mean[row]:.3f} ± {self.std[row]:.3f}"
            absolute = f"{self.mean_absolute[row]:.3f} ± {self.std_absolute[row]:.3f}"
            count = int(self.rho[row].isfinite().sum())
            lines.append(f"| `{name}` | {signed} | {absolute} | {count} of {images} |")
        return "\n".join(lines)

    def draw(self, path: str | Path) -> None:
        """Draw mean and standard deviation over the modules, a PNG file; the same bytes for the same numbers.

        Args:
            path: the file, whose folder is made where it is missing.

        Raises:
            InputError: the path does not end in ``.png``.
        """
        write_png(path, self._image())

    def _image(self) -> bytes:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        places = list(range(len(self.modules)))
        figure = Figure(figsize=(max(4.0, 1.5 + 0.3 * len(places)), 3.6), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        axes.axhline(0, color=_INK, linewidth=0.8)
        for label, colour, mean, std in (
            ("signed", _SIGNED, self.mean, self.std),
            ("absolute values", _ABSOLUTE, self.mean_absolute, self.std_absolute),
        ):
            axes.errorbar(places, mean.tolist(), std.tolist(), label=label, color=colour, marker="o", capsize=3)
        axes.set_ylim(-1.05, 1.05)
        axes.set_xticks(places, [name[-32:] for name in self.modules], rotation=90, parse_math=False)
        axes.tick_params(labelsize=7, colors=_INK)
        axes.set_ylabel("Spearman's rho with the trained map", fontsize=8, color=_INK)
        axes.set_xlabel("randomised up to and including" if self.mode == "cascading" else "randomised", fontsize=8)
        axes.legend(fontsize=7, frameon=False)
        file = BytesIO()
        figure.savefig(file, format="png", dpi=120, facecolor="white", metadata={"Software": None})
        return file.getvalue()


def randomization_check(
    model: nn.Module,
    images: Tensor,
    targets: Targets = None,
    *,
    layers: str | Sequence[str],
    mode: Mode = "cascading",
    order: Sequence[str] | None = None,
    seed: int = 0,
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
) -> RandomizationCheck:
    """Compare the maps of a trained network with those after its modules were initialised anew.

    A method that depends on what was learnt falls to a correlation near 0 as soon as the classifier is random. The class
    that is explained stays that of the trained network. One saliency pass a module: `order` with the names of a few stages
    is quicker than all modules one by one.

    All happens on a copy of the network (without the trainer of a LightningModule), which takes its memory once more.

    How a module is randomised: see `randomize`. Its new weights follow from `seed` and its name alone, so that they are the
    same in both modes, for every `order`, and on every device.

    Source: sections 1.9 and 1.11 of the project's notes on "There and Back Again" (arXiv 2004.02866), for the check of
    Adebayo et al. (arXiv 1810.03292). Maps are rescaled to [-1, 1] there, which changes no rank and no absolute value's.

    Args:
        model: as for `zoo.saliency.saliency`.
        images: as for `zoo.saliency.saliency`.
        targets: as for `zoo.saliency.saliency`; the most likely class of the trained network if omitted.
        layers: as for `zoo.saliency.saliency`.
        mode: ``"cascading"``: from the first module of `order` on, all stay random; ``"independent"``: each by itself, the
            others as trained.
        order: names of modules, each with all that is inside, from the head towards the input. If omitted, every module
            that has parameters or running statistics of its own, the last that is called in a pass first.
        seed: of the new weights.
        method: as for `zoo.saliency.saliency`.
        extract: as for `zoo.saliency.saliency`.
        aggregate: as for `zoo.saliency.saliency`.
        kernel_size: as for `zoo.saliency.saliency`.
        combine: as for `zoo.saliency.saliency`.
        weights: as for `zoo.saliency.saliency`.
        score: as for `zoo.saliency.saliency`.
        meta_lr: as for `zoo.saliency.saliency`.
        size: of the maps that are compared, as for `zoo.saliency.saliency`.
        prefix_tokens: as for `zoo.saliency.saliency`.
        channels_last: as for `zoo.saliency.saliency`.

    Returns:
        See `RandomizationCheck`.

    Raises:
        InputError: as for `zoo.saliency.saliency`; an unknown mode; a name in `order` that stands for no module or one
            without parameters.

    Warns:
        UserWarning: as `zoo.saliency.saliency` for the trained network. What is zero or constant after that is NaN.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
        >>> check = randomization_check(network, torch.randn(5, 1, 4, 4), layers="1", method="selective")
        >>> check.modules, check.rho.shape
        (('3', '0'), torch.Size([2, 5]))
    """
    from zoo.saliency import saliency  # which offers this function under its own name

    require_choice("mode", mode, get_args(Mode))
    twin = _copy(model)
    options: dict[str, Any] = {
        "layers": layers, "method": method, "extract": extract, "aggregate": aggregate, "kernel_size": kernel_size,
        "combine": combine, "weights": weights, "score": score, "meta_lr": meta_lr, "size": size,
        "prefix_tokens": prefix_tokens, "channels_last": channels_last,
    }  # fmt: skip
    trained = saliency(twin, images, targets, **options)
    entered, output = _pass(twin, images)
    if targets is None and score is None:
        targets = output.argmax(1)
    groups = _from_the_head(twin, entered) if order is None else _named(twin, order)
    found = []
    for inside in groups.values():
        held = [value for path in inside for value in _own(twin.get_submodule(path))]
        kept = [value.clone() for value in held] if mode == "independent" else []
        for path in inside:
            randomize(twin.get_submodule(path), seed=_word(seed, path))
        with warnings.catch_warnings():
            # Zero and constant maps are NaN in the result, and that NormGrad is blind to classes was said once.
            warnings.simplefilter("ignore", UserWarning)
            now = saliency(twin, images, targets, **options)
        found.append((map_correlation(trained, now).cpu(), map_correlation(trained.abs(), now.abs()).cpu()))
        with torch.no_grad():
            for value, before in zip(held, kept, strict=False):  # nothing is kept where all stay random
                value.copy_(before)
    signed, absolute = (torch.stack(values) for values in zip(*found, strict=True))
    explained = None if targets is None else torch.as_tensor(targets).detach().cpu()
    if explained is not None and explained.ndim == 0:
        explained = explained.expand(len(images))
    return RandomizationCheck(mode, tuple(groups), signed, absolute, explained)


def randomize(module: nn.Module, *, seed: int) -> None:
    """Initialise what a module holds itself anew, in place; what its submodules hold stays.

    - A module with `reset_parameters` and no parameters further inside: by that, running statistics of normalisations
      included. It is called on the CPU, so that every device gets the same.
    - Frozen normalisations, which hold weight, bias and statistics as buffers: 1, 0, and mean 0, variance 1.
    - Any other parameter, such as a class token or the projections of `nn.MultiheadAttention`: independent normal numbers
      with mean and standard deviation of the trained tensor, which keeps its scale and nothing else. A single number, and
      one that is the same everywhere, stays.

    The random numbers of the caller are as before.

    Args:
        module: the module.
        seed: of the new values.

    Example:
        >>> first, second = nn.Linear(2, 2), nn.Linear(2, 2)
        >>> randomize(first, seed=3)
        >>> randomize(second, seed=3)
        >>> torch.equal(first.weight, second.weight)
        True
    """
    own = list(module.parameters(recurse=False))
    with torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also reseed the GPUs
        if hasattr(module, "reset_parameters") and len(own) == len(list(module.parameters())):
            fresh: Any = copy.deepcopy(module).cpu()
            fresh.reset_parameters()
            for old, new in zip(_own(module), _own(fresh), strict=True):
                old.copy_(new)
            return
        for name, buffer in module.named_buffers(recurse=False):
            if _frozen(module) and name in _UNTRAINED:
                buffer.fill_(_UNTRAINED[name])
        for parameter in own:
            if parameter.is_floating_point() and parameter.numel():
                values = parameter.detach().cpu().double()
                noise = torch.randn(values.shape, dtype=values.dtype)
                parameter.copy_(values.mean() + values.std(correction=0) * noise)


def _copy(model: nn.Module) -> nn.Module:
    """Return a copy that can be trained even if `torch.inference_mode` is on, without a trainer's copy."""
    model = getattr(model, "_orig_mod", model)
    trainers = [getattr(module, name, None) for module in model.modules() for name in ("_trainer", "_fabric")]
    shared: dict[int, Any] = {id(trainer): trainer for trainer in trainers if trainer is not None}
    with torch.inference_mode(False):
        return copy.deepcopy(model, shared)


def _pass(model: nn.Module, images: Tensor) -> tuple[dict[str, int], Any]:
    """Return when each module was entered last in a pass, and what came out."""
    entered: dict[str, int] = {}
    count = itertools.count()
    handles = [
        module.register_forward_pre_hook(lambda _module, _args, name=name: entered.update({name: next(count)}))
        for name, module in model.named_modules()
    ]
    try:
        with undisturbed(model, images.device), torch.no_grad():
            dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), images.dtype)
            return entered, model(images.detach().to(dtype, copy=True))
    finally:
        for handle in handles:
            handle.remove()


def _from_the_head(model: nn.Module, entered: dict[str, int]) -> dict[str, list[str]]:
    """Return the modules to randomise, the last that was entered first; one that was not called counts with its parent."""
    places: dict[str, tuple[int, int]] = {}
    for index, (name, module) in enumerate(model.named_modules()):
        called = name
        while called not in entered and called:
            called = called.rpartition(".")[0]
        if _holds(module):
            places[name] = (entered.get(called, -1), index)
    if not places:
        raise InputError(f"{type(model).__name__} has no parameters: there is nothing to randomise")
    return {name: [name] for name in sorted(places, key=places.__getitem__, reverse=True)}


def _named(model: nn.Module, order: Sequence[str]) -> dict[str, list[str]]:
    names = [order] if isinstance(order, str) else list(order)
    if not names or len(set(names)) < len(names):
        raise InputError(f"order must name modules, at least one and each once, got {order!r}")
    groups = {}
    for name, path in find_layers(model, names).items():
        if path.endswith(":input"):
            raise InputError(f"order must name modules, got {name!r}")
        inside = [
            f"{path}.{below}".strip(".")
            for below, module in model.get_submodule(path).named_modules()
            if _holds(module)
        ]
        if not inside:
            raise InputError(f"{name!r} in order has no parameters: there is nothing to randomise")
        groups[name] = inside
    return groups


def _holds(module: nn.Module) -> bool:
    """Whether a module has parameters or statistics of its own."""
    return any(value.numel() for value in module.parameters(recurse=False)) or (
        getattr(module, "running_mean", None) is not None
    )


def _own(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]


def _frozen(module: nn.Module) -> bool:
    return {name for name, _ in module.named_buffers(recurse=False)} >= {"running_mean", "running_var"}


def _word(seed: int, path: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{path}".encode()).digest()[:4])


def _spread(values: Tensor) -> Tensor:
    distances = values - values.nanmean(1, keepdim=True)
    return distances.square().nanmean(1).sqrt()
