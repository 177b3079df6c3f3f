"""zoo.metrics.ZeroShotAccuracy and its class embeddings against counts made one sample at a time."""

from __future__ import annotations

import doctest
import math
import pickle
from typing import Any

import lightning as L
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MetricCollection

import zoo.metrics.zero_shot
from zoo.errors import InputError
from zoo.metrics.zero_shot import ZeroShotAccuracy, class_embeddings, class_prompts

VECTORS = {"a": [3.0, 4.0], "b": [0.0, 2.0], "c": [-5.0, 0.0], "d": [5.0, 0.0], "zero": [0.0, 0.0]}


def encode(texts: list[str]) -> Tensor:
    return torch.tensor([VECTORS[text] for text in texts])


def plain_hits(embeddings: Tensor, targets: Tensor, classes: Tensor, k: int) -> list[bool]:
    """One sample at a time, in float64: how many other classes are not farther than that of the sample?"""
    hits = []
    for row, target in zip(embeddings.double(), targets.tolist(), strict=True):
        cosines = [float(row @ c / (row.norm() * c.norm() or 1)) for c in classes.double()]
        ahead = sum(not value < cosines[target] - 1e-6 for j, value in enumerate(cosines) if j != target)
        hits.append(ahead < k and math.isfinite(cosines[target]))
    return hits


def test_golden() -> None:
    """Cosines with three classes at 0, 90 and 180 degrees: samples at 10, 80, 100 and 170 degrees."""
    classes = torch.tensor([[2.0, 0.0], [0.0, 0.1], [-1.0, 0.0]])
    degrees = torch.tensor([10.0, 80.0, 100.0, 170.0]).deg2rad()
    samples = 3 * torch.stack([degrees.cos(), degrees.sin()], 1)
    # Classes by nearness: 0 1 2; 1 0 2; 1 2 0; 2 1 0.
    targets = torch.tensor([0, 0, 0, 2])
    both = ZeroShotAccuracy(classes, k=(1, 2))
    both.update(samples, targets)
    assert {name: value.item() for name, value in both.compute().items()} == {"top1": 0.5, "top2": 0.75}
    macro = ZeroShotAccuracy(classes, k=1, average="macro")
    macro.update(samples, targets)
    # Class 0 has a third, class 2 all, class 1 no sample.
    assert macro.compute().item() == pytest.approx((1 / 3 + 1) / 2)


def test_golden_class_embeddings() -> None:
    """Units (0.6, 0.8) and (0, 1), their mean (0.3, 0.9), of length sqrt(0.9); the mean of raw vectors is (1.5, 3)."""
    result = class_embeddings(encode, [["a", "b"], ["c"], ["c", "d"], ["zero"], ["b", "zero"]])
    expected = [[0.3 / math.sqrt(0.9), 0.9 / math.sqrt(0.9)], [-1, 0], [0, 0], [0, 0], [0, 1]]
    torch.testing.assert_close(result, torch.tensor(expected), rtol=0, atol=1e-6)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 256])
def test_identity_batches_of_prompts(batch_size: int) -> None:
    seen: list[int] = []

    def watched(texts: list[str]) -> Tensor:
        seen.append(len(texts))
        return encode(texts)

    prompts = [["a", "b", "c"], ["d"], ["b", "a"]]
    result = class_embeddings(watched, prompts, batch_size=batch_size)
    torch.testing.assert_close(result, class_embeddings(encode, prompts))
    assert max(seen) <= batch_size
    assert sum(seen) == 6


def test_stop_gradient() -> None:
    weights = torch.ones(3, 2, requires_grad=True)
    classes = class_embeddings(lambda texts: weights[: len(texts)] * 2, [["x"], ["y", "z"]])
    assert not classes.requires_grad
    metric = ZeroShotAccuracy(weights, k=1)
    assert metric.class_embeddings is not None
    assert not metric.class_embeddings.requires_grad
    assert not metric(torch.randn(4, 2, requires_grad=True), torch.tensor([0, 1, 2, 0])).requires_grad


def test_class_prompts() -> None:
    assert class_prompts(["{x}", "y"], ["a {}", "{} and {} {z}"]) == [
        ["a {x}", "{x} and {x} {z}"],
        ["a y", "y and y {z}"],
    ]


