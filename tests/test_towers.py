"""Towers: the names of each family, what a frozen one keeps, fingerprints, layers, transforms."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

import zoo
from zoo import towers
from zoo.errors import InputError


def resnet8(**options: Any) -> towers.Tower:
    return towers.create("zoo/resnet8", in_chans=1, **options)


@pytest.fixture
def timm_calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What timm is asked for; a small network comes back whatever the name."""
    calls: list[dict[str, Any]] = []

    def create_model(name: str, **options: Any) -> nn.Module:
        calls.append({"name": name, **options})
        return nn.Sequential(nn.Flatten(), nn.Linear(4, options.get("num_classes", 1000)))

    monkeypatch.setattr(timm, "create_model", create_model)
    return calls


@pytest.fixture
def torchvision_calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The weights torchvision is asked for; the architecture comes back with random ones."""
    calls: list[Any] = []
    real = torchvision.models.get_model

    def get_model(name: str, *, weights: Any, **options: Any) -> nn.Module:
        calls.append(weights)
        return real(name, weights=None, **options)

    monkeypatch.setattr(torchvision.models, "get_model", get_model)
    return calls


# -- names ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dim"),
    [("timm/resnet10t", 512), ("torchvision/resnet18", 512), ("zoo/resnet8", 64), ("zoo/resnet8x4", 256)],
)
def test_bare_architectures_have_random_weights(name: str, dim: int) -> None:
    first, second = towers.create(name, num_classes=7), towers.create(name, num_classes=7)
    assert (first.dim, first.num_classes, first.name) == (dim, 7, name)
    assert first.training
    assert not towers.has_weights(name)
    assert first.network.state_dict().keys() == second.network.state_dict().keys()
    assert towers.fingerprint(first.network) != towers.fingerprint(second.network)


@pytest.mark.parametrize(
    ("name", "asked", "pretrained"),
    [
        ("timm/resnet18", "resnet18", False),
        ("timm/resnet18.a1_in1k", "resnet18.a1_in1k", True),
        ("timm/vit_base_patch16_224.augreg_in21k", "vit_base_patch16_224.augreg_in21k", True),
        ("timm/hf-hub:org/name@v1.0", "hf-hub:org/name@v1.0", True),
    ],
)
def test_timm_names(timm_calls: list[dict[str, Any]], name: str, asked: str, pretrained: bool) -> None:
    tower = towers.create(name, num_classes=3, drop_rate=0.1)
    assert timm_calls == [{"name": asked, "pretrained": pretrained, "num_classes": 3, "drop_rate": 0.1}]
    assert tower.revision == ("v1.0" if "@" in name else None)
    assert towers.has_weights(name) == pretrained


@pytest.mark.parametrize("tag", ["", "/IMAGENET1K_V1"])
def test_torchvision_names(torchvision_calls: list[Any], tag: str) -> None:
    name = f"torchvision/resnet18{tag}"
    tower = towers.create(name, num_classes=3)
    expected = torchvision.models.ResNet18_Weights.IMAGENET1K_V1 if tag else None
    assert torchvision_calls == [expected]
    assert tower.num_classes == 3
    assert towers.has_weights(name) == bool(tag)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "squeezenet1_1"])
def test_torchvision_weights_with_another_number_of_classes(torchvision_calls: list[Any], name: str) -> None:
    """The last layer is exchanged, linear or convolutional, and the architecture is the one without weights."""
    tower = towers.create(f"torchvision/{name}/IMAGENET1K_V1", num_classes=3).eval()
    bare = towers.create(f"torchvision/{name}", num_classes=3)
    assert tower(torch.randn(2, 3, 64, 64)).shape == (2, 3)
    assert {k: v.shape for k, v in tower.network.state_dict().items()} == {
        k: v.shape for k, v in bare.network.state_dict().items()
    }


def test_without_weights(timm_calls: list[dict[str, Any]], torchvision_calls: list[Any]) -> None:
    """Trained towers are filled from a file; frozen ones need their weights, except where shapes alone are asked for."""
    for scope, frozen, expected in (("trained", False, False), ("trained", True, True), ("all", True, False)):
        with towers.without_weights(scope):
            towers.create("timm/resnet18.a1_in1k", frozen=frozen)
            towers.create("torchvision/resnet18/IMAGENET1K_V1", frozen=frozen)
        assert timm_calls.pop()["pretrained"] == expected
        assert (torchvision_calls.pop() is not None) == expected
    towers.create("timm/resnet18.a1_in1k")
    assert timm_calls.pop()["pretrained"]


def test_torchvision_changes_that_come_with_weights_are_kept_without_them() -> None:
    with towers.without_weights("all"), torch.device("meta"):
        network = towers.create("torchvision/googlenet/IMAGENET1K_V1", num_classes=3).network
    assert network.transform_input
    assert network.aux1 is None


def test_every_torchvision_family_can_be_looked_at_without_memory() -> None:
    """RegNet reads tensors while it is built; stored models are compared on the meta device, so it must work there."""
    for name in ("regnet_x_400mf", "mnasnet0_5", "swin_t", "vit_b_16", "convnext_tiny", "shufflenet_v2_x0_5"):
        with torch.device("meta"):
            network = towers.create(f"torchvision/{name}", num_classes=3).network
        assert all(parameter.is_meta for parameter in network.parameters()), name


def test_module_and_tower_as_they_are() -> None:
    network = resnet8(num_classes=5).network
    tower = towers.create(network, num_classes=5)
    assert tower.network is network
    assert tower.name is None
    assert towers.create(tower, frozen=True).network is network
    assert not towers.has_weights(network)


def test_stored_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.Classifier("zoo/resnet8", 4, student_options={"in_chans": 1})
    model.save_pretrained(tmp_path / "kept")
    monkeypatch.chdir(tmp_path)
    for name in ("./kept", str(tmp_path / "kept")):
        tower = towers.create(name, frozen=True, num_classes=4)
        assert towers.has_weights(name)
        assert tower.fingerprint == towers.fingerprint(model.student)
    with pytest.raises(InputError, match=r"the stored model './kept' has 4 classes, expected 5"):
        towers.create("./kept", num_classes=5)
    with pytest.raises(InputError, match=r"options \['in_chans'\] cannot be applied to the stored model './kept'"):
        towers.create("./kept", in_chans=1)
    with pytest.raises(InputError, match=r"\./gone is no folder with a stored model"):
        towers.create("./gone")


# -- frozen --------------------------------------------------------------------------------------------------------


def test_frozen_is_in_eval_mode_without_gradients() -> None:
    tower = resnet8(frozen=True)
    for mode in (True, False, True):
        tower.train(mode)
        assert not any(module.training for module in tower.network.modules())
    nn.ModuleList([tower]).train()
    assert not tower.network.training
    assert not any(parameter.requires_grad for parameter in tower.parameters())
    before = tower.network.bn1.running_mean.clone()
    tower(torch.randn(4, 1, 8, 8))
    assert torch.equal(tower.network.bn1.running_mean, before)


def test_frozen_lets_the_gradient_through_to_its_input() -> None:
    tower = resnet8(frozen=True)
    x = torch.randn(2, 1, 8, 8, requires_grad=True)
    tower.features(x).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().max() > 0
    assert not tower.features(x.detach()).requires_grad


def test_half_precision_frozen_takes_the_batch_of_the_student() -> None:
    tower = resnet8(frozen=True).to(torch.bfloat16)
    features, logits = tower.features_and_logits(torch.randn(2, 1, 8, 8))
    assert features.dtype == logits.dtype == torch.bfloat16
    assert tower.layers(torch.randn(2, 1, 8, 8), ["layer1"])["layer1"].dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert resnet8(frozen=True)(torch.randn(2, 1, 8, 8)).dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match=r"dtype|type"):  # a trained network casts nothing behind the user's back
        resnet8().to(torch.bfloat16)(torch.randn(2, 1, 8, 8))


# -- fingerprints --------------------------------------------------------------------------------------------------


def by_hand(state: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name]
        digest.update(name.encode() + b"\0" + str(value.dtype).encode() + b"\0")
        digest.update(repr(tuple(value.shape)).encode() + b"\0")
        raw = value.contiguous().view(torch.int16) if value.dtype == torch.bfloat16 else value.contiguous()
        digest.update(np.asarray(raw).tobytes())
    return digest.hexdigest()


def test_golden_fingerprint() -> None:
    state = {
        "b": torch.tensor([[1.0, 2.0, 3.0]]),
        "a": torch.tensor(7),
        "c": torch.arange(4, dtype=torch.bfloat16),
        "d": torch.zeros(0, 3),
        "e": torch.tensor([True, False]),
    }
    assert towers.fingerprint(state) == by_hand(state)
    network = resnet8().network
    assert towers.fingerprint(network) == by_hand(network.state_dict())


def test_fingerprint_is_of_weights_and_nothing_else() -> None:
    network = resnet8().network
    twin = resnet8().network
    twin.load_state_dict(network.state_dict())
    twin.conv1.weight.data = twin.conv1.weight.data.to(memory_format=torch.channels_last)
    assert towers.fingerprint(network) == towers.fingerprint(twin.eval().requires_grad_(False))
    state = {"w": torch.arange(6.0), "n": torch.tensor(1)}
    reference = towers.fingerprint(state)
    assert towers.fingerprint({"n": state["n"], "w": state["w"].clone()}) == reference
    changed = [
        {**state, "w": torch.tensor([0.0, 1, 2, 3, 4, np.nextafter(np.float32(5), np.float32(6))])},
        {**state, "w": torch.arange(6.0).view(2, 3)},
        {**state, "w": torch.arange(6.0).double()},
        {"v": state["w"], "n": state["n"]},
        {"w": state["w"]},
    ]
    assert len({reference, *(towers.fingerprint(other) for other in changed)}) == len(changed) + 1


def test_fingerprint_of_a_tower_outlives_a_cast() -> None:
    """A run in bf16 casts its teacher before anything asks for the fingerprint."""
    tower = resnet8(frozen=True)
    expected = towers.fingerprint(tower.network)
    tower.to(torch.bfloat16)
    assert tower.fingerprint == expected
    assert towers.fingerprint(tower.network) != expected


# -- layers and transforms -----------------------------------------------------------------------------------------


def test_layers() -> None:
    tower = resnet8().eval()
    x = torch.randn(2, 1, 8, 8)
    outputs = tower.layers(x, ["layer1", "layer2.0", "fc"])
    stem = tower.network.bn1(tower.network.conv1(x)).relu()
    first = tower.network.layer1(stem)
    torch.testing.assert_close(outputs["layer1"], first)
    torch.testing.assert_close(outputs["layer2.0"], tower.network.layer2[0](first))
    torch.testing.assert_close(outputs["fc"], tower(x))
    assert not any(module._forward_hooks for module in tower.network.modules())
    with pytest.raises(RuntimeError):
        tower.layers(torch.randn(2, 3, 8, 8), ["layer1"])
    assert not any(module._forward_hooks for module in tower.network.modules())
    with pytest.raises(InputError, match=r"no module 'layer9'. Did you mean layer"):
        tower.layers(x, ["layer9"])
    tower.network.spare = nn.Linear(1, 1)
    with pytest.raises(InputError, match=r"'spare' was not called in the forward pass of CifarResNet"):
        tower.layers(x, ["fc", "spare"])


def test_transform() -> None:
    image = torchvision.transforms.functional.to_pil_image(torch.full((3, 300, 200), 0.5))
    from_timm = towers.create("timm/resnet10t").transform(image)
    config = timm.data.resolve_model_data_config(timm.create_model("resnet10t"))
    assert from_timm.shape == config["input_size"]
    level = torch.tensor(127 / 255)  # 0.5 as an 8-bit image
    normalised = (level - torch.tensor(config["mean"])) / torch.tensor(config["std"])
    torch.testing.assert_close(from_timm.mean((1, 2)), normalised, rtol=0, atol=1e-5)
    with towers.without_weights("all"):
        tower = towers.create("torchvision/resnet18/IMAGENET1K_V1")
    assert tower.transform(image).shape == (3, 224, 224)
    for silent in ("torchvision/resnet18", "zoo/resnet8"):
        with pytest.raises(InputError, match=f"nothing records how the inputs of {silent} are prepared"):
            _ = towers.create(silent).transform


def test_head_option() -> None:
    network = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2), nn.Linear(2, 2))
    tower = towers.create(network, head="1")
    x = torch.randn(5, 4)
    assert torch.equal(tower.features(x), network[0](x))
    assert (tower.dim, tower.num_classes) == (3, 2)
    with pytest.raises(InputError, match=r"Sequential has no module '7'"):
        towers.create(network, head="7")
