"""Outputs of every layer of a frozen encoder, and the pair of layers whose neighbours agree."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from tests.metrics.structure_layers import IMAGE_LAYERS, TEXT_LAYERS
from zoo import towers
from zoo.errors import InputError
from zoo.layer_selection import LayerScores, block_names, extract_layers, select_layers
from zoo.metrics.cka import cka_table
from zoo.metrics.mutual_knn import mutual_knn_table

timm = pytest.importorskip("timm")
open_clip = pytest.importorskip("open_clip")

TEXTS = torch.tensor([[7, 3, 9, 0, 0], [5, 9, 0, 0, 0], [4, 4, 8, 2, 9], [9, 0, 0, 0, 0]])


def vit() -> nn.Module:
    network = timm.models.vision_transformer.VisionTransformer(
        img_size=16, patch_size=8, embed_dim=12, depth=3, num_heads=2, num_classes=4
    )
    return network.eval()


def text_network(**options: Any) -> nn.Module:
    network = open_clip.transformer.TextTransformer(
        context_length=5, vocab_size=10, width=8, heads=2, layers=3, output_dim=6, **options
    )
    return network.eval()


def hidden(network: nn.Module, tokens: Tensor) -> list[Tensor]:
    """The input of the first block and the output of each, by open_clip's own means."""
    x, mask = network._embeds(tokens)
    states = [x]
    for block in network.transformer.resblocks:
        states.append(block(states[-1], attn_mask=mask))
    return states


def images(count: int = 6) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(3))


def test_image_transformer() -> None:
    """The class token after every block, and the mean over the patches."""
    network, x = vit(), images()
    states = network.forward_intermediates(
        x, norm=False, output_fmt="NLC", return_prefix_tokens=True, intermediates_only=True
    )
    tower = towers.create(network, frozen=True)
    tokens = extract_layers(tower, [x[:4], x[4:]], modality="image")
    assert list(tokens) == ["blocks.0", "blocks.1", "blocks.2"]
    means = extract_layers(network, [x], modality="image", pool="mean")
    for name, (patches, prefix) in zip(tokens, states, strict=True):
        torch.testing.assert_close(tokens[name], prefix[:, 0])
        torch.testing.assert_close(means[name], patches.mean(1))
        assert not tokens[name].requires_grad


@pytest.mark.parametrize("batch_first", [True, False])
def test_text_transformer(batch_first: bool) -> None:
    """Masked means of open_clip's hidden states, whichever way its blocks hold the batch."""
    network = text_network()
    expected = hidden(network, TEXTS)
    if not batch_first:
        other = open_clip.transformer.Transformer(width=8, layers=3, heads=2, batch_first=False)
        other.load_state_dict(network.transformer.state_dict())
        network.transformer = other.eval()
    names = ["transformer.resblocks.0:input", *(f"transformer.resblocks.{i}" for i in range(3))]
    loader = [{"text": TEXTS, "image": images(4)}]
    features = extract_layers(network, loader, modality="text")
    assert list(features) == names
    last = extract_layers(network, loader, modality="text", pool="last", layers=names[1:])
    first = extract_layers(network, loader, modality="text", pool="cls", layers=names[1:2])
    lengths = [3, 2, 5, 1]
    for name, state in zip(names, expected, strict=True):
        for row, length in enumerate(lengths):
            torch.testing.assert_close(features[name][row], state[row, :length].mean(0), rtol=1e-4, atol=1e-5)
            if name in last:
                torch.testing.assert_close(last[name][row], state[row, length - 1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(first[names[1]], expected[1][:, 0], rtol=1e-4, atol=1e-5)


def test_text_with_a_class_token() -> None:
    """CoCa's text side appends one, which is no token of the text."""
    network = text_network(embed_cls=True)
    expected = hidden(network, TEXTS)[1]
    features = extract_layers(network, [TEXTS], modality="text", layers=["transformer.resblocks.0"])
    torch.testing.assert_close(features["transformer.resblocks.0"][2], expected[2, :5].mean(0))
    torch.testing.assert_close(features["transformer.resblocks.0"][3], expected[3, 0])


class _Embedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.table(x).sum(1)


def test_padding() -> None:
    """On the left as well; a text of padding alone is zero; a network that does not say its padding is asked."""
    network = _Embedding()
    tokens = torch.tensor([[2, 2, 5, 6], [2, 2, 2, 2]])
    rows = network.table.weight.detach()
    features = extract_layers(network, [tokens], ["table"], modality="text", pad_id=2)["table"]
    torch.testing.assert_close(features, torch.stack([(rows[5] + rows[6]) / 2, torch.zeros(3)]))
    whole = extract_layers(network, [tokens], ["table"], modality="text", pad_id=-1)["table"]
    torch.testing.assert_close(whole[1], rows[2])
    with pytest.raises(InputError, match="does not say which token is padding: give pad_id, or -1 if there is none"):
        extract_layers(network, [tokens], ["table"], modality="text")


def test_maps_and_vectors() -> None:
    """Maps are averaged where their channels are, vectors stay; in-place layers behind do not change what was taken."""
    network = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(5 * 14 * 14, 7))
    x = images()
    features = extract_layers(network, [x], ["0", "1", "3"], modality="image")
    torch.testing.assert_close(features["0"], network[0](x).mean((2, 3)).detach())
    torch.testing.assert_close(features["1"], network[0](x).relu().mean((2, 3)).detach())
    torch.testing.assert_close(features["3"], network(x).detach())
    vectors = nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True))
    x = torch.randn(5, 4)
    assert torch.equal(extract_layers(vectors, [x], ["0"], modality="image")["0"], vectors[0](x).detach())
    swin = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=32, window_size=2, embed_dim=8, depths=(1, 2), num_heads=(1, 2)
    )
    features = extract_layers(swin, [torch.randn(2, 3, 32, 32)], modality="image")
    assert {name: tuple(rows.shape) for name, rows in features.items()} == {
        "layers.0": (2, 8), "layers.1.blocks.0": (2, 16), "layers.1.blocks.1": (2, 16)
    }  # fmt: skip


