"""Retrieval and agreement between modalities: torchmetrics, the notes on arXiv 2505.11895, and attacks by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchmetrics.functional.retrieval import retrieval_hit_rate, retrieval_precision

from tests.advcal_cases import INPUTS, LABELS, encode
from tests.calibration_cases import quiet, toy
from zoo.calibration_attacks import generator_of
from zoo.calibration_cross_modal import CrossModalMetric, ModalityView, class_retrieval
from zoo.calibration_evaluation import CalibrationEvaluation
from zoo.errors import InputError

# fmt: off
QUERIES = torch.tensor([
    [0.2796602478321589, 0.763268072213265, 0.36218745157667875, -0.3359975652130457, -0.30844429288543784],
    [0.5808252615834115, 0.35050509193501594, -0.3874807059081208, -0.6237799052225683, -0.023356549909085304],
    [0.6733037263174223, -0.22858691279673296, -0.606900570835014, -0.04645387770910972, 0.35202819459675916],
    [0.2725328250941464, -0.6250398038543676, -0.22374497713546257, 0.10573316640361508, 0.6883384237225276],
    [-0.2082410151520737, -0.590853301404737, -0.038265611084317176, 0.7691477209462331, 0.12031451366778712],
    [-0.6067173683641938, -0.05502971662026442, 0.5829370735001125, 0.36310135097430996, -0.39649406360458445],
], dtype=torch.float64)
GALLERY = torch.tensor([
    [0.29547534176818413, 0.7715845387245104, 0.25940724613148564, -0.44104245493500444, -0.23567149935374587],
    [0.5211520041934826, 0.443573045595231, -0.32075991261176307, -0.6531697375404711, -0.046107636776283725],
    [0.743582126372954, 0.08263465839959463, -0.5513073161460572, -0.28304715499794403, 0.2370689473154586],
    [0.5843259688936877, -0.25851928783163286, -0.39868819185656906, -0.22779205238312197, 0.6171624149611696],
    [0.3914392798421315, -0.45828560023440096, -0.5401041172671817, 0.3704206292489441, 0.4558790396062568],
    [0.08511417991698045, -0.6249767715391614, -0.34132701056975484, 0.4637042707714728, 0.5202247903909979],
    [-0.2715807769653729, -0.402624812642858, 0.32314752646384387, 0.7770398211694667, 0.23647818987046296],
    [-0.5388924013327163, -0.27287910101109786, 0.4863030311821383, 0.4173504098108913, -0.4737720689434729],
    [-0.5105329727964593, -0.023937646989772125, 0.5774004122267842, 0.3670976772320029, -0.5202221949084938],
    [-0.232086901249147, 0.2541371673048561, 0.6946436629949901, -0.28080971691342876, -0.565832179016654],
    [0.12059559159631303, 0.5498437195753052, 0.2831674656362581, -0.39855323384341684, -0.6664083534359556],
    [0.43125145201158677, 0.6052779509156836, -0.19569770869675668, -0.6375718875758181, -0.05352833134945511],
], dtype=torch.float64)
# fmt: on
QUERY_LABELS = torch.tensor([0, 1, 2, 0, 1, 2])
GALLERY_LABELS = torch.tensor([2, 1, 2, 2, 1, 0, 1, 2, 2, 0, 1, 0])


def test_golden_class_hits() -> None:
    """c8 of the project's notes."""
    found = class_retrieval(QUERIES, QUERY_LABELS, GALLERY, GALLERY_LABELS, k=(1, 3, 5))
    expected = {"r1": 5 / 6, "precision1": 5 / 6, "r3": 1.0, "precision3": 0.5, "r5": 1.0, "precision5": 1 / 3}
    assert {name: value.item() for name, value in found.items()} == pytest.approx(expected, abs=1e-7)
    assert (QUERIES @ GALLERY.T)[0].topk(3).indices.tolist() == [0, 10, 11]


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.integers(0, 10**6))
def test_property_is_that_of_torchmetrics(queries: int, items: int, classes: int, seed: int) -> None:
    """Query by query; those whose class the gallery lacks do not count, and lengths do not matter."""
    made = torch.Generator().manual_seed(seed)
    rows, gallery = (torch.randn(n, 3, generator=made, dtype=torch.float64) for n in (queries, items))
    labels, own = (torch.randint(classes, (n,), generator=made) for n in (queries, items))
    found = class_retrieval(1e-9 * rows, labels, 1e9 * gallery, own, k=(1, 3))
    for k in (1, 3):
        each = [
            (retrieval_hit_rate(scores, own == label, top_k=k), retrieval_precision(scores, own == label, top_k=k))
            for scores, label in zip(
                2 + F.normalize(rows) @ F.normalize(gallery).T, labels, strict=True
            )  # negative ones it leaves out
            if (own == label).any()
        ]
        expected = torch.tensor(each).mean(0).tolist() if each else [math.nan] * 2
        assert [found[f"{name}{k}"].item() for name in ("r", "precision")] == pytest.approx(expected, nan_ok=True)


