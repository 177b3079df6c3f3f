"""Curves of a run: which files there are, that they are the same to the byte, and that any history can be drawn."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import rc_context, rcParams
from PIL import Image

from tests.model_cards import card_of
from zoo.errors import InputError
from zoo.model_card import write_figures

LOSS, METRICS = "figures/loss.png", "figures/metrics.png"
HISTORY = {
    "train/loss": [[epoch, 2.0 / (epoch + 1)] for epoch in range(5)],
    "val/loss": [[epoch, 2.5 / (epoch + 1)] for epoch in range(5)],
    "val/acc": [[epoch, 1 - 0.5 / (epoch + 1)] for epoch in range(5)],
    "train/nd": [[epoch, 1.0 / (epoch + 1)] for epoch in range(5)],
}


def pixels(path: Path) -> Any:
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert not set(image.info) - {"dpi"}, "neither a time nor a version is in the file"
        return np.asarray(image.convert("RGB"))


def colours(path: Path) -> set[tuple[int, ...]]:
    """The saturated colours of a figure: those of its lines."""
    flat = pixels(path).reshape(-1, 3)
    values, counts = np.unique(flat, axis=0, return_counts=True)
    return {
        tuple(map(int, value)) for value, count in zip(values, counts, strict=True) if count > 50 and np.ptp(value) > 60
    }


BLUE, RED = (0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)


def test_files_and_lines(tmp_path: Path) -> None:
    assert write_figures(HISTORY, tmp_path) == [LOSS, METRICS]
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == ["loss.png", "metrics.png"]
    assert {BLUE, RED} <= colours(tmp_path / LOSS), "a line for each split"
    assert RED not in colours(tmp_path / METRICS), "a panel for each quantity"
    assert pixels(tmp_path / METRICS).shape[1] == 2 * pixels(tmp_path / LOSS).shape[1]
    assert f"![loss]({LOSS})" in card_of(figures=write_figures(HISTORY, tmp_path))


def test_the_same_bytes_whatever_the_order_and_the_users_style(tmp_path: Path) -> None:
    write_figures(HISTORY, tmp_path / "a")
    style = {"text.color": "white", "axes.facecolor": "black", "xtick.color": "white", "axes.edgecolor": "white"}
    with rc_context({**style, "savefig.facecolor": "black", "savefig.dpi": 50, "axes.labelcolor": "white"}):
        before = dict(rcParams)
        write_figures(dict(reversed(HISTORY.items())), tmp_path / "b")
        assert dict(rcParams) == before
    for name in (LOSS, METRICS):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_one_epoch_is_a_visible_point(tmp_path: Path) -> None:
    assert write_figures({"val/acc": [[0, 0.5]]}, tmp_path) == [METRICS]
    assert BLUE in colours(tmp_path / METRICS)


@pytest.mark.parametrize("history", [{}, {"val/acc": []}, {"val/acc": [[0, math.nan], [1, math.inf], [2, None]]}])
def test_nothing_to_draw_leaves_no_file(tmp_path: Path, history: dict[str, Any]) -> None:
    write_figures(HISTORY, tmp_path)
    assert write_figures(history, tmp_path) == []
    assert not list((tmp_path / "figures").iterdir())


def test_values_that_are_not_finite_are_gaps(tmp_path: Path) -> None:
    values = [1.0, math.nan, 0.5, -math.inf, 10**400, 1e300, None, 0.25]
    assert write_figures({"train/loss": list(enumerate(values))}, tmp_path) == [LOSS]
    with_gaps = pixels(tmp_path / LOSS)
    write_figures({"train/loss": [(epoch, v) for epoch, v in enumerate(values) if v in (1.0, 0.5, 0.25)]}, tmp_path)
    assert not np.array_equal(with_gaps, pixels(tmp_path / LOSS)), "no line leads over a gap"


@pytest.mark.parametrize(
    "name", ["$\\frac{$", "_hidden", "漢字/loss", "<b>$x$</b>", "", "a/" * 100, "\n\ud800", "%s{}"]
)
def test_any_name_can_be_drawn(tmp_path: Path, name: str) -> None:
    (file,) = write_figures({name: [[0, 1.0], [1, 0.5]]}, tmp_path)
    assert BLUE in colours(tmp_path / file)


def test_very_many_quantities_take_bounded_space(tmp_path: Path) -> None:
    history = {f"train/{i}": [[0, float(i)]] for i in range(200)} | {
        f"split{i}/loss": [[0, 1.0 * i]] for i in range(50)
    }
    assert write_figures(history, tmp_path) == [LOSS, METRICS]
    assert pixels(tmp_path / METRICS).shape[:2] == (4 * 360 + 30, 3 * 480)  # a line says that not all are drawn


@pytest.mark.parametrize("points", [3, "abc", [1, 2], [[0, "high"]], [[0]], [[None]], {"a": 1}])
def test_bad_history(tmp_path: Path, points: Any) -> None:
    with pytest.raises(InputError, match=r"history\['val/acc'\] must be a list of \[epoch, value\]"):
        write_figures({"val/acc": points}, tmp_path)


def test_pyplot_is_not_imported(tmp_path: Path) -> None:
    """Its global state, and the window system that it may choose, belong to the user."""
    code = (
        "import sys; from pathlib import Path; from zoo.model_card import write_figures\n"
        "assert 'matplotlib' not in sys.modules\n"
        "write_figures({'val/acc': [[0, 0.5]]}, Path('.'))\n"
        "print([m for m in ('matplotlib.pyplot', 'torch') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert result.stdout.strip() == "[]", result.stderr


def test_no_label_is_cut(tmp_path: Path) -> None:
    """The margins are given: the widest numbers stay inside of them."""
    wide = [-0.0075, 123456.0, -9.99e-7, 1e90]
    history = {f"val/m{i}": [[0, value], [99999, -0.37 * value]] for i, value in enumerate(wide)}
    write_figures(history, tmp_path)
    picture = pixels(tmp_path / METRICS)
    for border in (picture[:3], picture[-3:], picture[:, :3], picture[:, -3:]):
        assert (border == border.max()).all()
