"""Fixed centres of classes: unit vectors, one or several a class and modality, from prompts, lists or a file.

Held in one tensor (P, K, M, D) for P modalities, K classes and at most M centres a class, with a mask (P, K, M) of booleans
that says which there are; the rest is 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from zoo.errors import InputError
from zoo.losses.contracts import unit_rows
from zoo.towers import fingerprint

__all__ = ["TEMPLATES", "Centres", "centre_digests", "embed_prompts", "read_centres", "templates_of"]

TEMPLATES = {
    "image": "a photo of a {}", "video": "a video of a {}", "audio": "a sound of a {}",
    "point": "a 3D point cloud of a {}", "thermal": "a thermal photo of a {}", "event": "an event frame of a {}",
}  # fmt: skip
"""A prompt a modality, for those that name none; others are "a {modality} of a {}"."""


class Centres(NamedTuple):
    """Centres of the classes.

    Attributes:
        vectors: unit vectors (P, K, M, D), or (K, M, D) of one modality, float32, 0 where there is none.
        mask: which there are (P, K, M), or (K, M).
    """

    vectors: Tensor
    mask: Tensor


def templates_of(modality: str, given: Mapping[str, Sequence[str]] | None) -> list[str]:
    """Return the templates of a modality: those that are given, or the one of `TEMPLATES`.

    Example:
        >>> templates_of("audio", None), templates_of("touch", None)
        (['a sound of a {}'], ['a touch of a {}'])
    """
    if given is not None and modality in given:
        return list(given[modality])
    return [TEMPLATES.get(modality, f"a {modality} of a {{}}")]


@torch.no_grad()
def embed_prompts(encode: Callable[[list[str]], Tensor], prompts: Sequence[Sequence[Sequence[str]]]) -> Centres:
    """Return the embeddings of prompts as centres.

    Args:
        encode: texts -> embeddings (B, D), of any length.
        prompts: by modality, then class, at least one each.
    """
    return _pack([[unit_rows(encode(list(texts)).float()).cpu() for texts in classes] for classes in prompts])


def read_centres(given: str | Sequence[Any] | Mapping[str, Any], modalities: Sequence[str]) -> Centres:
    """Read centres from lists or a file.

    Args:
        given: for all modalities (K, D) or, with several centres a class, K lists of vectors; or a dict of those by
            modality. A string is a file: ``.npy`` with an array (K, D) or (K, M, D), or ``.safetensors`` with such a tensor
            named ``centres``, or one for each modality under its name.
        modalities: names of the modalities, in order.

    Returns:
        Unit vectors.

    Raises:
        InputError: a file that cannot be read, a modality without centres, vectors that are no numbers, of different
            widths, zero or not finite, or other numbers of classes.

    Example:
        >>> centres = read_centres([[[3.0, 0.0], [0.0, 1.0]], [[0.0, -2.0]]], ["image"])
        >>> centres.vectors.shape, centres.mask.tolist()
        (torch.Size([1, 2, 2, 2]), [[[True, True], [True, False]]])
    """
    value = _read_file(given) if isinstance(given, str) else given
    if not isinstance(value, Mapping):
        value = dict.fromkeys(modalities, value)
    missing = [name for name in modalities if name not in value]
    if missing:
        raise InputError(f"centres hold nothing for {', '.join(missing)}: they have {', '.join(map(str, value))}")
    return _pack([[_vectors(name, row) for row in value[name]] for name in modalities])


def centre_digests(centres: Centres, modalities: Sequence[str]) -> dict[str, str]:
    """Return the SHA-256 of the centres of each modality."""
    return {
        name: fingerprint({"centres": centres.vectors[place], "mask": centres.mask[place]})
        for place, name in enumerate(modalities)
    }


def _read_file(path: str) -> Any:
    try:
        if path.endswith(".npy"):
            return torch.from_numpy(np.load(path, allow_pickle=False))
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file

            found = load_file(path)
            return found.get("centres", found)
    except (OSError, ValueError) as error:
        raise InputError(f"centres: {Path(path).name} cannot be read: {error}") from error
    raise InputError(f"centres must be a .npy or a .safetensors file, got {path!r}")


def _vectors(modality: str, row: Any) -> Tensor:
    try:
        vectors = torch.as_tensor(row, dtype=torch.float32)
    except (TypeError, ValueError) as error:
        raise InputError(f"centres of {modality} must be vectors of one width, got {str(row)[:80]}") from error
    vectors = vectors.unsqueeze(0) if vectors.ndim == 1 else vectors
    if vectors.ndim != 2 or not vectors.numel():
        raise InputError(
            f"centres of {modality} must be one vector a class or a list of them, got shape {tuple(vectors.shape)}"
        )
    unit = unit_rows(vectors)
    if not bool(unit.isfinite().all()) or not bool(unit.any(1).all()):
        raise InputError(f"centres of {modality} must be finite and not zero")
    return unit


def _pack(groups: Sequence[Sequence[Tensor]]) -> Centres:
    counts, widths = {len(group) for group in groups}, {rows.shape[1] for group in groups for rows in group}
    if len(counts) != 1 or len(widths) != 1:
        raise InputError(
            f"centres of all modalities must have the same classes and one width, got {sorted(counts)} classes and widths "
            f"{sorted(widths)}"
        )
    classes = counts.pop()
    rows = [rows for group in groups for rows in group]
    vectors = pad_sequence(rows, batch_first=True)
    mask = torch.arange(vectors.shape[1]) < torch.tensor([len(found) for found in rows]).unsqueeze(1)
    shape = (len(groups), classes, vectors.shape[1])
    return Centres(vectors.view(*shape, -1), mask.view(shape))