@settings(deadline=None, max_examples=40)
@given(data=st.data(), seed=st.integers(0, 100), classes=st.integers(2, 6))
def test_properties(data: st.DataObject, seed: int, classes: int) -> None:
    """Few different vectors, so that ties, zeros and duplicates are common; lengths, order and batches do not count."""
    generator = torch.Generator().manual_seed(seed)
    rows = data.draw(st.integers(1, 12))
    prototypes = torch.randint(-1, 2, (classes, 2), generator=generator).float()
    samples = torch.randint(-1, 2, (rows, 2), generator=generator).float()
    targets = torch.randint(0, classes, (rows,), generator=generator)
    ks = (1, classes)
    metric = ZeroShotAccuracy(7 * prototypes, k=ks)
    order = torch.randperm(rows, generator=generator)
    size = data.draw(st.integers(1, 12))
    scale = torch.rand(rows, 1, generator=generator) * 1e20 + 1e-20
    for start in range(0, rows, size):
        part = order[start : start + size]
        metric.update((scale * samples)[part], targets[part])
    expected = [sum(plain_hits(samples, targets, prototypes, k)) / rows for k in ks]
    assert [value.item() for value in metric.compute().values()] == pytest.approx(expected)
    assert metric.compute()[f"top{classes}"] == 1


@settings(deadline=None, max_examples=20)
@given(classes=st.permutations(range(5)))
def test_properties_order_of_classes(classes: list[int]) -> None:
    """Two classes are the same: whichever comes first, neither is found first."""
    prototypes = torch.tensor([[1.0, 0], [1.0, 0], [0, 1], [-1, 0], [0, -1]])
    metric = ZeroShotAccuracy(prototypes[classes], k=(1, 2))
    metric.update(prototypes[classes], torch.arange(5))
    assert [value.item() for value in metric.compute().values()] == pytest.approx([0.6, 1.0])


@pytest.mark.parametrize("width", [1, 7, 512])
def test_constant_embeddings_score_nothing(width: int) -> None:
    """Rounding that depends on the place in the matrix product does not break the tie."""
    vector = torch.randn(1, width)
    metric = ZeroShotAccuracy(vector.expand(37, -1), k=(1, 36, 37))
    metric.update(vector.expand(100, -1) * torch.rand(100, 1), torch.arange(100) % 37)
    assert [value.item() for value in metric.compute().values()] == [0, 0, 1]


def test_differences_below_rounding_are_ties() -> None:
    """Cosines of 0.70710678 and 0.70710699 are one number, 0.70710678 and 0.707127 are two."""
    for difference, expected in ((3e-7, 0), (3e-5, 1)):
        metric = ZeroShotAccuracy(torch.tensor([[1.0, 0.0], [1.0, difference]]), k=1)
        metric.update(torch.ones(1, 2), torch.tensor([1]))
        assert metric.compute() == expected


def test_not_finite_and_zero_embeddings_are_wrong() -> None:
    metric = ZeroShotAccuracy(torch.eye(3), k=(1, 3))
    rows = torch.tensor([[math.nan, 0, 0], [math.inf, 0, 0], [0, 0, 0], [1, 0, 0]])
    metric.update(rows, torch.zeros(4, dtype=torch.int64))
    assert [value.item() for value in metric.compute().values()] == [0.25, 0.5]
    alone = ZeroShotAccuracy(torch.ones(1, 3), k=1)
    alone.update(rows, torch.zeros(4, dtype=torch.int64))
    assert alone.compute() == 0.5  # the row of zeros has no rival
    broken = ZeroShotAccuracy(torch.tensor([[1.0, 0], [0, 1], [math.nan, 0]]), k=(1, 2))
    broken.update(torch.eye(2), torch.arange(2))
    assert [value.item() for value in broken.compute().values()] == [0, 1]