class _Counted(Dataset[dict[str, Tensor]]):
    """Sample i says i, as image and as text; a random number is drawn for each, as augmentations do."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        torch.rand(1)
        return {"image": torch.full((2,), float(index)), "text": torch.tensor([index + 1, 0])}


class _Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        return iter(torch.arange(40.0).unsqueeze(1))


def test_choice_of_samples() -> None:
    """The same ones for both encoders and whatever the loader's order; another seed chooses others; generators stay."""
    image, text = nn.Sequential(nn.Identity()), _Embedding()
    text.table = nn.Embedding.from_pretrained(torch.arange(42.0).unsqueeze(1) - 1)
    state = torch.get_rng_state()
    loaders = [DataLoader(_Counted(), batch_size=size, shuffle=shuffle) for size, shuffle in ((7, True), (16, False))]
    rows = [
        extract_layers(image, loader, ["0"], modality="image", max_samples=12)["0"][:, 0].tolist() for loader in loaders
    ]
    words = extract_layers(text, loaders[0], ["table"], modality="text", max_samples=12, pad_id=0)["table"]
    assert rows[0] == rows[1] == words.flatten().tolist() == sorted(set(rows[0]))
    assert len(rows[0]) == 12
    other = extract_layers(image, loaders[0], ["0"], modality="image", max_samples=12, seed=1)["0"][:, 0].tolist()
    assert other != rows[0]
    everything = extract_layers(image, loaders[0], ["0"], modality="image")["0"]
    assert everything[:, 0].tolist() == list(range(40))
    assert torch.equal(torch.get_rng_state(), state)
    stream = extract_layers(image, DataLoader(_Stream(), batch_size=9), ["0"], modality="image", max_samples=12)["0"]
    assert stream.flatten().tolist() == list(range(12))


def test_modes_and_devices_stay() -> None:
    """Networks that are trained later are run in eval mode and put back; (inputs, labels) are inputs."""
    network = nn.Sequential(nn.Linear(4, 6), nn.Sequential(nn.BatchNorm1d(6), nn.Dropout(0.5)))
    network[1][0].eval()
    modes = [module.training for module in network.modules()]
    means = network[1][0].running_mean.clone()
    x = torch.randn(10, 4)
    loader = DataLoader(TensorDataset(x, torch.zeros(10)), batch_size=4)
    first, again = (extract_layers(network, loader, ["1"], modality="image")["1"] for _ in range(2))
    assert torch.equal(first, again)
    assert [module.training for module in network.modules()] == modes
    assert torch.equal(network[1][0].running_mean, means)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


def test_half_precision() -> None:
    tower = towers.create(vit(), frozen=True)
    expected = extract_layers(tower, [images()], modality="image")
    features = extract_layers(tower.to(torch.bfloat16), [images()], modality="image")
    for name, rows in features.items():
        assert rows.dtype == torch.float32
        torch.testing.assert_close(rows, expected[name], rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    ("name", "count", "first"),
    [
        ("timm/vit_tiny_patch16_224", 12, "blocks.0"),
        ("timm/resnet18", 8, "layer1.0"),
        ("timm/convnext_atto", 12, "stages.0.blocks.0"),
        ("torchvision/vit_b_16", 12, "encoder.layers.encoder_layer_0"),
        ("torchvision/efficientnet_b0", 18, "features.0"),
    ],
)
def test_block_names(name: str, count: int, first: str) -> None:
    with torch.device("meta"):
        names = block_names(towers.create(name).network)
    assert (len(names), names[0]) == (count, first)


def test_select_golden() -> None:
    """golden/structure.json of the project's notes, c8: the best pair is image layer 1 and text layer 0."""
    images, texts = ({f"{i}": layer for i, layer in enumerate(layers)} for layers in (IMAGE_LAYERS, TEXT_LAYERS))
    result = select_layers(images, texts)
    assert result.best == ("1", "0")
    assert result.score == pytest.approx(0.9666666666666668, abs=1e-6)
    assert (result.k, result.samples, result.metric) == (5, 12, "mutual_knn")
    assert torch.equal(result.scores, mutual_knn_table(IMAGE_LAYERS, TEXT_LAYERS))
    for metric in ("cka", "cka_unbiased"):
        result = select_layers(images, texts, metric=metric)  # type: ignore[arg-type]
        assert torch.equal(result.scores, cka_table(IMAGE_LAYERS, TEXT_LAYERS, unbiased=metric == "cka_unbiased"))
        assert result.k is None


