"""Class sensitivity and pointing game against golden values, SciPy and loops over pixels; what all metrics share."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from torch import Tensor, nn
from torchmetrics import MetricCollection

from tests.saliency_networks import GoldenNetwork, golden, images
from tests.saliency_parts import quiet
from zoo.errors import InputError
from zoo.metrics import ClassSensitivity, InsertionDeletion, PointingGame, pointing_hits, spearman
from zoo.metrics.saliency_ranks import map_correlation

# -- rank correlation ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", ["relu1", "relu2"])
@pytest.mark.parametrize(("method", "name"), [("normgrad", "conv1x1_norm"), ("selective", "scaling_posnorm")])
def test_golden_class_sensitivity(layer: str, method: str, name: str) -> None:
    """The golden values were made with SciPy."""
    expected = golden()["expected"]["class_sensitivity"]
    network = GoldenNetwork()
    for size, suffix in (("input", "resized6x6"), ("layer", "native")):
        options: Any = {"layers": layer, "method": method, "size": size}
        most, least = (
            quiet(network, images(), torch.tensor(expected[key]), **options) for key in ("most_likely", "least_likely")
        )
        theirs = torch.tensor(expected[f"{layer}_{name}_{suffix}"], dtype=torch.float64)
        torch.testing.assert_close(spearman(most, least), theirs, rtol=1e-9, atol=1e-9)
        metric = ClassSensitivity()
        metric.update(most, least)
        found = metric.compute()
        assert found["class_sensitivity"].item() == pytest.approx(theirs.mean().item(), rel=1e-6)
        assert found["class_sensitivity_std"].item() == pytest.approx(np.std(theirs.numpy()), rel=1e-5)
        assert [found[key].item() for key in ("images", "constant", "not_finite")] == [2, 0, 0]


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 1000), width=st.integers(2, 40), levels=st.integers(1, 12))
def test_properties_spearman(seed: int, width: int, levels: int) -> None:
    """Few levels, so that ties and constant rows are common; SciPy one row at a time; monotone changes do not count."""
    generator = torch.Generator().manual_seed(seed)
    first, second = (torch.randint(-levels, levels, (3, width), generator=generator).double() for _ in range(2))
    found = spearman(first, second)
    for one, two, rho in zip(first, second, found.tolist(), strict=True):
        if one.unique().numel() > 1 and two.unique().numel() > 1:
            assert rho == pytest.approx(spearmanr(one, two).statistic, abs=1e-12)
        else:
            assert math.isnan(rho)
    torch.testing.assert_close(spearman(first.exp(), second.pow(3)), found, equal_nan=True, rtol=0, atol=0)
    torch.testing.assert_close(spearman(second, first), found, equal_nan=True)
    torch.testing.assert_close(spearman(-first, second), -found, equal_nan=True)
    itself = spearman(first, first)
    assert ((itself == 1) | itself.isnan()).all()


def test_spearman_of_a_map_that_is_mostly_background() -> None:
    """80 000 equal values: int32 sums of ranks would overflow."""
    first, second = torch.rand(2, 1, 300, 300)
    for one in (first, second):
        one[:, :267] = 0
    rho = spearman(first, second)
    assert rho.item() == pytest.approx(spearmanr(first.flatten(), second.flatten()).statistic, abs=1e-12)


def test_spearman_of_values_that_are_no_numbers() -> None:
    rows = torch.tensor([[1.0, 2, 3, 4], [1, 2, 3, math.nan], [1, 2, 3, math.inf], [5, 5, 5, 5], [-0.0, 0, 1, 2]])
    plain = torch.tensor([1.0, 2, 3, 4]).expand(5, 4)
    for found in (spearman(rows, plain), spearman(plain, rows)):
        assert found.isnan().tolist() == [False, True, False, True, False]
        tied = spearmanr([0, 0, 1, 2], [1, 2, 3, 4]).statistic
        assert found[[0, 2, 4]].tolist() == pytest.approx([1, 1, tied])
    assert spearman(torch.ones(2, 1), torch.ones(2, 1)).isnan().all()
    assert spearman(torch.ones(0, 3), torch.ones(0, 3)).shape == (0,)
    maps = torch.tensor([1.0, 2, 3, math.inf]).view(1, 1, 2, 2)
    assert map_correlation(maps, maps.nan_to_num(posinf=4)).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_spearman(dtype: torch.dtype) -> None:
    first, second = torch.rand(2, 4, 50).to(dtype)
    torch.testing.assert_close(spearman(first, second), spearman(first.double(), second.double()), rtol=0, atol=0)


# -- class sensitivity -----------------------------------------------------------------------------------------------


def test_class_sensitivity_counts_constant_maps_apart() -> None:
    """The third map is constant but for the rounding of a bilinear resize, of which ranks would make a map."""
    ramp = torch.arange(6.0).view(1, 1, 2, 3)
    rounding = torch.full((1, 1, 2, 3), 0.1)
    rounding[0, 0, 0, 1] += 1.5e-8
    assert rounding.unique().numel() == 2
    # The fourth pair is constant on one side and no number on the other: it counts once.
    most = torch.cat([ramp, torch.ones_like(ramp), rounding, torch.ones_like(ramp), ramp, ramp])
    least = torch.cat([-ramp, ramp, ramp, torch.full_like(ramp, math.nan), ramp / 0, 7 * ramp])
    assert map_correlation(most, least).isfinite().tolist() == [True, False, False, False, False, True]
    metric = ClassSensitivity()
    metric.update(most, least)
    metric.update(most[:0], least[:0])
    assert {name: value.item() for name, value in metric.compute().items()} == {
        "class_sensitivity": 0.0, "class_sensitivity_std": 1.0, "images": 2, "constant": 2, "not_finite": 2,
    }  # fmt: skip


def test_class_sensitivity_of_nothing() -> None:
    metric = ClassSensitivity()
    metric.update(torch.ones(2, 1, 3, 3), torch.rand(2, 1, 3, 3))
    found = metric.compute()
    assert found["class_sensitivity"].isnan()
    assert found["class_sensitivity_std"].isnan()
    assert found["images"] == 0
    assert found["constant"] == 2


def test_identity_normgrad_before_average_pooling_is_not_class_sensitive() -> None:
    network = GoldenNetwork(gap=True)
    for method, blind in (("normgrad", True), ("selective", False)):
        metric = ClassSensitivity()
        metric.update(*(quiet(network, images(), k, layers="relu2", method=method) for k in (0, 2)))
        value = metric.compute()["class_sensitivity"].item()
        assert (value > 1 - 1e-6) == blind


# -- pointing game ---------------------------------------------------------------------------------------------------


def pointed(column: int, row: int, side: tuple[int, int] = (60, 100)) -> Tensor:
    one = torch.zeros(1, 1, *side)
    one[0, 0, row, column] = 1
    return one


@pytest.mark.parametrize(("strict", "name"), [(True, "hit_strict_lt_15"), (False, "hit_le_15")])
def test_golden_pointing(strict: bool, name: str) -> None:
    given_ = golden()["expected"]["pointing"]
    maps = torch.cat([pointed(*point) for point in given_["points_uv"]])
    x0, y0, x1, y1 = given_["box_x0y0x1y1_inclusive"][0]
    mask = torch.zeros(60, 100, dtype=torch.bool)
    mask[y0 : y1 + 1, x0 : x1 + 1] = True
    boxes = torch.tensor(given_["box_x0y0x1y1_inclusive"]).expand(len(maps), 4)
    for objects in (boxes, boxes.double(), [*boxes.unsqueeze(1)], mask.expand(len(maps), 1, -1, -1)):
        assert pointing_hits(maps, objects, strict=strict).tolist() == given_[name]


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 1000),
    side=st.tuples(st.integers(1, 9), st.integers(2, 9)),
    tolerance=st.sampled_from([0.0, 1.0, 2.0**0.5, 2.5, 5.0]),
    count=st.integers(1, 3),
)
def test_properties_pointing(seed: int, side: tuple[int, int], tolerance: float, count: int) -> None:
    """Boxes, their masks, and a loop over all pixels agree, whatever the scale of the map."""
    generator = torch.Generator().manual_seed(seed)
    height, width = side
    maps = torch.rand(4, 1, height, width, generator=generator)
    boxes, masks = [], torch.zeros(4, height, width, dtype=torch.bool)
    for index in range(4):
        ends = [torch.randint(0, bound, (count, 2), generator=generator).sort(1).values for bound in (width, height)]
        boxes.append(torch.stack([ends[0][:, 0], ends[1][:, 0], ends[0][:, 1], ends[1][:, 1]], 1)[: index % count + 1])
        for x0, y0, x1, y1 in boxes[-1].tolist():
            masks[index, y0 : y1 + 1, x0 : x1 + 1] = True
    expected = []
    for one, mask in zip(maps[:, 0], masks, strict=True):
        v, u = divmod(int(one.argmax()), width)
        expected.append(
            any(
                bool(mask[y, x]) and (x - u) ** 2 + (y - v) ** 2 <= tolerance**2
                for y in range(height)
                for x in range(width)
            )
        )
    assert pointing_hits(maps, boxes, tolerance=tolerance).tolist() == expected
    assert pointing_hits(maps * 1e-20 - 3e-20, masks, tolerance=tolerance).tolist() == expected
    assert bool((pointing_hits(maps, boxes, tolerance=tolerance + 1) >= torch.tensor(expected)).all())


def test_pointing_ties_and_maps_that_point_nowhere() -> None:
    tied = torch.zeros(1, 1, 4, 4)
    tied[0, 0, 1, 3] = tied[0, 0, 2, 0] = 1.0
    first, other = torch.tensor([[3, 1, 3, 1]]), torch.tensor([[0, 2, 0, 2]])
    assert pointing_hits(tied, first, tolerance=0).all()
    assert not pointing_hits(tied, other, tolerance=0).any()
    everything = torch.ones(3, 4, 4, dtype=torch.bool)
    nowhere = torch.cat([torch.zeros(1, 1, 4, 4), tied.where(tied == 0, math.nan), tied.where(tied == 0, math.inf)])
    assert not pointing_hits(nowhere, everything).any()


def test_pointing_averages() -> None:
    """Class 0: 1 of 2, class 2: 1 of 1, class 3: 0 of 1, class 1 has no pair."""
    maps = torch.cat([pointed(*point, side=(8, 8)) for point in [(0, 0), (7, 7), (3, 3), (0, 7)]])
    boxes = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1], [3, 3, 4, 4], [5, 0, 7, 1]])
    labels = torch.tensor([0, 0, 2, 3])
    found = {}
    for average in ("macro", "micro", "none"):
        options: Any = {"average": average, "num_classes": 5 if average == "none" else None}
        game = PointingGame(1, **options)
        for part in (slice(0, 1), slice(1, 1), slice(1, 4)):
            game.update(maps[part], boxes[part], labels[part])
        found[average] = game.compute()
    assert found["macro"].item() == 0.5
    assert found["micro"].item() == 0.5
    torch.testing.assert_close(found["none"], torch.tensor([0.5, math.nan, 1, 0, math.nan]), equal_nan=True)
    game = PointingGame()
    assert game.tolerance == 15
    game.update(maps[:0], boxes[:0], labels[:0])
    assert game.compute().isnan()


def test_collection_does_not_confuse_two_tolerances() -> None:
    """After the first batch both have the same states; torchmetrics would go on with one of them."""
    pair = MetricCollection({"near": PointingGame(1), "far": PointingGame(5), "strict": PointingGame(5, strict=True)})
    box = torch.tensor([[0, 0, 0, 0]])
    pair.update(pointed(0, 0), box, torch.tensor([0]))
    pair.update(pointed(4, 3), box, torch.tensor([0]))
    assert {name: value.item() for name, value in pair.compute().items()} == {"near": 0.5, "far": 1.0, "strict": 0.5}


# -- what all three share --------------------------------------------------------------------------------------------

METRICS: dict[str, tuple[Callable[[], Any], str]] = {
    "sensitivity": (ClassSensitivity, "class_sensitivity"),
    "pointing": (lambda: PointingGame(2), ""),
    "curves": (lambda: InsertionDeletion(steps=3, batch_size=5), "insertion"),
}


def batches(name: str) -> list[tuple[Any, ...]]:
    """Samples of a metric one by one; the map of one image is constant."""
    generator = torch.Generator().manual_seed(3)
    first, second = torch.rand(2, 7, 1, 6, 5, generator=generator)
    first[2] = 1
    if name == "sensitivity":
        return [(first[i : i + 1], second[i : i + 1]) for i in range(7)]
    if name == "pointing":
        boxes = torch.tensor(
            [[1, 1, 3, 2], [0, 0, 0, 0], [4, 4, 4, 5], [2, 2, 2, 2], [0, 3, 1, 5], [3, 0, 4, 1], [1, 4, 1, 4]]
        )
        labels = torch.tensor([0, 1, 1, 2, 0, 2, 1])
        return [(first[i : i + 1], boxes[i : i + 1], labels[i : i + 1]) for i in range(7)]
    network = nn.Sequential(nn.Flatten(), nn.Linear(30, 3)).double()
    with torch.no_grad():
        network[1].weight.copy_(torch.randn(3, 30, generator=generator))
        network[1].bias.zero_()
    return [(network, second[i : i + 1], first[i : i + 1]) for i in range(7)]


def numbers(found: Any) -> list[float]:
    return [value.item() for value in (found.values() if isinstance(found, dict) else [found])]


@pytest.mark.parametrize("name", METRICS)
def test_identity_batches_merge_pickle_reset(name: str) -> None:
    make = METRICS[name][0]
    samples = batches(name)
    whole, first, second = make(), make(), make()
    for index, sample in enumerate(samples):
        whole.update(*sample)
        (first if index < 4 else second).update(*sample)
    expected = numbers(whole.compute())
    again = pickle.loads(pickle.dumps(first))
    again.to(torch.bfloat16)  # what is kept stays as it is
    again.merge_state(second)
    assert numbers(again.compute()) == pytest.approx(expected, abs=1e-7)
    again.reset()
    with torch.inference_mode():
        again.reset()
        again.update(*samples[0])
    again.update(*samples[1])
    other = make()
    for sample in samples[:2]:
        assert numbers(other(*sample)) == pytest.approx(numbers(other(*sample)), nan_ok=True)
    fresh = make()
    for sample in samples[:2]:
        fresh.update(*sample)
    assert numbers(again.compute()) == pytest.approx(numbers(fresh.compute()))
    assert again.state_dict() == {}


def _one_process(rank: int, world_size: int) -> dict[str, list[float]]:
    """The first process has five samples and the second two; of the curves it has all, and the second none."""
    found = {}
    for name, (make, _) in METRICS.items():
        metric = make()
        for index, sample in enumerate(batches(name)):
            if (rank == 0) == (index < 5 or name == "curves"):
                metric.update(*sample)
        found[name] = numbers(metric.compute())
    return found


def test_two_processes_equal_one(two_processes: Callable[..., list[Any]]) -> None:
    results = two_processes(_one_process)
    for name, (make, _) in METRICS.items():
        metric = make()
        for sample in batches(name):
            metric.update(*sample)
        expected = numbers(metric.compute())
        assert results[0][name] == results[1][name] == pytest.approx(expected, abs=1e-7)


# -- bad input -------------------------------------------------------------------------------------------------------

MAPS = torch.rand(2, 1, 4, 4)
BOXES = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1]])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: spearman(torch.ones(2, 3), torch.ones(2, 4)), "second must have the shape of first"),
        (lambda: spearman(torch.ones(3), torch.ones(3)), r"first must be \(B, …\) in floating point"),
        (lambda: spearman(torch.ones(2, 3).long(), torch.ones(2, 3)), "first must be .* got shape .* torch.int64"),
        (lambda: spearman(torch.ones(2, 0), torch.ones(2, 0)), "at least one value a row"),
        (lambda: ClassSensitivity().update(MAPS[:, 0], MAPS[:, 0]), r"maps_most must be maps \(B, 1, H, W\)"),
        (lambda: ClassSensitivity().update(MAPS, MAPS[:1]), "maps_least must have the shape of maps_most"),
        (lambda: PointingGame(-1), "tolerance must be finite and not negative, got -1"),
        (lambda: PointingGame(0, strict=True), "tolerance must be positive and finite, got 0"),
        (lambda: PointingGame(average="weighted"), "average must be one of macro, micro, none, got 'weighted'"),  # type: ignore[arg-type]
        (lambda: PointingGame(num_classes=0), "num_classes must be at least 1, got 0"),
        (lambda: PointingGame().update(MAPS, BOXES, torch.tensor([0])), r"labels must be one number a row, shape \(2,\)"),
        (lambda: PointingGame().update(MAPS, BOXES, torch.tensor([0, -1])), "labels must be at least 0, found -1"),
        (
            lambda: PointingGame(num_classes=2).update(MAPS, BOXES, torch.tensor([0, 2])),
            "labels must be in 0 … num_classes - 1 = 1, found 2",
        ),
        (lambda: pointing_hits(MAPS, BOXES[:1]), "objects must be one entry a map, 2, got 1"),
        (lambda: pointing_hits(MAPS, torch.ones(2, 5, 4, dtype=torch.bool)), "masks of the size of maps, .* resize the"),
        (lambda: pointing_hits(MAPS, torch.ones(2, 4, 4)[..., :3]), r"boxes x0, y0, x1, y1, \(n, 4\) a map; objects\[0\]"),
        (lambda: pointing_hits(MAPS, BOXES.flip(1)), "with x0 <= x1 and y0 <= y1; convert x, y, width, height"),
        (lambda: pointing_hits(MAPS, BOXES / torch.zeros(2, 4)), "with x0 <= x1"),
        (lambda: pointing_hits(MAPS, [BOXES, BOXES[:0]]), "1 have none, the first at position 1; leave those pairs out"),
        (lambda: pointing_hits(MAPS, torch.zeros(2, 4, 4, dtype=torch.bool)), "2 have none, the first at position 0"),
    ],
)  # fmt: skip
def test_bad_input(call: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()


def test_bad_objects_that_are_no_boxes() -> None:
    maps = torch.zeros(2, 1, 3, 3)
    with pytest.raises(InputError, match="boxes of real numbers"):
        pointing_hits(maps, torch.zeros(2, 4, dtype=torch.complex64))
    with pytest.raises(InputError, match="one entry a map, got a single number"):
        pointing_hits(maps, torch.tensor(1.0))
    with pytest.raises(InputError, match="maps must be maps"):
        PointingGame().update(torch.tensor(1.0), torch.zeros(0, 4), torch.zeros(0).long())
    with pytest.raises(InputError, match="images must be"):
        InsertionDeletion().update(nn.Identity(), torch.tensor(1.0), maps)
