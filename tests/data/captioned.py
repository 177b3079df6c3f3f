"""Small images with captions, as tables and as shards, and what tests compare of their batches."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

IMAGES, EACH = 12, 3
SMALL: dict[str, Any] = {"image_size": 8, "context_length": 8, "batch_size": 5}


def encoded(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven"]


def caption(number: int, which: int) -> str:
    return f"{'abc'[which]} view of {NAMES[number]}"


def write_table(folder: Path) -> str:
    lines = ["image,caption,kind"]
    for which in range(EACH):
        lines += [f'{number}.png,"{caption(number, which)}",{number % 3}' for number in range(IMAGES)]
    for number in range(IMAGES):
        (folder / f"{number}.png").write_bytes(encoded(number))
    (folder / "train.csv").write_text("\n".join(lines))
    return str(folder / "train.csv")


def write_lists(folder: Path, *, nested: bool = False) -> str:
    images: list[Any] = [encoded(number) for number in range(IMAGES)]
    table = {
        "image": [{"bytes": image, "path": None} for image in images] if nested else images,
        "caption": [[caption(number, which) for which in range(EACH)] for number in range(IMAGES)],
        "kind": [number % 3 for number in range(IMAGES)],
    }
    pq.write_table(pa.table(table), folder / "train.parquet", row_group_size=5)
    return str(folder / "train.parquet")


def write_shards(folder: Path, *, shards: int = 4) -> str:
    for shard in range(shards):
        members = {}
        for number in range(shard * IMAGES // shards, (shard + 1) * IMAGES // shards):
            members[f"{number:04}.png"] = encoded(number)
            texts = [caption(number, which) for which in range(EACH)]
            members[f"{number:04}.json"] = json.dumps({"caption": texts, "kind": number % 3}).encode()
        pack(folder / f"s-{shard}.tar", members)
    return f"{folder}/s-{{0..{shards - 1}}}.tar"


def png(value: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 6), (value, 0, 0)).save(file, "PNG")
    return file.getvalue()


def pack(path: Path, members: dict[str, bytes], **options: Any) -> str:
    with tarfile.open(path, "w", **options) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return str(path)


def whole(loader: Any) -> dict[str, torch.Tensor]:
    batches = list(loader)
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def same(first: Any, second: Any) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def tokens(texts: list[str]) -> torch.Tensor:
    return open_clip.get_tokenizer("ViT-B-32")(texts, 8)
