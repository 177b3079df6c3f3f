"""Overlays: colours against the formula by hand, figures pixel by pixel, bad input."""

from __future__ import annotations

from io import BytesIO
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from zoo.errors import InputError
from zoo.overlays import displayed, overlay, overlay_grid


def pixels(png: bytes) -> Any:
    return np.asarray(Image.open(BytesIO(png)))


def squares(pixel: Any, times: int) -> Any:
    return np.kron(pixel, np.ones((times, times, 1))).astype(np.uint8)


# -- images ------------------------------------------------------------------------------------------------------------


def test_mean_and_std_give_the_colours_back() -> None:
    colours = torch.randint(0, 256, (3, 4, 5))
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    normal = (colours / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    shown = displayed(normal.double(), mean=mean, std=std)
    assert np.array_equal(shown, colours.permute(1, 2, 0).numpy())
    assert displayed(torch.tensor([[[9.0, -9.0]]]), mean=[0.5], std=[1.0])[0, :, 0].tolist() == [255, 0]


def test_integers_are_colours() -> None:
    colours = torch.randint(0, 256, (3, 4, 5), dtype=torch.uint8)
    assert np.array_equal(displayed(colours), colours.permute(1, 2, 0).numpy())


def test_other_numbers_of_channels_are_grey() -> None:
    image = torch.tensor([[[0.0]], [[1.0]], [[0.5]], [[0.5]]])
    assert displayed(image).tolist() == [[[128, 128, 128]]]
    assert displayed(torch.tensor([[[-2.0, 2.0]]]))[0].tolist() == [[0, 0, 0], [255, 255, 255]]


@given(
    st.integers(1, 5),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64]),
    st.sampled_from([0.0, 1e-3, 1.0, 1e4]),
    st.integers(0, 100),
)
@settings(max_examples=25, deadline=None)
def test_any_image_can_be_shown(channels: int, dtype: torch.dtype, scale: float, seed: int) -> None:
    image = (torch.randn(channels, 3, 4, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)
    if dtype.is_floating_point:
        image[0, 0, 0] = [float("nan"), float("inf"), 0.0][seed % 3]
    shown = displayed(image)
    assert shown.shape == (3, 4, 3)
    assert shown.dtype == np.uint8
    if dtype.is_floating_point and channels == 3 and len(image[image.isfinite()].unique()) > 1:
        assert (shown.min(), shown.max()) == (0, 255)
    laid = overlay(image, torch.randn(1, 2, 2, generator=torch.Generator().manual_seed(seed)))
    assert laid.shape == (3, 4, 3)


# -- maps --------------------------------------------------------------------------------------------------------------


def test_overlay_is_the_formula() -> None:
    image, one = torch.rand(3, 4, 4, dtype=torch.float64), torch.rand(1, 4, 4, dtype=torch.float64)
    image[0, 0, 0], image[1, 0, 0] = 0.0, 1.0  # the whole range, so that nothing is stretched
    found = overlay(image, one * 7 - 3, colormap="viridis", opacity=0.5)
    share = (one[0] - one.min()) / (one.max() - one.min())
    grey = 0.75 * (0.299 * image[0] + 0.587 * image[1] + 0.114 * image[2])
    for row in range(4):
        for column in range(4):
            colour = matplotlib.colormaps["viridis"](float(share[row, column]))[:3]
            weight = 0.5 * float(share[row, column])
            for channel in range(3):
                value = 255 * ((1 - weight) * float(grey[row, column]) + weight * colour[channel])
                assert abs(found[row, column, channel] - value) <= 1


@pytest.mark.parametrize("one", [torch.full((2, 2), 3.0), torch.tensor([[0.0, float("nan")], [1.0, 2.0]])])
def test_maps_that_say_nothing_cover_nothing(one: Tensor) -> None:
    image = torch.rand(1, 4, 4)
    covered, bare = overlay(image, one), overlay(image, torch.rand(4, 4), opacity=0.0)
    assert np.array_equal(covered, bare)


def test_map_is_resized_to_the_image() -> None:
    found = overlay(torch.zeros(1, 8, 4), torch.tensor([[[0.0], [1.0]]]))
    assert found.shape == (8, 4, 3)
    assert (np.diff(found[:, 0].sum(1).astype(int)) >= 0).all()


# -- figures -----------------------------------------------------------------------------------------------------------


def test_panels_are_the_overlays_pixel_by_pixel() -> None:
    images, one, two = torch.randn(3, 1, 8, 8), torch.rand(3, 1, 2, 2), torch.rand(3, 1, 8, 8)
    figure = pixels(overlay_grid(images, {"one": one, "two": two}, ["a", "b", "c"], columns=2, caption="all"))
    width, height, left, band = 166, 166, 20, 14 + 3 * 166
    assert figure.shape == (26 + 2 * band, left + 2 * width, 3)
    for index in range(3):
        x, y = left + index % 2 * width, 26 + index // 2 * band + 14
        expected = [displayed(images[index]), overlay(images[index], one[index]), overlay(images[index], two[index])]
        for line, panel in enumerate(expected):
            top = y + line * height
            assert np.array_equal(figure[top : top + 160, x : x + 160], squares(panel, 20)), (index, line)
    assert (figure[26 + band + 14 :, left + width :] == 255).all()  # no fourth image
    assert (figure[:26] < 255).any()
    assert (figure[26:40] < 255).any()
    assert (figure[:, :left] < 255).any()


def test_without_images_titles_and_caption() -> None:
    images, one = torch.randn(2, 3, 8, 8), torch.rand(2, 1, 2, 2)
    figure = pixels(overlay_grid(images, one, show_images=False))
    assert figure.shape == (6 + 166, 6 + 2 * 166, 3)
    assert np.array_equal(figure[6:166, 6:166], squares(overlay(images[0], one[0]), 20))


def test_large_images_are_shrunk() -> None:
    figure = pixels(overlay_grid(torch.rand(1, 3, 100, 320), torch.rand(1, 1, 5, 16)))
    assert figure.shape == (6 + 2 * 56, 6 + 166, 3)


def test_same_bytes_whatever_the_style_and_signs() -> None:
    call: dict[str, Any] = {"images": torch.rand(1, 1, 4, 4), "maps": {"$x$": torch.rand(1, 1, 4, 4)}}
    first = overlay_grid(**call, titles=["Löwe $\\frac$\nsecond"], caption="猫 $")
    with matplotlib.rc_context(
        {"font.size": 30, "axes.facecolor": "black", "figure.facecolor": "black", "savefig.dpi": 7}
    ):
        assert overlay_grid(**call, titles=["Löwe $\\frac$\nsecond"], caption="猫 $") == first


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"images": torch.zeros(3, 4, 4)}, r"images must be \(B, C, H, W\)"),
        ({"images": torch.zeros(0, 1, 4, 4)}, "at least one, got shape"),
        ({"images": torch.zeros(2, 1, 4, 0)}, "not empty"),
        ({"maps": {}}, "maps must be maps"),
        ({"maps": {"a": torch.zeros(3, 1, 2, 2)}}, r"one an image, 2, got shape \(3, 1, 2, 2\) for 'a'"),
        ({"maps": torch.zeros(2, 3, 2, 2)}, r"a map must be \(1, H, W\)"),
        ({"maps": torch.zeros(2, 1, 2, 2, dtype=torch.int64)}, "in floating point"),
        ({"titles": ["a"]}, "titles must be one an image, 2, got 1"),
        ({"columns": 0}, "columns must be at least 1, got 0"),
        ({"opacity": 1.5}, "opacity must be in 0 … 1, got 1.5"),
        ({"colormap": "infermo"}, r"got 'infermo'\. Did you mean inferno"),
        ({"mean": [0.5]}, "mean and std must be given together"),
        ({"mean": [0.5], "std": [0.1, 0.2]}, "std must be one number, or one a channel, 1, got 2"),
    ],
)  # fmt: skip
def test_bad_input(change: dict[str, Any], match: str) -> None:
    good = {"images": torch.zeros(2, 1, 4, 4), "maps": torch.rand(2, 1, 2, 2)}
    with pytest.raises(InputError, match=match):
        overlay_grid(**{**good, **change})
