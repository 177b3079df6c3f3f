"""open_clip's tokenizers by name."""

from __future__ import annotations

import pickle
import sys

import open_clip
import pytest
import torch

from zoo.data.text import OpenClipTokens
from zoo.errors import InputError


def test_identity_tokens_are_those_of_open_clip():
    texts = ["a photo of a cat", "zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich", ""]
    for name in ("RN50", "open_clip/RN50", "open_clip/RN50/openai"):
        tokens = OpenClipTokens(name)
        assert torch.equal(tokens(texts), open_clip.get_tokenizer("RN50")(texts))
        assert tokens(texts).shape == (3, 77)
    assert torch.equal(OpenClipTokens(context_length=8)(texts), open_clip.get_tokenizer("RN50")(texts, 8))


def test_pickled_copy_makes_its_own_tokenizer():
    tokens = OpenClipTokens(context_length=8)
    tokens.load()
    stored = pickle.dumps(tokens)
    assert len(stored) < 1000
    assert torch.equal(pickle.loads(stored)(["a cat"]), tokens(["a cat"]))


def test_bad_tokenizers(monkeypatch):
    with pytest.raises(InputError, match=r"'ViT-B-23' is no model of open_clip. Did you mean .*ViT-B-32"):
        OpenClipTokens("ViT-B-23").load()
    with pytest.raises(InputError, match=r"context_length must be at least 3, .* got 2"):
        OpenClipTokens(context_length=2)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match="'roberta-ViT-B-32' needs the package transformers: pip install transformers"):
        OpenClipTokens("roberta-ViT-B-32").load()