def test_ties_go_to_the_first() -> None:
    rows = torch.randn(20, 4)
    layers = {"a": torch.randn(20, 4), "b": rows, "c": 2 * rows}
    for metric in ("mutual_knn", "cka"):
        result = select_layers(layers, {"x": torch.randn(20, 3), "y": rows, "z": -rows}, metric=metric)  # type: ignore[arg-type]
        assert result.best == ("b", "y")
    assert LayerScores(torch.tensor([[0.5, 0.5 + 1e-7]]), ("a",), ("x", "y"), "cka", None, 9).best == ("a", "x")


def test_draw(tmp_path: Path) -> None:
    """The same bytes each time; the picture has the right cells, and the best is framed."""
    scores = torch.zeros(2, 3)
    scores[1, 2] = 1
    table = LayerScores(scores, ("blocks.0", "$x$_1"), ("a", "b" * 50, "é:input"), "mutual_knn", 5, 12)
    path = tmp_path / "figures" / "layers.png"
    table.draw(path)
    first = path.read_bytes()
    table.draw(str(path))
    assert path.read_bytes() == first
    image = Image.open(path).convert("RGB")
    colours = {colour for _, colour in image.getcolors(maxcolors=10**6)}
    assert {(68, 1, 84), (253, 231, 36), (213, 94, 0)} <= colours  # both ends of viridis, and the frame
    names = tuple(f"blocks.{i}" for i in range(25))
    large = LayerScores(torch.rand(24, 25), names[:24], names, "cka", None, 9)
    large.draw(path)
    assert path.read_bytes() != first
    with pytest.raises(InputError, match=r"path must end in .png, got 'layers.pdf'"):
        table.draw("layers.pdf")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": ["blocks.9"]}, r"VisionTransformer has no module 'blocks.9'. Did you mean blocks"),
        ({"layers": []}, "layers must be a list of module names, at least one"),
        ({"layers": "blocks.0"}, "layers must be a list of module names, at least one, got 'blocks.0'"),
        ({"layers": ["blocks"], "pool": "last"}, "only texts have a last token"),
        ({"layers": ["patch_embed"], "pool": "cls"}, "'patch_embed' has no class token; give pool='mean'"),
        ({"layers": ["patch_embed.proj"], "pool": "cls"}, "gives maps, which have no tokens: pool must be 'mean'"),
        ({"layers": ["blocks.0"], "pool": "men"}, "pool must be one of cls, mean, last, or None, got 'men'. Did you mean"),
        ({"max_samples": 0}, "max_samples must be at least 1, got 0"),
        ({"modality": "pixels", "loader": [{"image": images(), "id": torch.arange(6)}]}, "key of the batch, id, image, got"),
        ({"loader": []}, "loader must give at least one sample, got none"),
        ({"loader": [["a"]]}, "loader must give tensors, or dicts or tuples of them, got str"),
    ],
)  # fmt: skip
def test_bad_extraction(options: dict[str, Any], message: str) -> None:
    options = {"loader": [images()], "modality": "image", **options}
    with pytest.raises(InputError, match=message):
        extract_layers(vit(), **options)


class _Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(4, 6), nn.Linear(4, 6)
        self.first = nn.Conv2d(1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        self.first(torch.ones(1, 1, 1, 1))
        return self.used(x)


def test_bad_networks() -> None:
    x = torch.randn(3, 4)
    with pytest.raises(InputError, match="'unused' was not called in the forward pass of _Unused; name other layers"):
        extract_layers(_Unused(), [x], ["unused"], modality="image")
    with pytest.raises(InputError, match="'first' gave 1 rows for 3 samples; name another layer"):
        extract_layers(_Unused(), [x], ["first"], modality="image")
    with pytest.raises(
        InputError, match="_Unused holds no blocks in lists or sequences: name its layers; it has used, unus"
    ):
        extract_layers(_Unused(), [x], modality="image")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "ckc"}, "metric must be one of mutual_knn, cka, cka_unbiased, got 'ckc'. Did you mean cka"),
        ({"metric": "cka", "k": 5}, "k must be left out for metric='cka', which has no neighbours, got 5"),
        ({"text_layers": {}}, "text_layers must be a list of features"),
        ({"text_layers": [torch.ones(9, 2)]}, "text_layers must be features by the name of the layer, got list"),
        ({"k": 9}, "k must be below the number of samples, got 9 for 9"),
    ],
)
def test_bad_selection(options: dict[str, Any], message: str) -> None:
    options = {"image_layers": {"a": torch.randn(9, 2)}, "text_layers": {"b": torch.randn(9, 3)}, **options}
    with pytest.raises(InputError, match=message):
        select_layers(**options)
