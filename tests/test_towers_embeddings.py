"""Towers that give embeddings: open_clip's two sides, and modules with an ``output_dim``."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from zoo import encoder, towers
from zoo.errors import InputError

open_clip = pytest.importorskip("open_clip")


class Encoder(nn.Module):
    """Map (B, 3) to (B, 5)."""

    def __init__(self, output_dim: object = 5) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 5)
        self.output_dim = output_dim

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


def test_a_module_with_an_output_dim_gives_its_output() -> None:
    network = Encoder()
    x = torch.randn(2, 3)
    tower = towers.create(network, embedding=True)
    assert tower.dim == 5
    assert torch.equal(tower.features(x), network(x))
    # Without embedding=True the same module is a classifier of five classes over three features.
    classifier = towers.create(network)
    assert (classifier.dim, classifier.num_classes) == (3, 5)
    assert torch.equal(classifier.features(x), x)


def test_a_classifier_gives_the_input_of_its_head_as_embedding() -> None:
    tower = towers.create("zoo/resnet8", embedding=True)
    assert tower.dim == 64
    assert tower.features(torch.randn(2, 3, 8, 8)).shape == (2, 64)


def test_both_sides_of_an_open_clip_model_on_the_meta_device() -> None:
    with torch.device("meta"):
        image = towers.create("open_clip/ViT-B-32", embedding=True, modality="image", frozen=True)
        text = towers.create("open_clip/ViT-B-32", embedding=True, modality="text")
        timm_image = towers.create("open_clip/convnext_base", embedding=True, modality="image")
    assert image.dim == text.dim == timm_image.dim == 512
    assert not any(parameter.requires_grad for parameter in image.parameters())
    tokens = text.tokenizer(["a photo of a cat", "b"])
    assert tokens.shape == (2, 77)
    assert tokens.dtype == torch.int64
    assert "Normalize" in str(image.transform)
    with torch.device("meta"):
        short = towers.create("open_clip/ViT-B-32", embedding=True, modality="text", context_length=12)
    assert short.tokenizer(["a"]).shape == (1, 12)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("open_clip/ViT-B-33", {"modality": "image"}, r"no architecture 'ViT-B-33'.*ViT-B-32"),
        ("open_clip/ViT-B-32/laion2b", {"modality": "image"}, r"no weights 'laion2b'.*laion2b_"),
        ("open_clip/ViT-B-32", {}, "image and a text side: say which with modality, got None"),
        ("open_clip/ViT-B-32", {"modality": "text", "contextlength": 3}, "no option 'contextlength'.*context_length"),
        ("open_clip/ViT-B-32", {"modality": "text", "pretrained_text_path": "x"}, "refused"),
        ("open_clip/ViT-B-32", {"modality": "text", "num_classes": 3}, "has no classifier"),
    ],
)
def test_bad_names_and_options(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        towers.create(name, **options)


def test_bad_embeddings() -> None:
    with pytest.raises(InputError, match="output_dim of Encoder must be a positive integer, got 'five'"):
        towers.create(Encoder("five"), embedding=True)
    with pytest.raises(InputError, match=r"returned \(2, 5\), expected embeddings \(2, 7\)"):
        towers.create(Encoder(7), embedding=True).features(torch.randn(2, 3))
    with pytest.raises(InputError, match="returns embeddings and has no classifier"):
        _ = towers.create(Encoder(), embedding=True).num_classes
    with pytest.raises(InputError, match="reads no text"):
        _ = towers.create(Encoder(), embedding=True).tokenizer
    with pytest.raises(InputError, match="returns embeddings"):
        towers.create(Encoder(), embedding=True, num_classes=4)


@pytest.mark.parametrize("length", [16, 78])
def test_bad_text_length(length: int) -> None:
    with torch.device("meta"):
        clip = towers.create("open_clip/ViT-B-32", embedding=True, modality="text")
        texts = torch.zeros(2, length, dtype=torch.int64)
    message = f"reads texts of 77 tokens, got {length}: set context_length of the data to 77"
    for run in (clip, clip.features, encoder.Encoder(clip, 8)):
        with pytest.raises(InputError, match=message):
            run(texts)


def test_shorter_texts_where_the_network_reads_them() -> None:
    network = torch.nn.Embedding(9, 7)
    network.context_length, network.output_dim = 3, 7  # type: ignore[assignment]
    tower = towers.create(network, embedding=True)
    assert tower(torch.zeros(2, 2, dtype=torch.int64)).shape == (2, 2, 7)
    with pytest.raises(InputError, match="reads texts of at most 3 tokens, got 4"):
        tower(torch.zeros(2, 4, dtype=torch.int64))
    assert tower(torch.zeros(5, dtype=torch.int64)).shape == (5, 7)
