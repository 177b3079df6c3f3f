"""Class centres from lists and files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from zoo.class_centres import centre_digests, read_centres, templates_of
from zoo.errors import InputError


def test_lists_of_unequal_length_become_unit_vectors() -> None:
    found = read_centres({"a": [[[3.0, 4.0]], [[0.0, 2.0], [1.0, 0.0]]], "b": [[1.0, 0.0], [0.0, 1.0]]}, ["b", "a"])
    assert found.vectors.shape == (2, 2, 2, 2)
    assert found.vectors[1, 0, 0].tolist() == pytest.approx([0.6, 0.8])
    assert found.vectors[1, 1].tolist() == [[0.0, 1.0], [1.0, 0.0]]
    assert found.mask.tolist() == [[[True, False], [True, False]], [[True, False], [True, True]]]
    assert not found.vectors[~found.mask].any()


def test_files(tmp_path: Path) -> None:
    table = torch.randn(3, 2, 4)
    np.save(tmp_path / "c.npy", table.numpy())
    save_file({"centres": table}, tmp_path / "c.safetensors")
    save_file({"image": table, "audio": table.flip(0)}, tmp_path / "each.safetensors")
    modalities = ["image", "audio"]
    first = read_centres(str(tmp_path / "c.npy"), modalities)
    second = read_centres(str(tmp_path / "c.safetensors"), modalities)
    each = read_centres(str(tmp_path / "each.safetensors"), modalities)
    torch.testing.assert_close(first.vectors[0], torch.nn.functional.normalize(table, dim=2))
    assert centre_digests(first, modalities) == centre_digests(second, modalities)
    assert centre_digests(first, modalities)["image"] == centre_digests(each, modalities)["image"]
    assert centre_digests(first, modalities)["audio"] != centre_digests(each, modalities)["audio"]


def test_templates() -> None:
    assert templates_of("thermal", {"image": ["x {}"]}) == ["a thermal photo of a {}"]
    assert templates_of("image", {"image": ["x {}"]}) == ["x {}"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"audio": [[1.0]]}, "centres hold nothing for image: they have audio"),
        ([[0.0, 0.0], [1.0, 0.0]], "must be finite and not zero"),
        ([[float("nan"), 0.0]], "must be finite and not zero"),
        ([["a", "b"]], "must be vectors of one width"),
        ([[[1.0, 2.0], [1.0]]], "must be vectors of one width"),
        ([[[[1.0]]]], r"one vector a class or a list of them, got shape \(1, 1, 1\)"),
        ([[1.0, 2.0], [1.0]], r"the same classes and one width, got \[2\] classes and widths \[1, 2\]"),
        ("centres.pt", "must be a .npy or a .safetensors file, got 'centres.pt'"),
        ("nowhere.npy", "nowhere.npy cannot be read"),
    ],
)
def test_bad_centres(given: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_centres(given, ["image"])
