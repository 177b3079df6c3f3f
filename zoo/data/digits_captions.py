"""The handwritten digits with captions, for image-text training that needs no download.

Each class has two disjoint sets of captions. The *seen* wordings are for training. The *unseen* ones have other templates,
and other words wherever a template leaves a choice, so that a text tower that has learned sentences by heart fails on
them. Only the digit itself ("three" or "3") and words such as *a* or *the* are common to both: a tower that starts from
nothing cannot know what a word means that it never met.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from string import Formatter
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from zoo.data.digits import DigitsDataModule
from zoo.data.draws import random_words
from zoo.data.loading import Splits, epoch_of
from zoo.data.tensors import ImageTensors
from zoo.data.text import OpenClipTokens, PairBatch
from zoo.errors import InputError, require_choice

__all__ = ["CaptionedDigits", "DigitsCaptionsDataModule", "Wordings"]

_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_ROOM = 64  # tokens, more than any caption has
_CAPTIONS = 2  # the stream of random numbers that chooses captions; the augmentation has its own


@dataclass(frozen=True)
class _Grammar:
    templates: tuple[str, ...]
    choices: Mapping[str, tuple[str, ...]]

    def fill(self, digit: int) -> Iterator[list[str]]:
        """Return the captions of each template, every choice with every other."""
        names = (_NAMES[digit], str(digit))
        article = "an" if digit == 8 else "a"
        choices = {**self.choices, "digit": names, "a_digit": tuple(f"{article} {name}" for name in names)}
        for template in self.templates:
            slots = [slot for _, slot, _, _ in Formatter().parse(template) if slot]
            fillings = product(*(choices[slot] for slot in slots))
            yield [template.format(**dict(zip(slots, filling, strict=True))) for filling in fillings]


_GRAMMARS = {
    "seen": _Grammar(
        (
            "{medium} of the {noun} {digit}",
            "{medium} of {a_digit}",
            "a {style} {digit}",
            "a {style} {noun}, {digit}",
            "the {noun} {digit}, {manner}",
            "{digit}, {manner}",
            "this {noun} is {a_digit}",
            "{a_digit}",
        ),
        {
            "medium": ("a photo", "a picture", "an image", "a drawing"),
            "noun": ("digit", "number", "numeral"),
            "style": ("handwritten", "hand-drawn", "scribbled"),
            "manner": ("written by hand", "drawn with a pen", "in handwriting"),
        },
    ),
    "unseen": _Grammar(
        (
            "somebody {verb} {a_digit} {place}",
            "{view} shows {a_digit}",
            "{view} contains the {sign} {digit}",
            "what you can read here is {digit}",
            "the {sign} you see means {digit}",
            "it looks like {a_digit}",
        ),
        {
            "verb": ("jotted down", "penned", "scrawled"),
            "place": ("on paper", "onto a form", "into a notebook"),
            "view": ("our scan", "that snapshot", "some bitmap"),
            "sign": ("figure", "character", "symbol"),
        },
    ),
}


def _check_wording(argument: str, value: str) -> None:
    require_choice(argument, value, _GRAMMARS)


@dataclass(frozen=True)
class Wordings:
    """The tokens of all captions of one set.

    Attributes:
        tokens: tokens (K, T, L) of each class and wording.
        starts: first wording of each template (M,).
        counts: number of wordings of each template (M,).
    """

    tokens: Tensor
    starts: np.ndarray[Any, np.dtype[np.int64]]
    counts: np.ndarray[Any, np.dtype[np.int64]]

    def draw(self, key: tuple[int, ...], labels: Tensor, indices: list[int]) -> Tensor:
        """Choose a caption for each sample: first a template, each as likely as another, then one of its wordings.

        Args:
            key: seed and epoch.
            labels: class of each sample (B,).
            indices: number of each sample, B of them; the choice depends on the key and this number alone.

        Returns:
            Tokens (B, L).
        """
        words = random_words((_CAPTIONS, *key), indices)
        template = (words & np.uint64(0xFFFFFFFF)).astype(np.int64) % len(self.counts)
        wording = self.starts[template] + (words >> np.uint64(32)).astype(np.int64) % self.counts[template]
        return self.tokens[labels, torch.from_numpy(wording)]


class CaptionedDigits(Dataset[Any]):
    """A split of the digits with a caption for each image, read by the batch.

    Args:
        images: the images and labels.
        wordings: the captions of every class.
        seed: number of the choice of captions, which depends on (seed, epoch, index) alone.
    """

    def __init__(self, images: ImageTensors, wordings: Wordings, *, seed: int) -> None:
        self.images = images
        self.wordings = wordings
        self.seed = seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> PairBatch:
        return {name: value[0] for name, value in self.__getitems__([index]).items()}

    def __getitems__(self, indices: list[int]) -> PairBatch:
        images, labels = self.images.__getitems__(indices)
        text = self.wordings.draw((self.seed, epoch_of(indices)), labels, indices)
        rows = self.images.indices[torch.from_numpy(np.array(indices, dtype=np.int64))]
        return {"image": images, "text": text, "label": labels, "id": rows}


class DigitsCaptionsDataModule(DigitsDataModule):
    """Handwritten digits with captions that say which digit it is, 10 classes, in memory.

    The images and splits are those of `DigitsDataModule`. A batch is a dict: "image" (B, C, H, W), "text" (B, L), the tokens
    of a caption, "label" (B,) and "id" (B,), the number of the image among all 1,797. A training image has another caption
    each epoch, one of 88 of its class; an image for evaluation keeps one, which depends on ``split_seed``.

    Args:
        tokenizer: a model of open_clip, whose tokenizer is used. CLIP's own (ViT-B-32 and many others) needs no network.
        context_length: tokens of a caption. The longest caption must fit in; it has 11 with CLIP's tokenizer.
        eval_wording: captions of the evaluation splits, "seen" in training or "unseen", with other templates and words.
        batch_size: pairs in a batch and process, at least 1.
        image_size: side of the images in pixels, at least 8; larger ones are upsampled (bilinear), once.
        channels: 1, or 3 for networks that expect colour (the channel is repeated).
        augment: shift each training image by -1, 0 or 1 of its original pixels in both directions.
        train_samples: keep so many training images, of each class in proportion and at least one; None keeps all.
        val_share: share of all images for validation, in [0, 1).
        test_share: share of all images for the test, in [0, 1).
        split_seed: number of the split, of the choice for ``train_samples`` and of the captions in evaluation.
        seed: number of the training order, of the augmentation and of the captions in training.
        num_workers: processes that read the data; 0 is fastest, the data are in memory.
        drop_last: leave out a last training batch that is not full.
        pin_memory: copy batches to page-locked memory, for a GPU.

    Raises:
        InputError: an argument is out of its range. When the data are read: the tokenizer is unknown, or
            ``context_length`` cuts a caption.

    Example:
        >>> data = DigitsCaptionsDataModule(batch_size=100)
        >>> batch = next(iter(data.train_dataloader()))
        >>> {name: tuple(value.shape) for name, value in batch.items()}
        {'image': (100, 1, 8, 8), 'text': (100, 16), 'label': (100,), 'id': (100,)}
        >>> data.class_prompts("seen")[3][:2], data.class_prompts("unseen")[8][-1]
        (['a photo of the digit three', 'a photo of the digit 3'], 'it looks like an 8')
    """

    def __init__(
        self,
        *,
        tokenizer: str = "ViT-B-32",
        context_length: int = 16,
        eval_wording: Literal["seen", "unseen"] = "seen",
        batch_size: int = 64,
        image_size: int = 8,
        channels: int = 1,
        augment: bool = False,
        train_samples: int | None = None,
        val_share: float = 0.1,
        test_share: float = 0.2,
        split_seed: int = 0,
        seed: int = 0,
        num_workers: int = 0,
        drop_last: bool = False,
        pin_memory: bool = False,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            image_size=image_size,
            channels=channels,
            augment=augment,
            train_samples=train_samples,
            val_share=val_share,
            test_share=test_share,
            split_seed=split_seed,
            seed=seed,
            num_workers=num_workers,
            drop_last=drop_last,
            pin_memory=pin_memory,
        )
        _check_wording("eval_wording", eval_wording)
        self.tokenize = OpenClipTokens(tokenizer, context_length)
        self.eval_wording = eval_wording

    def class_prompts(self, split: Literal["seen", "unseen"] = "seen") -> list[list[str]]:
        """Return every caption of each class; the t-th of two classes differ in the digit alone.

        Args:
            split: "seen" for the wordings of training, "unseen" for those that training never shows.

        Raises:
            InputError: there is no such set.
        """
        _check_wording("split", split)
        return [[text for texts in _GRAMMARS[split].fill(digit) for text in texts] for digit in range(10)]

    def zero_shot_prompts(self) -> dict[str, list[list[str]]]:
        """Return the prompts by which the modules of two towers classify in evaluation: of seen and of unseen wording."""
        return {split: self.class_prompts(cast("Any", split)) for split in _GRAMMARS}

    def wordings(self, split: Literal["seen", "unseen"] = "seen") -> Wordings:
        """Return the tokens of `class_prompts`.

        Args:
            split: as there.

        Raises:
            InputError: the tokenizer is unknown, or ``context_length`` cuts a caption.
        """
        prompts = self.class_prompts(split)
        length = self.tokenize.context_length
        assert length is not None
        whole = OpenClipTokens(self.tokenize.name, max(length, _ROOM))
        tokens = torch.stack([whole(texts) for texts in prompts])
        padding = tokens[..., -1:]  # no caption is that long
        longest = int((tokens != padding).flatten(0, 1).any(0).nonzero().max()) + 1
        if length < longest:
            raise InputError(
                f"context_length must be at least {longest}, the length of the longest caption with the tokenizer "
                f"{self.tokenize.name}, got {length}"
            )
        tokens = tokens[..., :length].contiguous()
        counts = np.asarray([len(texts) for texts in _GRAMMARS[split].fill(0)], dtype=np.int64)
        return Wordings(tokens, np.cumsum(counts) - counts, counts)

    def _load(self) -> Splits:
        images = super()._load()
        seen, evaluation = self.wordings("seen"), self.wordings(self.eval_wording)

        def captioned(split: Any, wordings: Wordings, seed: int) -> Any:
            return None if split is None else CaptionedDigits(split, wordings, seed=seed)

        return Splits(
            train=captioned(images.train, seen, self.seed),
            train_eval=captioned(images.train_eval, evaluation, self.split_seed),
            val=captioned(images.val, evaluation, self.split_seed),
            test=captioned(images.test, evaluation, self.split_seed),
        )
