"""The images and the classifiers of `normgrad_table.py`: CIFAR-10, and digits on canvases whose places are known."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from nd_table_data import Batches, Images, load
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.functional.classification import multilabel_average_precision

from zoo import towers
from zoo.data import DigitsDataModule

NETWORK = "zoo/resnet8"
LAYERS = ("layer1", "layer2", "layer3")
CLASSES = 10
SIDE = 48
DIGITS = (2, 4)  # on a canvas, at least and at most
SIZES = (10, 12, 14, 16)  # of a digit's square, in pixels; the originals have 8
NOISE = 0.1
INK = 0.15  # what is darker is no part of a digit's box
TEST_SEED = 1_000_003  # the test canvases are the same for all seeds
PEAK_LR = 5e-3

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Canvases:
    """Composed images.

    Attributes:
        images: (N, 1, 48, 48), float32, in [0, 1] before the noise.
        labels: (N, 10), 1 where the digit is on the canvas.
        boxes: (N, 10, 4), x0, y0, x1, y1 of each digit's ink, both ends inside; 0 where the digit is not there.
    """

    images: Tensor
    labels: Tensor
    boxes: Tensor


@cache
def _resized(split: str) -> tuple[dict[int, Tensor], Tensor]:
    """Return the digits of a split in every size, and their classes."""
    data = DigitsDataModule(val_share=0.0)
    part = getattr(data.splits, split)
    plain = part.images[part.indices]
    sizes = {size: F.interpolate(plain, (size, size), mode="bilinear").squeeze(1) for size in SIZES}
    return sizes, part.labels[part.indices]


def compose(count: int, split: str, seed: int) -> Canvases:
    """Put 2 to 4 digits of different classes, none over another, on each of so many canvases, and noise over all.

    Digits of the training split and of the test split never mix.
    """
    sizes, classes = _resized(split)
    rows_of = [torch.nonzero(classes == digit).flatten() for digit in range(CLASSES)]
    draw = torch.Generator().manual_seed(seed)

    def below(limit: int) -> int:
        return int(torch.randint(limit, (), generator=draw))

    images = torch.zeros(count, 1, SIDE, SIDE)
    labels = torch.zeros(count, CLASSES)
    boxes = torch.zeros(count, CLASSES, 4, dtype=torch.int64)
    for row in range(count):
        taken = torch.zeros(SIDE, SIDE, dtype=torch.bool)
        number = DIGITS[0] + below(DIGITS[1] - DIGITS[0] + 1)
        for digit in torch.randperm(CLASSES, generator=draw)[:number].tolist():
            size = SIZES[below(len(SIZES))]
            while True:  # ends: three squares cannot block all four corners of a canvas three squares wide
                y, x = below(SIDE - size + 1), below(SIDE - size + 1)
                if not bool(taken[y : y + size, x : x + size].any()):
                    break
            glyph = sizes[size][rows_of[digit][below(len(rows_of[digit]))]]
            taken[y : y + size, x : x + size] = True
            images[row, 0, y : y + size, x : x + size] = glyph
            lines, columns = (torch.nonzero((glyph > INK).any(axis)).flatten() for axis in (1, 0))
            labels[row, digit] = 1
            boxes[row, digit] = torch.stack((x + columns[0], y + lines[0], x + columns[-1], y + lines[-1]))
    return Canvases(images + NOISE * torch.randn(images.shape, generator=draw), labels, boxes)


def cifar(options: Any) -> Images:
    """Return stratified subsets of CIFAR-10."""
    return load("cifar10", options.path, options.cifar_samples, options.test_samples, device="cpu")


def network(channels: int) -> nn.Module:
    return towers.create(NETWORK, num_classes=CLASSES, in_chans=channels).network


def train(
    model: nn.Module, epoch: Callable[[], Iterable[Batch]], steps: int, loss: Callable[[Tensor, Tensor], Tensor]
) -> float:
    """Train with AdamW and one cycle of the learning rate; return the processor seconds."""
    start = time.process_time()
    model.to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LR, total_steps=steps)
    done = 0
    while done < steps:
        for images, labels in epoch():
            optimizer.zero_grad()
            value = loss(model(images.contiguous(memory_format=torch.channels_last)), labels)
            value.backward()
            optimizer.step()
            schedule.step()
            done += 1
            if done % 100 == 0:
                print(f"step {done} of {steps}, loss {value.item():.3f}", flush=True)
            if done == steps:
                break
    model.eval().requires_grad_(requires_grad=False)
    return time.process_time() - start


def train_cifar(options: Any, seed: int) -> tuple[nn.Module, dict[str, float]]:
    """Train a classifier of CIFAR-10; return it and its accuracy on the test subset."""
    torch.manual_seed(seed)
    data = cifar(options)
    model = network(3)
    batches = Batches(data, "train", options.batch, training=True, seed=seed)
    spent = train(model, lambda: batches, options.cifar_epochs * len(batches), F.cross_entropy)
    right = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in Batches(data, "test", 250))
    return model, {"accuracy": 100 * right / len(data.labels["test"]), "cpu_seconds": round(spent, 1)}


def train_canvases(options: Any, seed: int) -> tuple[nn.Module, dict[str, float]]:
    """Train a multi-label classifier of canvases; return it and its mean average precision on the test canvases."""
    torch.manual_seed(seed)
    model = network(1)
    data = compose(options.canvases, "train", seed)
    draw = torch.Generator().manual_seed(seed)

    def epoch() -> Iterator[Batch]:
        for rows in torch.randperm(options.canvases, generator=draw).split(options.batch):
            if len(rows) == options.batch:
                yield data.images[rows], data.labels[rows]

    steps = options.canvas_epochs * (options.canvases // options.batch)
    spent = train(model, epoch, steps, F.binary_cross_entropy_with_logits)
    test = compose(options.test_canvases, "test", TEST_SEED)
    logits = torch.cat([model(images) for images in test.images.split(100)])
    precision = multilabel_average_precision(logits, test.labels.long(), num_labels=CLASSES)
    right = ((logits > 0) == (test.labels > 0)).all(1).double().mean()
    return model, {
        "average_precision": 100 * float(precision), "all_ten_right": 100 * float(right), "cpu_seconds": round(spent, 1),
    }  # fmt: skip


def trained(kind: str, options: Any, seed: int) -> nn.Module:
    """Return a classifier: the one in ``--out`` if it was trained before."""
    channels = {"cifar": 3, "canvases": 1}[kind]
    file = Path(options.out, f"{kind}-{seed}.pt")
    if not file.exists():
        model, facts = {"cifar": train_cifar, "canvases": train_canvases}[kind](options, seed)
        print(kind, seed, facts, flush=True)
        torch.save({"weights": model.state_dict(), "facts": facts}, file.with_suffix(".tmp"))
        file.with_suffix(".tmp").replace(file)
    model = network(channels)
    model.load_state_dict(torch.load(file, weights_only=True)["weights"])
    return model.eval().requires_grad_(requires_grad=False)


def untrained(kind: str, seed: int) -> nn.Module:
    """Return the classifier before training, but for the statistics of its batch norms, which stay at 0 and 1."""
    torch.manual_seed(seed)
    return network({"cifar": 3, "canvases": 1}[kind]).eval().requires_grad_(requires_grad=False)
