"""Insertion and deletion against loops over single pixels and SciPy's blur."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from scipy.ndimage import correlate1d
from torch import Tensor, nn

from tests.saliency_parts import counted
from zoo.errors import InputError
from zoo.metrics import InsertionDeletion, insertion_deletion


def plain_curves(
    network: nn.Module, image: Tensor, one_map: Tensor, label: int, steps: int, start: Tensor, *, insert: bool
) -> list[float]:
    """One image, one step, one pixel at a time."""
    pixels = sorted(range(one_map.numel()), key=lambda place: (-float(one_map.flatten()[place]), place))
    now, other = (start.clone(), image) if insert else (image.clone(), start)
    scores, done = [], 0
    for step in range(steps + 1):
        for place in pixels[done : step * len(pixels) // steps]:
            row, column = divmod(place, image.shape[2])
            now[:, row, column] = other[:, row, column]
        done = step * len(pixels) // steps
        with torch.no_grad():
            scores.append(network(now.unsqueeze(0)).softmax(1)[0, label].item())
    return scores


def blurred(image: Tensor, size: int = 11, sigma: float = 5.0) -> Tensor:
    """With SciPy: weights exp(-x² / 2 sigma²), the edges mirrored."""
    values = image.numpy()
    for axis in (1, 2):
        width = min(size, 2 * values.shape[axis] - 1)
        places = np.arange(width) - width // 2
        weights = np.exp(-(places**2) / (2 * sigma**2))
        values = correlate1d(values, weights / weights.sum(), axis=axis, mode="mirror")
    return torch.from_numpy(values)


def small() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 4 * 3, 3)).double().eval()


@pytest.mark.parametrize("steps", [None, 1, 7, 30])
def test_identity_one_pixel_at_a_time(steps: int | None) -> None:
    network, x = small(), torch.randn(3, 2, 6, 5, dtype=torch.float64)
    maps = torch.randint(0, 6, (3, 1, 6, 5)).double()  # ties
    labels = torch.tensor([2, 0, 1])
    bases = {
        "zero": torch.zeros_like(x),
        "mean": torch.stack([one.mean((1, 2), keepdim=True).expand_as(one) for one in x]),
        "blur": torch.stack([blurred(one) for one in x]),
    }
    for first, second in (("blur", "zero"), ("mean", "blur"), ("zero", "mean")):
        options: Any = {"steps": steps, "insertion_baseline": first, "deletion_baseline": second, "batch_size": 7}
        found = insertion_deletion(network, x, maps, labels, **options)
        parts = steps or 6
        assert found.insertion.shape == found.deletion.shape == (3, parts + 1)
        for row in range(3):
            one = (network, x[row], maps[row], int(labels[row]), parts)
            assert found.insertion[row].tolist() == pytest.approx(plain_curves(*one, bases[first][row], insert=True))
            assert found.deletion[row].tolist() == pytest.approx(plain_curves(*one, bases[second][row], insert=False))
            area = np.trapezoid(found.insertion[row].numpy(), [k * 30 // parts / 30 for k in range(parts + 1)])
            assert found.insertion_area[row].item() == pytest.approx(area)
    if steps == 30:
        # The mean of the curve but for half of its ends, as RISE has it.
        curve = found.deletion
        area = (curve.sum(1) - curve[:, 0] / 2 - curve[:, -1] / 2) / 30
        torch.testing.assert_close(found.deletion_area, area)


def test_identity_most_likely_class_and_score() -> None:
    network, x, maps = small(), torch.randn(5, 2, 6, 5, dtype=torch.float64), torch.rand(5, 1, 6, 5)
    logits = network(x)
    found = insertion_deletion(network, x, maps)
    assert torch.equal(found.insertion, insertion_deletion(network, x, maps, logits.argmax(1)).insertion)
    assert torch.equal(found.insertion, insertion_deletion(network, x, maps, batch_size=2).insertion)
    torch.testing.assert_close(found.insertion[:, -1], logits.softmax(1).amax(1))
    torch.testing.assert_close(found.deletion[:, 0], logits.softmax(1).amax(1))
    weights = torch.rand(5, 3, dtype=torch.float64)
    scored = insertion_deletion(network, x, maps, weights, score=lambda output, rows: (output * rows).sum(1))
    torch.testing.assert_close(scored.deletion[:, 0], (logits * weights).sum(1).detach())
    for row in range(5):
        alone = insertion_deletion(network, x[row : row + 1], maps[row : row + 1], int(logits[row].argmax()))
        torch.testing.assert_close(alone.deletion, found.deletion[row : row + 1])


def test_a_map_that_knows_is_better() -> None:
    """The class is whether the left half is bright."""

    class Left(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            bright = x[:, 0, :, :4].mean((1, 2))
            return torch.stack([bright, 1 - bright], 1) * 8

    x = torch.ones(2, 1, 8, 8)
    knows = torch.zeros(2, 1, 8, 8)
    knows[..., :4] = 1
    metrics = [InsertionDeletion(insertion_baseline="zero") for _ in range(2)]
    for metric, maps in zip(metrics, (knows, 1 - knows), strict=True):
        metric.update(Left(), x, maps, 0)
    good, bad = (metric.compute() for metric in metrics)
    assert good["insertion"] > bad["insertion"] + 0.3
    assert good["deletion"] < bad["deletion"] - 0.3
    assert good["insertion_std"] == 0
    assert good["images"] == 2


@pytest.mark.parametrize("inference", [False, True])
def test_the_network_is_left_as_it_was(inference: bool) -> None:
    """Batch norm, dropout, an in-place ReLU and noise; in training, and inside inference_mode."""
    network, x, maps = counted(), torch.randn(2, 3, 8, 8), torch.rand(2, 1, 8, 8)
    network.train()
    state, modes = copy.deepcopy(network.state_dict()), [module.training for module in network.modules()]
    random, kept = torch.random.get_rng_state(), x.clone()
    metric = InsertionDeletion(steps=4)
    with torch.inference_mode(inference):
        metric.update(network, x.clone(), maps.clone())
    assert torch.equal(torch.random.get_rng_state(), random)
    assert torch.equal(x, kept)
    assert [module.training for module in network.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert all(p.grad is None for p in network.parameters())
    metric.update(network, x, maps)
    found = metric.compute()
    assert found["insertion"].isfinite()
    assert not found["insertion"].requires_grad
    assert list(metric.children()) == []  # nor does the metric hold the network


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_insertion(dtype: torch.dtype) -> None:
    network, x, maps = small().float(), torch.randn(2, 2, 6, 5), torch.rand(2, 1, 6, 5)
    plain = insertion_deletion(network, x, maps, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(insertion_deletion(network, x, maps, 1).insertion, plain.insertion)
    half = insertion_deletion(network.to(dtype), x, maps.to(dtype), 1)
    assert half.insertion.dtype == torch.float32
    torch.testing.assert_close(half.insertion, plain.insertion, rtol=0.05, atol=0.02)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be in 1 … 30, the number of pixels, got 0"),
        ({"steps": 31}, "steps must be in 1 … 30, the number of pixels, got 31"),
        ({"insertion_baseline": "noise"}, "insertion_baseline must be one of"),
        ({"deletion_baseline": "noise"}, "deletion_baseline must be one of"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"blur_size": 4}, "blur_size must be odd and at least 1, got 4"),
        ({"blur_sigma": 0.0}, "blur_sigma must be positive and finite, got 0.0"),
        ({"score": lambda output, _: output}, r"score must return one number an image, shape \(14,\), got \(14, 3\)"),
        ({"score": lambda output, _: 3}, "score must return one number an image, .* got int"),
        ({"targets": 3}, r"targets must be labels in 0 … 2 \(3 classes\), found 3"),
        ({"targets": [0, 1, 2]}, "targets must be one for all images or one each, 2, got 3"),
        ({"model": nn.Identity()}, r"the network must return logits \(2, K\), got \(2, 2, 6, 5\); give score="),
        ({"model": nn.Identity(), "targets": 0}, r"the network must return logits \(14, K\), got"),
        ({"maps": torch.rand(2, 1, 5, 6)}, r"maps must be one an image and of its size, \(2, 1, 6, 5\), got"),
        ({"maps": torch.full((2, 1, 6, 5), torch.nan)}, "maps must be finite, 2 of 2 hold NaN .* leave those images out"),
        ({"images": torch.ones(2, 2, 6, 5).long()}, r"images must be \(B, C, H, W\) in floating point"),
    ],
)  # fmt: skip
def test_bad_input_of_insertion_and_deletion(options: dict[str, Any], message: str) -> None:
    given_ = {"model": small(), "images": torch.ones(2, 2, 6, 5), "maps": torch.rand(2, 1, 6, 5)} | options
    with pytest.raises(InputError, match=message):
        insertion_deletion(**given_)
    metric_options = {"steps", "insertion_baseline", "deletion_baseline", "batch_size", "blur_size", "blur_sigma"}
    if metric_options & options.keys() and options.get("steps") != 31:
        with pytest.raises(InputError, match=message.replace("in 1 … 30, the number of pixels", "at least 1")):
            InsertionDeletion(**options)
    metric = InsertionDeletion()
    metric.update(small(), torch.ones(0, 2, 6, 5), torch.ones(0, 1, 6, 5))
    assert metric.compute()["images"] == 0


@pytest.mark.parametrize("sigma", [1e-3, 1e-30])
def test_extreme_blur(sigma: float) -> None:
    """A kernel that is one pixel wide blurs nothing."""
    images, maps = torch.rand(2, 1, 4, 4), torch.rand(2, 1, 4, 4)

    def score(output: Tensor, _: Any) -> Tensor:
        return output.mean((1, 2, 3))

    curves = insertion_deletion(nn.Identity(), images, maps, blur_sigma=sigma, score=score)
    torch.testing.assert_close(curves.insertion, images.mean((1, 2, 3)).unsqueeze(1).expand(2, 5))