def test_ties_and_what_is_no_number() -> None:
    labels = torch.tensor([0, 1, 1])
    alike = class_retrieval(torch.ones(3, 2), labels, torch.ones(3, 2), labels, k=(1, 2, 3))
    assert [alike[f"r{k}"].item() for k in (1, 2, 3)] == pytest.approx([0, 2 / 3, 1])
    broken = torch.eye(3)
    broken[0, 0] = math.nan
    # The query that is no number finds nothing; the item that is none stands before the others of foreign queries.
    found = class_retrieval(broken, labels, broken, labels, k=(1, 2, 3))
    assert [found[f"r{k}"].item() for k in (1, 2, 3)] == pytest.approx([0, 2 / 3, 2 / 3])
    for rows, items in ((0, 3), (3, 0)):
        nothing = class_retrieval(torch.zeros(rows, 2), labels[:rows], torch.zeros(items, 2), labels[:items])
        assert all(value.isnan() for value in nothing.values())


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"k": 0}, "k must be one whole number of at least 1"),
        ({"query_labels": torch.zeros(2)}, r"queries must have one label a row, got 3 rows and labels \(2,\)"),
        ({"gallery": torch.zeros(3, 5)}, "gallery must be as wide as queries, 2, got 5"),
        ({"queries": torch.zeros(3)}, "queries must have two dimensions"),
    ],
)
def test_bad_arguments(change: dict[str, Any], match: str) -> None:
    given: dict[str, Any] = {"queries": torch.zeros(3, 2), "query_labels": torch.zeros(3), "gallery": torch.zeros(3, 2)}
    given |= {"gallery_labels": torch.zeros(3), **change}
    with pytest.raises(InputError, match=match):
        class_retrieval(**given)


def views(rows: slice, names: str = "abc") -> dict[str, ModalityView]:
    """Ten samples in three classes, of which 4 … 8 of ten predictions differ between modalities."""
    labels = torch.arange(10) % 3
    found = {}
    for place, name in enumerate("abc"):
        made = torch.Generator().manual_seed(place)
        clean, attacked = (torch.randn(10, 4, generator=made) for _ in range(2))
        classes, turned = (torch.randint(3, (10,), generator=made) for _ in range(2))
        found[name] = ModalityView(clean[rows], attacked[rows], classes[rows], turned[rows], labels[rows])
    return {name: found[name] for name in names}


def expected_values() -> dict[str, dict[str, float]]:
    whole, found = views(slice(None)), {}
    for name, view in whole.items():
        others = [whole[other] for other in whole if other != name]
        values: dict[str, list[float]] = {}
        for other in others:
            for prefix, queries in (("", view.clean), ("attacked_", view.attacked)):
                for key, value in class_retrieval(queries, view.labels, other.clean, other.labels).items():
                    if key in ("r1", "r5"):
                        values.setdefault(f"retrieval/{prefix}{key}", []).append(value.item())
            for kind, classes in (("clean", view.clean_classes), ("attacked", view.attacked_classes)):
                share = (classes == other.clean_classes).double().mean().item()
                values.setdefault(f"agreement/{kind}", []).append(share)
        found[name] = {key: sum(each) / 2 for key, each in values.items()}
    return found


def computed(metric: CrossModalMetric) -> dict[str, dict[str, float]]:
    return {name: {key: value.item() for key, value in found.items()} for name, found in metric.compute().items()}


def test_batches_are_added_up() -> None:
    metric = CrossModalMetric(["a", "b", "c"])
    for rows in (slice(0, 7), slice(7, 10), slice(0, 0)):
        metric.update(views(rows), paired=True)
    found, expected = computed(metric), expected_values()
    assert {name: pytest.approx(values) for name, values in found.items()} == expected
    assert found["a"]["agreement/clean"] != found["a"]["agreement/attacked"]


def test_what_is_not_there_is_left_out() -> None:
    metric = CrossModalMetric(["a", "b", "c"])
    metric.update(views(slice(None), "ab"), paired=False)
    found = computed(metric)
    assert found["c"] == {}
    assert list(found["a"]) == ["retrieval/r1", "retrieval/r5", "retrieval/attacked_r1", "retrieval/attacked_r5"]


