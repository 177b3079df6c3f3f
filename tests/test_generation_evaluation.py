"""Alignment and Fréchet distance, against their formulas; samples that depend on nothing but what they should."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import Tensor, nn

from zoo.architectures.tiny_mmdit import TinyTextToImage
from zoo.errors import InputError
from zoo.generation_evaluation import GenerationEvaluation, sample_prompts
from zoo.towers import Tower


class Pixels(nn.Module):
    """Features are the four pixels; the largest of the first three is the class."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)
        nn.init.zeros_(self.fc.bias)
        nn.init.eye_(self.fc.weight)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.fc(images.flatten(1))
        return logits


def judge() -> GenerationEvaluation:
    return GenerationEvaluation(Tower(Pixels(), frozen=True))


def restated(real: np.ndarray[Any, Any], fake: np.ndarray[Any, Any]) -> float:
    root = sqrtm(np.cov(real, rowvar=False) @ np.cov(fake, rowvar=False))
    spread = np.trace(np.cov(real, rowvar=False) + np.cov(fake, rowvar=False) - 2 * np.real(root))
    return float(((real.mean(0) - fake.mean(0)) ** 2).sum() + spread)


def images(count: int, seed: int, shift: float = 0.0) -> Tensor:
    return torch.randn(count, 1, 2, 2, generator=torch.Generator().manual_seed(seed)) * (1 + shift) + shift


def test_both_are_their_formulas() -> None:
    evaluation, real, fake = judge(), images(40, 0), images(30, 1, 0.5)
    asked = torch.arange(30) % 3
    evaluation.update_real(real[:25])
    evaluation.update_real(real[25:])
    seen = torch.cat([evaluation.update(fake[:7], asked[:7]), evaluation.update(fake[7:], asked[7:])])
    found = evaluation.compute()
    assert torch.equal(seen, fake.flatten(1)[:, :3].argmax(1))
    assert float(found["alignment"]) == pytest.approx((seen == asked).double().mean())
    expected = restated(real.flatten(1).double().numpy(), fake.flatten(1).double().numpy())
    assert float(found["frechet"]) == pytest.approx(expected, rel=1e-5)


def test_the_same_images_are_at_no_distance() -> None:
    evaluation = judge()
    evaluation.update_real(images(20, 0))
    evaluation.update(images(20, 0), torch.zeros(20, dtype=torch.int64))
    assert float(evaluation.compute()["frechet"]) == pytest.approx(0.0, abs=1e-5)


def test_reset_forgets_both_kinds() -> None:
    evaluation = judge()
    evaluation.update_real(images(9, 5, 3.0))
    evaluation.update(images(9, 6, 2.0), torch.zeros(9, dtype=torch.int64))
    evaluation.reset()
    evaluation.update_real(images(20, 0))
    evaluation.update(images(20, 0), images(20, 0).flatten(1)[:, :3].argmax(1))
    found = evaluation.compute()
    assert float(found["alignment"]) == 1.0
    assert float(found["frechet"]) == pytest.approx(0.0, abs=1e-5)


def test_too_few_images_have_no_distance() -> None:
    evaluation = judge()
    with pytest.raises(InputError, match="no generated image was counted"):
        evaluation.compute()
    evaluation.update_real(images(5, 0))
    evaluation.update(images(1, 0), torch.zeros(1, dtype=torch.int64))
    assert evaluation.compute().keys() == {"alignment"}


def test_it_adds_nothing_to_whoever_holds_it() -> None:
    holder = nn.Module()
    holder.evaluation = judge()
    holder.evaluation.update_real(images(5, 0))
    assert not list(holder.parameters())
    assert not holder.state_dict()
    assert not any(isinstance(module, Pixels) for module in holder.modules())


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (torch.tensor([0, 3]), "found 3"),
        (torch.tensor([0]), "one label per sample"),
        (torch.tensor([0.0, 1.0]), "integer labels"),
    ],
)
def test_wrong_classes_are_refused(asked: Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        judge().update(images(2, 0), asked)


def _share(rank: int, world_size: int) -> dict[str, float]:
    evaluation = judge()
    rows = slice(rank, None, world_size)
    evaluation.update_real(images(40, 0)[rows])
    evaluation.update(images(30, 1, 0.5)[rows], (torch.arange(30) % 3)[rows])
    return {name: float(value) for name, value in evaluation.compute().items()}


def test_two_processes_are_one(two_processes: Callable[..., list[Any]]) -> None:
    one = _share(0, 1)
    for found in two_processes(_share):
        assert found == pytest.approx(one, rel=1e-6)


# -- samples -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def backbone() -> TinyTextToImage:
    torch.manual_seed(0)
    return TinyTextToImage(vocab_size=20, width=16, depth=1, heads=2, text_width=8, context_length=4)


def test_samples_do_not_depend_on_the_batch_size(backbone: TinyTextToImage) -> None:
    text = torch.randint(1, 20, (5, 4))
    together = sample_prompts(backbone, text, steps=3)
    assert together.shape == (5, 1, 8, 8)
    torch.testing.assert_close(sample_prompts(backbone, text, steps=3, batch_size=2), together)
    torch.manual_seed(1)
    assert torch.equal(sample_prompts(backbone, text, steps=3), together)
    assert not torch.equal(sample_prompts(backbone, text, steps=3, seed=1), together)


def test_two_models_get_the_same_noise() -> None:
    """Where the velocity is 0, the images are the noise."""
    text = torch.ones(3, 2, dtype=torch.int64)
    still = []
    for width in (16, 8):
        model = TinyTextToImage(vocab_size=20, width=width, depth=1, heads=2)
        nn.init.zeros_(model.denoiser.proj_out.weight)
        nn.init.zeros_(model.denoiser.proj_out.bias)
        still.append(sample_prompts(model, text, steps=2))
    assert torch.equal(still[0], still[1])
    assert still[0].std() > 0.9


def test_no_prompt_is_refused(backbone: TinyTextToImage) -> None:
    with pytest.raises(InputError, match="text must have a row"):
        sample_prompts(backbone, torch.zeros(0, 4, dtype=torch.int64))
