"""Every public loss, given anything: a finite value with finite gradients, or an `InputError`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.fuzz_parts import Case, Drawer, Strategies, fuzz
from zoo import losses

_STRATEGIES = Strategies()


def _case(draw: Drawer, name: str, undefined: Callable[[dict[str, Any]], bool] | None = None, **given: Any) -> Case:
    arguments, spoiled = draw.arguments(**given)
    return Case(getattr(losses, name), arguments, undefined or (lambda arguments: False), spoiled)


def _scores_overflow(arguments: dict[str, Any], first: str, second: str) -> bool:
    """Scores beyond float32 are documented to give NaN or infinity, and so are their gradients."""
    sides = [arguments[name].detach().double() for name in (first, second)]
    scale = arguments["scale"]
    scale = abs(float(scale.detach() if isinstance(scale, Tensor) else scale))
    single = arguments[first].dtype != torch.float64 or isinstance(arguments["scale"], Tensor)
    limit = torch.finfo(torch.float32 if single else torch.float64).max / 1e3
    sizes = [float(x.abs().max()) if x.numel() else 0.0 for x in sides]
    width = max(sides[0].shape[-1] if sides[0].ndim else 1, 1)
    largest = scale * sizes[0] * sizes[1] * width
    return max(largest, width * sizes[0] * sizes[1], scale * max(sizes)) > limit


def _scale(draw: Drawer) -> float | Tensor:
    number = draw.choice(1.0, 0.0, 14.3, 100.0, 1e-6, 1e6)
    kind = draw.choice("number", "tensor", "learned", "vector")
    if kind == "number":
        return number
    return torch.full([1] if kind == "vector" else [], number, requires_grad=kind == "learned")


@_STRATEGIES.of("nd_loss", "nd_statistics")
def _nd(draw: Drawer, name: str) -> Case:
    rows, width, classes = draw.rows(), draw.width(), draw.choice(3, 1, 0)
    soft = draw.choice(False, True)
    given: dict[str, Any] = {
        "student": draw.floats(rows, width),
        "teacher": draw.floats(rows, width),
        "centres": draw.floats(classes, width),
        "targets": draw.shares(rows, classes) if soft else draw.labels(rows, classes),
    }
    if name == "nd_loss":
        given["reduction"] = draw.choice("mean", "none", "class")
    return _case(draw, name, **given)


@_STRATEGIES.of("kd_loss", "dist_loss", "dkd_loss")
def _logits(draw: Drawer, name: str) -> Case:
    rows, classes = draw.rows(), draw.width()
    given: dict[str, Any] = {
        "student_logits": draw.floats(rows, classes),
        "teacher_logits": draw.floats(rows, classes),
        "temperature": draw.choice(4.0, 1.0, 1e-3, 1e3),
    }
    if name == "dkd_loss":
        given |= {"targets": draw.labels(rows, classes), "alpha": draw.choice(1.0, 0.0), "beta": draw.choice(8.0, 0.0)}
    if name == "dist_loss":
        given |= {"beta": draw.choice(1.0, 0.0), "gamma": draw.choice(1.0, 0.0), "gather": draw.choice(False, True)}
    return _case(draw, name, _quotients_overflow, **given)


def _quotients_overflow(arguments: dict[str, Any]) -> bool:
    """Logits that, divided by the temperature, are beyond float32 are documented to give NaN."""
    sides = [arguments[name].detach().abs() for name in ("student_logits", "teacher_logits")]
    largest = max((float(x.max()) for x in sides if x.numel()), default=0.0)
    single = arguments["student_logits"].dtype != torch.float64
    # Differences of two of them, and T^2 and the weights of the terms times the result.
    weights = [arguments[name] for name in ("alpha", "beta", "gamma") if name in arguments]
    factor = max([1.0, *(abs(weight) for weight in weights if isinstance(weight, int | float))])
    temperature = arguments["temperature"]
    return single and (max(largest / temperature, largest * temperature) > 1e37 or factor > 1e28)


@_STRATEGIES.of("review_kd_loss")
def _review(draw: Drawer, name: str) -> Case:
    shapes = [draw.choice((2, 3), (2, 3, 4, 4), (1, 2, 5, 3), (0, 2, 4, 4), (2, 0, 4, 4), (1, 1, 1, 1), (2, 1, 0, 3))]
    shapes *= draw.choice(1, 2)
    given = {
        "student": [draw.floats(*shape) for shape in shapes],
        "teacher": [draw.floats(*shape) for shape in shapes],
        "pool_sizes": draw.choice((4, 2, 1), (), (1,), (3,), (100,)),
    }
    return _case(draw, name, _squares_overflow, **given)


def _squares_overflow(arguments: dict[str, Any]) -> bool:
    """Differences above 1e19 are documented to have the loss infinity: their squares are beyond float32."""
    sides = [x for name in ("student", "teacher") for x in arguments[name]]
    largest = max((float(x.detach().abs().max()) for x in sides if x.numel()), default=0.0)
    return bool(sides) and largest > 1e18 and sides[0].dtype != torch.float64


@_STRATEGIES.of("info_nce", "clip_loss", "siglip_loss")
def _contrastive(draw: Drawer, name: str) -> Case:
    rows, width = draw.rows(), draw.width()
    first, second = ("queries", "keys") if name == "info_nce" else ("x", "y")
    given: dict[str, Any] = {
        first: draw.floats(rows, width),
        second: draw.floats(rows + (draw.choice(0, 2) if name == "info_nce" else 0), width),
        "scale": _scale(draw),
        "gather": draw.choice(False, True),
        "chunk_size": draw.choice(None, 1, 2, 3, 100),
    }
    if name == "siglip_loss":
        given["bias"] = draw.choice(-10.0, 0.0, 1e6)
    return _case(draw, name, lambda arguments: _scores_overflow(arguments, first, second), **given)


@_STRATEGIES.of("cwcl_loss", "cwcl_statistics")
def _cwcl(draw: Drawer, name: str) -> Case:
    rows, width = draw.rows(), draw.width()
    given: dict[str, Any] = {
        "trained": draw.floats(rows, width),
        "frozen": draw.floats(rows, width),
        "scale": _scale(draw),
        "weight_features": draw.floats(rows, draw.width()) if draw.choice(False, True) else None,
        "kernel": draw.choice("affine", "power", "exp", "topk"),
        "exponent": draw.choice(2.0, 1e-3, 1e3),
        "kernel_temperature": draw.choice(0.1, 1e-3, 1e3),
        "neighbours": draw.choice(8, 1),
        "gather": draw.choice(False, True),
        "chunk_size": draw.choice(None, 1, 2),
    }
    if name == "cwcl_loss":
        given["weighted_direction"] = draw.choice("trained", "both")
        given["direction_reduction"] = draw.choice("sum", "mean")
    return _case(draw, name, **given)


@_STRATEGIES.of("structure_loss", "structure_statistics")
def _structure(draw: Drawer, name: str) -> Case:
    rows = draw.rows()
    given: dict[str, Any] = {
        "frozen": draw.floats(rows, draw.width()),
        "temperature": draw.choice(0.05, 1.0, 1e-3, 1e3),
        "centering": draw.choice("mean", "none", "standard", "before"),
        "gather": draw.choice(False, True),
        "chunk_size": draw.choice(None, 1, 2),
    }
    if name == "structure_loss":
        given |= {
            "aligned": draw.floats(rows, draw.width()),
            "levels": draw.choice(1, 2, 3),
            "level_weights": draw.choice("none", "inverse"),
            "divergence": draw.choice("released", "js"),
            "margin": draw.choice(0.0, 0.1, 1e3),
        }
    return _case(draw, name, **given)


@_STRATEGIES.of("alignment_loss", "uniformity_loss", "calibrated_uniformity_loss", "calibration_statistics")
def _uniformity(draw: Drawer, name: str) -> Case:
    rows, width = draw.rows(), draw.width()
    given: dict[str, Any] = {"gather": draw.choice(False, True)}
    if name == "alignment_loss":
        return _case(draw, name, x=draw.floats(rows, width), y=draw.floats(rows, width), **given)
    given["chunk_size"] = draw.choice(None, 1, 2)
    if name != "calibration_statistics":
        given |= {"x": draw.floats(rows, width), "t": draw.choice(2.0, 1e-3, 1e3)}
    if name != "uniformity_loss":
        lowest, highest = draw.choice((0.0, 1.0), (-1.0, -1.0), (0.3, 0.3), (-1.0, 1.0))
        given |= {"features": draw.floats(rows, draw.width()), "min_similarity": lowest, "max_similarity": highest}
    if name == "calibrated_uniformity_loss":
        given["detach_similarity"] = draw.choice(False, True)
    return _case(draw, name, **given)


@_STRATEGIES.of("slerp", "spherical_bezier")
def _spherical(draw: Drawer, name: str) -> Case:
    rows, width, points = draw.rows(), draw.width(), draw.choice(2, 1, 3, 4)
    t: Any = draw.choice(0.5, 0.0, 1.0)
    kind = draw.choice("number", "tensor", "rows")
    if kind != "number":
        t = draw.shares(*([rows] if kind == "rows" else [])).requires_grad_(draw.choice(True, False))
    if name == "slerp":
        return _case(draw, name, a=draw.floats(rows, width), b=draw.floats(rows, width), t=t)
    given = {
        "points": [draw.floats(rows, width) for _ in range(points)],
        "t": t,
        "mode": draw.choice("de_casteljau", "fold"),
        "present": draw.mask(rows, points) if draw.choice(False, True) else None,
    }
    return _case(draw, name, **given)


@_STRATEGIES.of("softrepa_loss", "softrepa_gradient")
def _softrepa(draw: Drawer, name: str) -> Case:
    rows = draw.rows()
    first, behind = draw.choice(0, 1), draw.choice(0, 2)
    columns = first + rows + behind
    errors = draw.floats(rows, columns).detach().abs()
    temperature: Any = draw.choice(0.07, 1e-3, 1e3)
    shape = draw.choice(None, (), (rows, 1), (1, columns))
    if shape is not None:
        temperature = draw.shares(*shape, lowest=0.01, highest=2.0)
    given = {
        "errors": errors.requires_grad_(draw.choice(True, False)),
        "temperature": temperature,
        "scale": draw.choice(4.0, 1e-3, 1e3),
        "diagonal_weight": draw.choice(0.0, 10.0),
        "mask": draw.mask(rows, columns) if draw.choice(False, True) else None,
        "first_row": first,
        "reduction": draw.choice("mean", "none"),
    }
    return _case(draw, name, _weighted_errors_overflow, **given)


def _weighted_errors_overflow(arguments: dict[str, Any]) -> bool:
    """The diagonal term is in the unit of the errors: 1e30 times 1e30 is beyond float32."""
    largest = float(arguments["errors"].detach().abs().max()) if arguments["errors"].numel() else 0.0
    return largest * arguments["diagonal_weight"] > 1e37


@_STRATEGIES.of("equal_captions")
def _captions(draw: Drawer, name: str) -> Case:
    rows = draw.rows()
    if draw.choice(True, False):
        return _case(draw, name, texts=draw.floats(rows, *draw.choice((), (3,), (2, 2), (0,))))
    return _case(draw, name, texts=draw.labels(rows, 3))


@_STRATEGIES.of("pooled_similarities", "centre_cross_entropy", "centre_divergence", "calibration_consistency")
def _centres(draw: Drawer, name: str) -> Case:
    rows, width, classes, count = draw.rows(), draw.width(), draw.choice(3, 1, 0), draw.choice(None, 1, 4)
    features = {
        "pooled_similarities": ["embeddings"],
        "centre_cross_entropy": ["embeddings"],
        "centre_divergence": ["attacked", "clean"],
        "calibration_consistency": ["attacked", "clean", "clean_head"],
    }[name]
    given: dict[str, Any] = {side: draw.floats(rows, width) for side in features}
    shape = (classes, width) if count is None else (classes, count, width)
    given |= {
        "centres": draw.floats(*shape),
        "pool": draw.choice("mean_centre", "mean_sim", "max", "lse", "lme"),
        "sharpness": draw.choice(1000.0, 1e-3, 1e6),
        "mask": draw.mask(classes, count) if count is not None and draw.choice(False, True) else None,
    }
    if name != "pooled_similarities":
        given["scale"] = draw.choice(100.0, 0.0, 1e6)
    if name == "centre_cross_entropy":
        given["labels"] = draw.labels(rows, classes)
    return _case(draw, name, **given)


@_STRATEGIES.of("clean_adversarial_l2", "clean_adversarial_info_nce")
def _clean_adversarial(draw: Drawer, name: str) -> Case:
    rows, width = draw.rows(), draw.width()
    given: dict[str, Any] = {"attacked": draw.floats(rows, width), "clean": draw.floats(rows, width)}
    if name == "clean_adversarial_info_nce":
        given |= {
            "temperature": draw.choice(0.07, 1e-3, 1e3),
            "symmetric": draw.choice(False, True),
            "labels": draw.labels(rows, 2) if draw.choice(False, True) else None,
            "gather": draw.choice(False, True),
            "chunk_size": draw.choice(None, 1, 2),
        }
    return _case(draw, name, **given)


def test_every_loss_is_here() -> None:
    assert sorted(_STRATEGIES) == sorted(losses.__all__)


@pytest.mark.parametrize("name", sorted(losses.__all__))
def test_loss(name: str) -> None:
    fuzz(_STRATEGIES[name], examples=36)


@pytest.mark.thorough
@pytest.mark.parametrize("name", sorted(losses.__all__))
def test_loss_further(name: str) -> None:
    fuzz(_STRATEGIES[name], examples=1500)
