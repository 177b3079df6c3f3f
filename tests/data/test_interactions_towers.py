"""Features that towers compute from images and texts, and their cache."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from tests.data.interaction_files import write_mmrec
from zoo import towers
from zoo.data import MultimodalInteractionsDataModule
from zoo.data.item_towers import TowerFeatures
from zoo.errors import InputError

TOWER = "timm/test_vit"
TEXTS = ["a red shirt", "a blue hat, wool", None, "shoes"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_mmrec(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 255, (4, 20, 20, 3), dtype=np.uint8)
    lines = ["item_id,image,text"]
    for number, (image, text) in enumerate(zip(pixels, TEXTS, strict=True)):
        Image.fromarray(image).save(tmp_path / f"{number}.png")
        lines.append(f'{number},{number}.png,"{text or ""}"')
    (tmp_path / "items.csv").write_text("\n".join(lines) + "\n")
    return tmp_path


@pytest.fixture
def tiny_clip(tmp_path: Path) -> Iterator[str]:
    side = {"width": 32, "heads": 2, "layers": 1}
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 32, "head_width": 16, "layers": 1},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, **side},
    }
    path = tmp_path / "zoo-tiny-clip.json"
    path.write_text(json.dumps(config))
    open_clip.add_model_config(path)
    yield "open_clip/zoo-tiny-clip"
    open_clip.factory._MODEL_CONFIGS.pop("zoo-tiny-clip")


def source(folder: Path, **options: object) -> TowerFeatures:
    options = {"name": "image", "column": "image", "id_column": "item_id", "tower": TOWER, **options}
    return TowerFeatures(table=str(folder / "items.csv"), **options)  # type: ignore[arg-type]


def test_images_and_texts(folder, tiny_clip, monkeypatch):
    options = {
        "feature_files": dict.fromkeys(("text", "image"), str(folder / "items.csv")),
        "image_towers": {"image": TOWER},
        "text_towers": {"text": tiny_clip},
        "feature_cache": str(folder / "cache"),
        "progress": False,
    }
    before = torch.get_rng_state()
    data = MultimodalInteractionsDataModule(str(folder), **options)
    data.prepare_data()
    assert torch.equal(before, torch.get_rng_state())
    assert len(list((folder / "cache").iterdir())) == 2
    with monkeypatch.context() as patch:
        patch.setattr(towers, "create", lambda *args, **kwargs: pytest.fail("the cache was not used"))
        assert list(data.features) == ["text", "image"]
    assert data.present["text"].tolist() == [True, True, False, True]
    assert data.present["image"].all()
    assert list(data.sha256) == ["toy.inter", "items.csv"]
    for name, side, inputs in (("image", None, range(4)), ("text", "text", [0, 1, 3])):
        torch.manual_seed(0)
        tower = towers.create(options[f"{name}_towers"][name], frozen=True, embedding=True, modality=side)
        for row in inputs:
            one = (
                tower.tokenizer([TEXTS[row]])
                if side
                else tower.transform(Image.open(folder / f"{row}.png").convert("RGB"))[None]
            )
            torch.testing.assert_close(data.features[name][row], tower.features(one)[0], rtol=1e-4, atol=1e-5)


def test_cache_is_another_for_other_contents(folder):
    def key(**options: object) -> str:
        each = source(folder, **options)
        return each._key(each._read()[1])

    first = key()
    assert key() == first == key(batch_size=2, cache="elsewhere")
    assert len({first, key(tower="timm/test_resnet"), key(modality="text"), key(column="text", modality="text")}) == 4
    os.utime(folder / "1.png", (0, 0))
    second = key()
    with (folder / "items.csv").open("a") as file:
        file.write("9,1.png,x\n")
    assert len({first, second, key()}) == 3


def test_bad_towers(folder):
    table = folder / "items.csv"
    whole = table.read_text()
    with pytest.raises(InputError, match=r"has no column 'imag'. Did you mean image\? It has: item_id, image, text"):
        source(folder, column="imag").source(progress=False)
    with pytest.raises(InputError, match="reads no text: it has no context_length"):
        source(folder, column="text", modality="text").source(progress=False)
    table.write_text(whole.replace("1.png", "7.png"))
    with pytest.raises(InputError, match=r"image: the image '.*7.png' cannot be read: No such file"):
        source(folder).source(progress=False)
    table.write_text(whole.replace("1.png", "items.csv"))
    with pytest.raises(InputError, match=r"items.csv.*"):
        source(folder).source(progress=False)
    table.write_text(whole.replace("1.png", "../1.png"))
    with pytest.raises(InputError, match="names must stay below root"):
        source(folder).source(progress=False)
    table.write_text(whole + "1,2.png,x\n")
    with pytest.raises(InputError, match=r"items.csv has an item twice"):
        source(folder).source(progress=False)
    table.write_text("item_id,image\n")
    with pytest.raises(InputError, match="has no row with both 'item_id' and 'image'"):
        source(folder).source(progress=False)
    with pytest.raises(InputError, match=r"a tower reads a .csv, .tsv or .parquet table, got .*png"):
        source(folder)._replace(table=str(folder / "1.png")).source(progress=False)
    table.write_text(whole)
    (folder / "file").write_text("")
    with pytest.raises(InputError, match=r"the features of image cannot be kept in .*; set cache"):
        source(folder, cache=str(folder / "file" / "below")).source(progress=False)
