"""The curves of a report: every point where its value is, from whatever was logged."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.report_pages import page_of, store
from zoo.report_curves import History, lay_out, read_history

CALM = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])


def test_points_lie_where_their_values_are() -> None:
    curves = lay_out([("a", History({"val/acc": [(0.0, 0.0), (1.0, 0.25), (4.0, 1.0), (5.0, math.nan), (6.0, 0.5)]}))])
    (panel,) = curves.panels
    marks = panel.lines[0].marks
    across = [(mark.x - marks[0].x) / (marks[3].x - marks[0].x) for mark in marks]
    up = [(mark.y - marks[0].y) / (marks[2].y - marks[0].y) for mark in marks]
    assert across == pytest.approx([0, 1 / 6, 4 / 6, 1], abs=1e-3)
    assert up == pytest.approx([0, 0.25, 1, 0.5], abs=1e-3)
    assert panel.lines[0].path.count("M") == 2  # a gap where the value was not finite
    ticks = {tick.text: tick.at for tick in panel.y_ticks}
    assert ticks["0"] == marks[0].y
    assert ticks["1"] == marks[2].y


@CALM
@given(
    st.lists(st.tuples(st.integers(0, 10**6), st.floats(allow_nan=True)), min_size=1, max_size=40),
    st.lists(st.tuples(st.integers(0, 10**6), st.floats(width=16)), max_size=40),
)
def test_any_values_are_drawn_inside_the_diagram(first: list[Any], second: list[Any]) -> None:
    histories = [
        (name, read_history({"val/x": [list(point) for point in points]}, Path("nowhere")))
        for name, points in (("a", first), ("b", second))
    ]
    for panel in lay_out(histories).panels:
        places = [float(number) for line in panel.lines for number in re.findall(r"[-\d.]+", line.path)]
        assert all(0 <= x <= 360 for x in places[::2])
        assert all(0 <= y <= 210 for y in places[1::2])
        assert all(0 <= tick.at <= 360 for tick in (*panel.x_ticks, *panel.y_ticks))
        assert panel.left < 180


def test_long_curves_are_thinned_and_keep_their_end() -> None:
    points = [*((float(step), 1.0) for step in range(10_000)), (10_000.0, 2.0)]
    (panel,) = lay_out([("a", History({"train/loss": points}))]).panels
    assert 800 <= len(re.findall("[ML]", panel.lines[0].path)) <= 1001
    assert panel.lines[0].path.endswith(f"L350.0 {10 + 176 * 0.04 / 1.08:.1f}")
    assert panel.lines[0].marks == []


def test_curves_of_the_newest_log_where_none_are_recorded(tmp_path: Path) -> None:
    folder = store(tmp_path / "run", {"run.history": ...})
    for version, text in (
        (9, "epoch,val/acc\n0,0.125\n"),
        (10, "epoch,step,val/acc,train/loss\n0,9,,2.0\n0,9,0.5,\n1,19,,1.5\n1,20,,1.25\n1,19,nan,\n"),
        (12, "epoch,step,test/acc\nx,1,0.9\n"),  # what `zoo test` leaves has no epoch
        (13, "\0\n"),
        (11, "epoch,val/acc\n0,\xff\n"),
    ):
        path = folder / f"lightning_logs/version_{version}/metrics.csv"
        path.parent.mkdir(parents=True)
        path.write_bytes(text.encode("latin-1"))
    page = page_of(folder)
    assert "read from lightning_logs/version_10/metrics.csv" in page.text
    assert page.table("Finite values")[1:] == [
        ["train/loss", "2", "2", "1.25", "2", "1.25"],
        ["val/acc", "1", "0.5", "0.5", "0.5", "0.5"],
    ]