def shared(rank: int, world: int) -> dict[str, Any]:
    """The first process has eight of the ten samples, the second two and no modality c of its own in one batch."""
    metric = CrossModalMetric(["a", "b", "c"])
    metric.update(views(slice(0, 8) if rank == 0 else slice(8, 10)), paired=True)
    first = computed(metric)
    metric.reset()
    metric.update(views(slice(None)) if rank == 0 else {}, paired=True)
    second = computed(metric)
    evaluation = CalibrationEvaluation(["a", "b", "c"], samples=4)
    evaluation.update("ab"[rank], {"clean": torch.tensor([True, rank == 0])}, torch.tensor([1.0, 2.0 + rank]))
    finished = {name: value.item() for name, value in evaluation.finish().items() if value.isfinite()}
    return {"merged": [first, second], "finished": finished}


def test_two_processes_equal_one(two_processes: Callable[..., list[Any]]) -> None:
    for found in two_processes(shared):
        for values in found["merged"]:
            assert {name: pytest.approx(each) for name, each in values.items()} == expected_values()
        # Each process has samples of another modality, and none of the third.
        wanted = {"clean": 0.75, "drift": 1.75, "a/clean": 1.0, "a/drift": 1.5, "b/clean": 0.5, "b/drift": 2.0}
        assert found["finished"] == pytest.approx(wanted)


# -- in the module -------------------------------------------------------------------------------------------------


def away_by_hand(through: Callable[[Tensor], Tensor], place: int, eps: float, steps: int) -> Tensor:
    """PGD on the distance of embeddings from the start that the module draws, as a loop."""
    generator = generator_of(INPUTS.device, (0, 4, place, 0, 0))
    point = INPUTS + eps * (2 * torch.rand(INPUTS.shape, generator=generator, dtype=INPUTS.dtype) - 1)
    point = point.clamp(0, 1)
    for _ in range(steps):
        point = point.detach().requires_grad_()
        (gradient,) = torch.autograd.grad((through(point) - through(INPUTS).detach()).square().sum(), point)
        point = (INPUTS + (point + eps * max(0.25, 2.5 / steps) * gradient.sign() - INPUTS).clamp(-eps, eps)).clamp(
            0, 1
        )
    return point.detach()


def test_identity_evaluation() -> None:
    """Inference mode, a head that turns embeddings round beside one that leaves them, against loops."""
    model = toy(modalities=("image", "audio"), eps=0.4, eval_steps=12, eval_samples=6)
    turned: Any = model.heads["audio"]
    with torch.no_grad():
        turned.weight.neg_()
    rows = [{"image": x, "audio": x, "label": label} for x, label in zip(INPUTS, LABELS, strict=True)]
    data: Any = DataLoader(rows, batch_size=6)  # type: ignore[arg-type]
    (found,) = quiet().validate(model, data, verbose=False)
    sides: dict[str, Callable[[Tensor], Tensor]] = {"image": encode, "audio": lambda x: -encode(x)}
    for place, (name, other) in enumerate((("image", "audio"), ("audio", "image"))):
        attacked = away_by_hand(sides[name], place, 0.4, 12)
        for prefix, x in (("", INPUTS), ("attacked_", attacked)):
            wanted = class_retrieval(sides[name](x), LABELS, sides[other](INPUTS), LABELS)
            assert found[f"val/{name}/retrieval/{prefix}r1"] == pytest.approx(wanted["r1"].item())
            assert found[f"val/{name}/retrieval/{prefix}r5"] == pytest.approx(wanted["r5"].item())
        with torch.no_grad():
            other_classes = model.logits(other, INPUTS).argmax(1)
            for kind, x in (("clean", INPUTS), ("attacked", attacked)):
                share = (model.logits(name, x).argmax(1) == other_classes).double().mean()
                assert found[f"val/{name}/agreement/{kind}"] == pytest.approx(share.item())
    for key in ("retrieval/r1", "retrieval/attacked_r5", "agreement/clean", "agreement/attacked"):
        both = [found[f"val/{name}/{key}"] for name in sides]
        assert found[f"val/{key}"] == pytest.approx(sum(both) / 2)


def test_modalities_that_are_no_pairs_do_not_agree() -> None:
    model = toy(modalities=("image", "audio"), eval_samples=4, eval_steps=1)
    changed: Any = model
    changed._trainer = type("T", (), {"training": False, "world_size": 1, "global_rank": 0, "current_epoch": 0})()
    model.validation_step({"image": (INPUTS, LABELS), "audio": (INPUTS[:3], LABELS[:3])}, 0)
    found = model.evaluation.finish()
    assert not any("agreement" in name for name in found)
    # Of six images four are attacked, and those alone are compared; the first three audios are the images.
    wanted = class_retrieval(encode(INPUTS[:4]), LABELS[:4], encode(INPUTS[:3]), LABELS[:3])
    assert found["image/retrieval/r1"].item() == pytest.approx(wanted["r1"].item())
    assert "retrieval/r1" not in toy().evaluation.finish()
