"""`zoo demo`, shortened: every step of it runs, and its statistics say what they should."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from scipy import stats

import zoo
from zoo.cli import main
from zoo.demo import paired_difference, verdict


@pytest.mark.filterwarnings("ignore")
def test_demo_trains_stores_reloads_and_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--seeds", "2", "--epochs", "2", "--teacher-epochs", "1", "--train-samples", "100"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for row in ("teacher", "student alone", "KD", "KD++", "paired", "to the last digit", "ND "):
        assert row in shown, row
    config = json.loads((tmp_path / "runs/demo/config.json").read_text())
    assert config["args"]["nd_weight"] == 2.0
    assert zoo.from_pretrained("runs/demo").student.fc.out_features == 10


def test_paired_difference_is_the_t_interval() -> None:
    control, method = [97.0, 98.5, 96.0, 99.0, 98.0], [98.0, 98.5, 97.5, 99.5, 97.0]
    mean, sd, low, high = paired_difference(control, method)
    differences = [b - a for a, b in zip(control, method, strict=True)]
    interval = stats.ttest_1samp(differences, 0).confidence_interval(0.95)
    assert (low, high) == (pytest.approx(interval.low), pytest.approx(interval.high))
    assert mean == pytest.approx(0.4)
    assert sd == pytest.approx(0.96177, abs=1e-5)


def test_verdict() -> None:
    assert "helped" in verdict(0.1, 0.5)
    assert "hurt" in verdict(-0.5, -0.1)
    assert "no difference" in verdict(-0.1, 0.5)


def test_bad_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--seeds", "1"]) == 2
    assert "--seeds must be at least 2" in capsys.readouterr().err
