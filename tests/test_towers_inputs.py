"""Towers: names and options that cannot be used, and weights that cannot be fetched."""

from __future__ import annotations

import http.client
import os
import pickle
import urllib.error
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import httpx
from torch import nn

from zoo import towers
from zoo.errors import InputError

OFFLINE = [
    LocalEntryNotFoundError("no such file in the cache\nand more"),
    OfflineModeIsEnabled("cannot reach the Hub: offline mode is enabled"),
    httpx.ConnectError("name or service not known"),
    urllib.error.URLError("name or service not known"),
    http.client.IncompleteRead(b""),
    ConnectionResetError(),
]


@pytest.mark.parametrize("error", OFFLINE, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("name", ["timm/resnet18.a1_in1k", "torchvision/resnet18/IMAGENET1K_V1"])
def test_bad_offline(monkeypatch: pytest.MonkeyPatch, name: str, error: Exception) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(timm, "create_model", fail)
    monkeypatch.setattr(torchvision.models, "get_model", fail)
    message = rf"weights of '{name}' could not be fetched \({type(error).__name__}: .*\)\. Connect to the network once"
    with pytest.raises(InputError, match=message) as caught:
        towers.create(name)
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is error


def test_bad_offline_for_real() -> None:
    """The test run is offline (conftest.py): the real client says so, and the message passes it on."""
    with pytest.raises(InputError, match=r"weights of 'timm/hf-hub:me/nothing' could not be fetched"):
        towers.create("timm/hf-hub:me/nothing")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tim/resnet18", r"no tower named 'tim/resnet18'.*Did you mean timm"),
        ("torchvison/resnet18", r"Did you mean torchvision"),
        (
            "resnet18",
            r"no tower named 'resnet18': a name begins with timm/, torchvision/, zoo/, open_clip/ or is the path",
        ),
        ("timm/", r"no tower named 'timm/'"),
        ("", r"no tower named ''"),
        ("timm/resnet81", r"timm has no architecture 'resnet81'. Did you mean .*resnet18"),
        ("timm/resnet18.a1_in1", r"timm has no weights 'a1_in1' for 'resnet18'. Did you mean a1_in1k"),
        ("timm/resnet18.", r"timm has no weights '' for 'resnet18'"),
        ("timm/resnet*", r"timm has no architecture 'resnet\*'"),
        ("timm/local-dir:/tmp", r"timm has no architecture 'local-dir:/tmp'"),
        ("timm/hf-hub:", r"'timm/hf-hub:' cannot be built.*no model id"),
        ("timm/hf-hub:not a name", r"'timm/hf-hub:not a name' cannot be built.*Repo id"),
        ("torchvision/resnet81", r"torchvision has no classifier 'resnet81'. Did you mean .*resnet18"),
        ("torchvision/fasterrcnn_resnet50_fpn", r"torchvision has no classifier 'fasterrcnn_resnet50_fpn'"),
        ("torchvision/resnet18/IMAGENET1K", r"no weights 'IMAGENET1K' for 'resnet18'. Did you mean IMAGENET1K_V1"),
        ("torchvision/resnet18/", r"torchvision has no weights '' for 'resnet18'"),
        ("zoo/resnet9", r"the zoo has no architecture 'resnet9'. Did you mean .*resnet8"),
        ("zoo/resnet8@main", r"the zoo has no architecture 'resnet8@main'"),
    ],
)
def test_bad_name(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        towers.create(name)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("timm/resnet10t", {"in_chan": 1}, r"'timm/resnet10t' takes no option 'in_chan'. Did you mean in_chans"),
        ("torchvision/resnet18", {"norm": 1}, r"takes no option 'norm'. Did you mean norm_layer"),
        ("zoo/resnet8", {"in_chan": 1}, r"'zoo/resnet8' takes no option 'in_chan'. Did you mean in_chans"),
        ("zoo/resnet8", {"depth": 9}, r"'zoo/resnet8' cannot be built with the options {'depth': 9}"),
        ("zoo/resnet8", {"in_chans": "x"}, r"cannot be built with the options {'in_chans': 'x'}: TypeError"),
        ("zoo/resnet8", {"in_chans": 0}, r"in_chans must be positive, got 10 and 0"),
        ("timm/resnet10t", {"act_layer": "nope"}, r"options {'act_layer': 'nope'}: KeyError: 'nope'"),
        ("timm/resnet10t", {"in_chans": -1}, r"options {'in_chans': -1}: RuntimeError"),
        ("timm/resnet10t", {"global_pool": "no"}, r"AssertionError: Invalid pool type: no"),
        ("timm/resnet10t", {"layers": [1]}, r"ZeroDivisionError"),
        ("timm/resnet10t", {"block": "x"}, r"AttributeError"),
        ("torchvision/resnet18", {"groups": 2}, r"ValueError: BasicBlock only supports groups=1"),
        ("timm/vit_tiny_patch16_224", {"depth": 10**9}, r"'depth' of .* must be at most 1048576, got 1000000000"),
        ("timm/resnet10t", {"layers": [1, 2**21]}, r"option 'layers' of 'timm/resnet10t' must be at most 1048576"),
        ("timm/resnet10t", {"block_args": {"a": {"b": [2**21]}}}, r"option 'block_args.a.b' of"),
    ],
)
def test_bad_option(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        towers.create(name, **options)


@pytest.mark.parametrize(
    "option",
    [
        "checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_model_args", "cache_dir",
        "device", "dtype", "features_only", "weights", "weights_backbone", "progress", "scriptable",
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["timm/resnet10t", "torchvision/resnet18", "zoo/resnet8"])
def test_bad_option_that_chooses_files_or_devices(name: str, option: str) -> None:
    with pytest.raises(InputError, match=f"option '{option}' is refused for '{name}'"):
        towers.create(name, **{option: "x"})


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_bad_option_loads_no_pickle(tmp_path: Path) -> None:
    """timm's checkpoint_path unpickles what it is given: no stored configuration may reach it."""
    (tmp_path / "bomb.pth").write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    with pytest.raises(InputError, match="'checkpoint_path' is refused"):
        towers.create("timm/resnet10t", checkpoint_path=str(tmp_path / "bomb.pth"))
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("before", [{}, {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}])
def test_bad_weights_that_are_a_pickle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: dict[str, str]) -> None:
    """timm 1.0.20 loads ``pytorch_model.bin`` of any Hub repository with weights_only=False."""
    for name, value in before.items():
        monkeypatch.setenv(name, value)
    torch.save({"a": Bomb(tmp_path / "exploded")}, tmp_path / "pytorch_model.bin")

    def create_model(*args: Any, **options: Any) -> Any:
        return torch.load(tmp_path / "pytorch_model.bin", weights_only=False)

    monkeypatch.setattr(timm, "create_model", create_model)
    with pytest.raises(InputError, match=r"weights of 'timm/hf-hub:evil/model' are refused: a pickle that holds more"):
        towers.create("timm/hf-hub:evil/model", frozen=True)
    assert not (tmp_path / "exploded").exists()
    names = ("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")
    assert {name: os.environ[name] for name in names if name in os.environ} == before


def test_bad_arguments() -> None:
    network = nn.Sequential(nn.Linear(4, 3))
    with pytest.raises(
        InputError, match=r"options \['in_chans'\] cannot be applied to a network that is built already"
    ):
        towers.create(network, in_chans=1)
    with pytest.raises(InputError, match=r"Sequential has a classifier of 3 classes, expected 10: replace its head"):
        towers.create(network, num_classes=10)
    with pytest.raises(InputError, match=r"a tower is a name or an nn\.Module, got PosixPath"):
        towers.create(Path("zoo/resnet8"))  # type: ignore[arg-type]
    for wrong in (0, -3):
        with pytest.raises(InputError, match=f"num_classes must be positive, got {wrong}"):
            towers.create("zoo/resnet8", num_classes=wrong)


def test_bad_nothing_is_left_behind_by_a_failed_build() -> None:
    """The weights are looked for again, in the mode that was set, after a build that failed."""
    with pytest.raises(InputError), towers.without_weights("all"):
        towers.create("zoo/resnet9")
    with torch.device("meta"), pytest.raises(InputError):
        towers.create("zoo/resnet8", in_chan=1)
    assert not next(towers.create("zoo/resnet8").parameters()).is_meta