def test_no_sample() -> None:
    metric = ZeroShotAccuracy(torch.eye(2), k=1)
    metric.update(torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64))
    assert metric.compute().isnan()
    macro = ZeroShotAccuracy(torch.eye(2), k=(1, 2), average="macro")
    macro.update(torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64))
    assert all(value.isnan() for value in macro.compute().values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_half_precision(dtype: torch.dtype) -> None:
    """Cosines are float32 under autocast: bfloat16 cannot tell these two classes apart."""
    classes = torch.tensor([[1.0, 0.0], [1.0, 1e-2]])
    metric = ZeroShotAccuracy(classes, k=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        metric.update(torch.tensor([[1.0, 0.0], [1.0, 1.0]], dtype=dtype), torch.tensor([0, 1]))
    assert metric.compute() == 1
    large = ZeroShotAccuracy(torch.eye(2, dtype=dtype), k=1)
    large.update(torch.full((1, 2), 6e4, dtype=dtype) * torch.tensor([[1.0, 0.5]], dtype=dtype), torch.tensor([0]))
    assert large.compute() == 1


def test_conversion_keeps_counts() -> None:
    metric = ZeroShotAccuracy(torch.eye(2), k=1)
    metric.update(torch.eye(2), torch.tensor([0, 0]))
    metric.to(torch.bfloat16).half()
    metric.update(torch.eye(2), torch.tensor([0, 1]))
    assert metric.counts.dtype == torch.int64
    assert metric.compute() == 0.75


def test_set_classes() -> None:
    """New class embeddings an epoch, of another number too; not in the middle of one."""
    metric = ZeroShotAccuracy(k=1)
    with pytest.raises(InputError, match=r"class_embeddings are missing; call set_classes\(class_embeddings\) before"):
        metric.update(torch.eye(2), torch.tensor([0, 1]))
    for classes in (torch.eye(2), torch.eye(2).flip(0), torch.tensor([[0.0, 1.0], [1.0, 0.0], [-1.0, 0.0]])):
        metric.reset()
        metric.set_classes(classes)
        metric.update(torch.eye(2), torch.tensor([0, 1]))
        assert metric.compute() == float(torch.equal(classes, torch.eye(2)))
        with pytest.raises(InputError, match=r"cannot change between batches of one result; call reset\(\) first"):
            metric.set_classes(classes)
        assert metric.counts.shape == (len(classes),)


def test_class_embeddings_are_a_copy() -> None:
    """The tower's next step does not change them."""
    classes = torch.eye(2)
    metric = ZeroShotAccuracy(classes, k=1)
    classes.mul_(-1)
    metric.update(torch.eye(2), torch.tensor([0, 1]))
    assert metric.compute() == 1


def test_identity_forward_and_merge() -> None:
    metric, other = ZeroShotAccuracy(torch.eye(2), k=1), ZeroShotAccuracy(torch.eye(2), k=1)
    assert metric(torch.eye(2), torch.tensor([0, 1])) == 1
    assert metric(torch.eye(2), torch.tensor([1, 0])) == 0
    other.update(torch.eye(2), torch.tensor([0, 1]))
    metric.merge_state(other)
    assert metric.compute() == pytest.approx(4 / 6)


def test_inference_mode() -> None:
    metric = ZeroShotAccuracy(torch.eye(2), k=1)
    with torch.inference_mode():
        metric.reset()
        metric.update(torch.eye(2), torch.tensor([0, 1]))
    metric.update(torch.eye(2), torch.tensor([1, 1]))
    assert metric.compute() == 0.75


def test_pickle_and_reset() -> None:
    metric = ZeroShotAccuracy(torch.eye(2), k=(1, 2))
    metric.update(torch.eye(2), torch.tensor([0, 0]))
    again = pickle.loads(pickle.dumps(metric))
    again.update(torch.eye(2), torch.tensor([0, 1]))
    assert again.compute()["top1"] == 0.75
    again.reset()
    assert again.counts.sum() == 0
    assert metric.compute()["top1"] == 0.5
    assert metric.state_dict() == {}


def test_collection_does_not_confuse_two_sets_of_prompts() -> None:
    """After the first batch both have the same counts; torchmetrics would go on with one of them."""
    pair = MetricCollection(
        {"seen": ZeroShotAccuracy(torch.eye(2), k=1), "unseen": ZeroShotAccuracy(torch.ones(2, 2).triu(), k=1)}
    )
    pair.update(torch.eye(2), torch.tensor([0, 1]))
    pair.update(torch.tensor([[0.0, 1.0]]), torch.tensor([1]))
    pair.update(torch.tensor([[0.5, 0.9]]), torch.tensor([0]))
    assert {name: value.item() for name, value in pair.compute().items()} == {"seen": 0.75, "unseen": 1.0}
    named = MetricCollection([ZeroShotAccuracy(torch.eye(5))], prefix="val/")
    named.update(torch.eye(5), torch.arange(5))
    assert named.compute() == {"val/top1": 1, "val/top5": 1}


class _Logs(L.LightningModule):
    """Classes come before each epoch; in the second they are swapped."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 2)
        self.metric = ZeroShotAccuracy(k=1)
        self.values: list[float] = []

    def training_step(self, batch: list[Tensor]) -> Tensor:
        return self.layer(batch[0]).sum()

    def on_validation_epoch_start(self) -> None:
        even = self.current_epoch % 2 == 0
        self.metric.set_classes(torch.eye(2) if even else torch.eye(2).flip(0))

    def validation_step(self, batch: list[Tensor]) -> None:
        self.metric.update(*batch)
        self.log("val/zero_shot", self.metric)

    def on_train_epoch_end(self) -> None:
        self.values.append(self.trainer.callback_metrics["val/zero_shot"].item())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def test_lightning_logs_the_scalar() -> None:
    data = DataLoader(TensorDataset(torch.eye(2), torch.arange(2)), batch_size=1)
    module = _Logs()
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data, data)
    assert module.values == [1.0, 0.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, r"k must be one whole number of at least 1 or several different ones, got 0"),
        ({"k": ()}, r"k must be .* got \(\)"),
        ({"k": (1, 1)}, r"k must be .* got \(1, 1\)"),
        ({"k": 1.5}, r"k must be .* got 1.5"),
        ({"k": (1, 4)}, r"k must be at most the number of classes, got 4 for 3 classes"),
        ({"average": "weighted"}, r"average must be one of micro, macro, got 'weighted'"),
        ({"class_embeddings": torch.ones(3)}, r"class_embeddings must have two dimensions"),
        ({"class_embeddings": torch.ones(3, 0)}, r"class_embeddings must have at least one column"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ZeroShotAccuracy(**({"class_embeddings": torch.eye(3), "k": 1} | options))


@pytest.mark.parametrize(
    ("embeddings", "targets", "message"),
    [
        (torch.ones(2, 4), torch.tensor([0, 1]), r"embeddings must have the width of class_embeddings, 3, got 4"),
        (torch.ones(2, 3), torch.tensor([0, 3]), r"targets must be labels in 0 … 2 \(3 classes\), found 3"),
        (torch.ones(2, 3), torch.tensor([0]), r"targets must be one label per sample"),
        (torch.ones(2, 3).long(), torch.tensor([0, 1]), r"embeddings must be floating point"),
    ],
)
def test_bad_batch(embeddings: Tensor, targets: Tensor, message: str) -> None:
    metric = ZeroShotAccuracy(torch.eye(3), k=1)
    with pytest.raises(InputError, match=message):
        metric.update(embeddings, targets)
    assert metric.counts.sum() == 0


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], r"prompts must be one list of strings a class, got \[\]"),
        ("cat", r"prompts must be one list of strings a class, got 'cat'"),
        (["cat"], r"prompts\[0\] must be a list of strings, got the string 'cat'; put it into a list"),
        ([["a"], []], r"prompts\[1\] must be a list of at least one string, got \[\]"),
        ([["a", 3]], r"prompts\[0\] must be a list of at least one string"),
    ],
)
def test_bad_prompts(prompts: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        class_embeddings(encode, prompts)


def test_bad_encode_and_templates() -> None:
    with pytest.raises(InputError, match="encode must return one row a prompt, got 1 for 2 prompts"):
        class_embeddings(lambda texts: torch.ones(1, 2), [["a", "b"]])
    with pytest.raises(InputError, match="what encode returns must have two dimensions"):
        class_embeddings(lambda texts: torch.ones(len(texts)), [["a", "b"]])
    with pytest.raises(InputError, match="batch_size must be at least 1, got 0"):
        class_embeddings(encode, [["a"]], batch_size=0)
    with pytest.raises(InputError, match=r"templates must hold \{\} where the name of the class goes, got 'a photo'"):
        class_prompts(["cat"], ["a photo"])
    with pytest.raises(InputError, match="class_names must be a list of strings, got the string 'cat'"):
        class_prompts("cat")


def test_examples() -> None:
    result = doctest.testmod(zoo.metrics.zero_shot, extraglobs={"torch": torch})
    assert result.attempted > 0
    assert result.failed == 0
