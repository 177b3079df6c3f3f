"""Captions as token numbers, by open_clip's tokenizers, and the form of a batch of pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor

from zoo.errors import InputError, nearest

__all__ = ["OpenClipTokens", "PairBatch"]

PairBatch = dict[str, Tensor]
"""A batch of pairs: a tensor (B, …) for each modality by its name ("image", "text", …), and beside them

- "id" (B,), int64: which thing the pair shows. Two pairs with one id are two captions of one image.
- "label" (B,), int64, where the data have classes.
"""


class OpenClipTokens:
    """open_clip's tokenizer of a model, by the model's name.

    The tokenizer is made at the first call, and again in each process that a pickled copy reaches. CLIP's own vocabulary is
    part of open_clip and needs no network; models whose tokenizer is Hugging Face's need `transformers` and a download.

    Args:
        name: a model of open_clip, such as ViT-B-32; open_clip/ViT-B-32/laion2b_s34b_b79k, the name of a tower, will do.
        context_length: tokens of a text, at least 3. Longer texts are cut, and shorter ones are filled up with zeros. None
            takes the model's.

    Raises:
        InputError: ``context_length`` is too small. At the first call: the model is unknown, or its tokenizer cannot be had.

    Example:
        >>> tokens = OpenClipTokens("ViT-B-32", context_length=6)
        >>> tokens(["three", "the digit three"])
        tensor([[49406,  2097, 49407,     0,     0,     0],
                [49406,   518, 27472,  2097, 49407,     0]])
    """

    def __init__(self, name: str = "ViT-B-32", context_length: int | None = None) -> None:
        if context_length is not None and context_length < 3:
            raise InputError(
                f"context_length must be at least 3, a token between the start and the end, got {context_length}"
            )
        self.name = name
        self.context_length = context_length
        self._tokenizer: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tokenizer": None}

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Return the tokens (B, L), int64, of texts.

        Args:
            texts: B texts.

        Raises:
            InputError: the tokenizer cannot be had.
        """
        return cast("Tensor", self._made()(list(texts), self.context_length))

    def load(self) -> None:
        """Make the tokenizer now, so that a wrong name is found early and processes forked later share it.

        Raises:
            InputError: the tokenizer cannot be had.
        """
        self._made()

    def _made(self) -> Any:
        if self._tokenizer is None:
            import open_clip

            model = self.name.removeprefix("open_clip/").split("/")[0]
            known = open_clip.list_models()
            if model not in known:  # open_clip itself takes CLIP's tokenizer for a name that it does not know
                raise InputError(
                    f"tokenizer {self.name!r} is no model of open_clip.{nearest(model, known)} "
                    "open_clip.list_models() lists them"
                )
            try:
                self._tokenizer = open_clip.get_tokenizer(model)
            except ModuleNotFoundError as error:
                raise InputError(
                    f"tokenizer {self.name!r} needs the package {error.name}: pip install {error.name}, or take one with "
                    "CLIP's vocabulary, such as ViT-B-32"
                ) from error
            except OSError as error:  # Hugging Face's for files that are not in the cache and cannot be downloaded
                raise InputError(f"tokenizer {self.name!r} cannot be had: {error}") from error
        return self._tokenizer
