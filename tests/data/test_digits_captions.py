"""The digits with captions."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import open_clip
import pytest
import torch

from zoo.data.digits import DigitsDataModule
from zoo.data.digits_captions import DigitsCaptionsDataModule
from zoo.errors import InputError

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
# Words without content of their own; all others are either of the seen or of the unseen wordings.
COMMON = {"a", "an", "the", "of", "is"}


def spoken(tokens: torch.Tensor) -> list[str]:
    decode = open_clip.tokenizer.decode
    return [re.sub(r"<\w+>|!+$", "", decode(row[row != 0])).strip() for row in tokens]


def normal(text: str) -> str:
    return re.sub(r"\W+", " ", text).strip()


def words(prompts: list[list[str]]) -> set[str]:
    every = {word for texts in prompts for text in texts for word in re.findall(r"[\w-]+", text)}
    return every - set(NAMES) - set("0123456789") - COMMON


def test_wordings_are_disjoint():
    data = DigitsCaptionsDataModule()
    seen, unseen = data.class_prompts("seen"), data.class_prompts("unseen")
    assert [len(texts) for texts in seen] == [88] * 10
    assert [len(texts) for texts in unseen] == [52] * 10
    assert len({text for texts in seen + unseen for text in texts}) == 1400  # no caption is that of two classes
    assert not words(seen) & words(unseen)
    assert "handwritten" in words(seen)
    assert "scrawled" in words(unseen)


@pytest.mark.parametrize("split", ["seen", "unseen"])
def test_captions_differ_in_the_digit_alone(split):
    for number, texts in enumerate(DigitsCaptionsDataModule().class_prompts(split)):
        for text, three in zip(texts, DigitsCaptionsDataModule().class_prompts(split)[3], strict=True):
            theirs = three.replace("three", NAMES[number]).replace("3", str(number))
            if number == 8:
                theirs = re.sub(r"\ba (eight|8)\b", r"an \1", theirs)
            assert text == theirs


def test_identity_images_are_those_of_the_digits():
    options: dict[str, Any] = {"augment": True, "image_size": 16, "channels": 3, "train_samples": 100, "batch_size": 64}
    ours, theirs = DigitsCaptionsDataModule(**options), DigitsDataModule(**options)
    whole = torch.cat([y for _, y in DigitsDataModule(val_share=0.0, test_share=0.0).train_eval_dataloader()])
    for split in ("train", "train_eval", "val", "test"):
        for batch, (images, labels) in zip(
            getattr(ours, f"{split}_dataloader")(), getattr(theirs, f"{split}_dataloader")(), strict=True
        ):
            assert torch.equal(batch["image"], images)
            assert torch.equal(batch["label"], labels)
            assert torch.equal(whole[batch["id"]], labels)
            assert batch["text"].dtype == torch.int64
    assert ours.num_classes == 10


def captions(data: DigitsCaptionsDataModule, epoch: int) -> dict[int, str]:
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return {int(i): text for batch in loader for i, text in zip(batch["id"], spoken(batch["text"]), strict=True)}


def test_captions_say_the_class_and_depend_on_seed_epoch_and_index_only():
    data = DigitsCaptionsDataModule()
    seen = [{normal(text) for text in texts} for texts in data.class_prompts("seen")]
    for batch in data.train_dataloader():
        for label, text in zip(batch["label"], spoken(batch["text"]), strict=True):
            assert normal(text) in seen[label]
    first = captions(data, 3)
    torch.manual_seed(9)
    assert captions(DigitsCaptionsDataModule(batch_size=77), 3) == first
    for other in (captions(data, 4), captions(DigitsCaptionsDataModule(seed=1), 3)):
        assert sum(other[index] == text for index, text in first.items()) < 0.2 * len(first)


def test_every_template_is_as_likely_as_another():
    texts = list(captions(DigitsCaptionsDataModule(val_share=0.0, test_share=0.0), 0).values())
    alone = sum(re.fullmatch(rf"an? ({'|'.join(NAMES)}|\d)", text) is not None for text in texts)
    assert abs(alone / len(texts) - 1 / 8) < 0.03  # 4 standard deviations; 2 of 88 wordings would be 0.02
    assert len(set(texts)) > 500


@pytest.mark.parametrize("wording", ["seen", "unseen"])
def test_evaluation_captions_stay(wording):
    data = DigitsCaptionsDataModule(eval_wording=wording)
    known = [{normal(text) for text in texts} for texts in data.class_prompts(wording)]
    batches = list(data.test_dataloader())
    for batch in batches:
        assert all(
            normal(text) in known[label] for label, text in zip(batch["label"], spoken(batch["text"]), strict=True)
        )
    again = list(DigitsCaptionsDataModule(eval_wording=wording, seed=5).test_dataloader())
    assert all(torch.equal(a["text"], b["text"]) for a, b in zip(batches, again, strict=True))


def same(first: Any, second: Any) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_loader_goes_on_in_the_middle_of_an_epoch():
    whole = DigitsCaptionsDataModule(batch_size=200, augment=True).train_dataloader()
    whole.sampler.set_epoch(2)
    iterator = iter(whole)
    for _ in range(3):
        next(iterator)
    resumed = DigitsCaptionsDataModule(batch_size=200, augment=True).train_dataloader()
    resumed.load_state_dict(whole.state_dict())
    resumed.sampler.set_epoch(2)
    assert all(same(a, b) for a, b in zip(resumed, iterator, strict=True))


def test_two_processes_share_the_images():
    ids = []
    for rank in range(2):
        data = DigitsCaptionsDataModule(train_samples=100)
        data.trainer = SimpleNamespace(world_size=2, global_rank=rank)  # type: ignore[assignment]
        ids.append({int(i) for batch in data.train_dataloader() for i in batch["id"]})
    assert len(ids[0]) == len(ids[1]) == 50
    assert not ids[0] & ids[1]


def test_bad_arguments():
    with pytest.raises(InputError, match=r"eval_wording must be one of seen, unseen, got 'unsen'. Did you mean unseen"):
        DigitsCaptionsDataModule(eval_wording="unsen")
    with pytest.raises(InputError, match="split must be one of seen, unseen, got 'val'"):
        DigitsCaptionsDataModule().class_prompts("val")
    with pytest.raises(InputError, match=r"context_length must be at least 11, .* got 8"):
        DigitsCaptionsDataModule(context_length=8).setup()
    with pytest.raises(InputError, match="channels must be 1 or 3, got 2"):
        DigitsCaptionsDataModule(channels=2)
