"""Everything at once: all callbacks on a user's own module, interrupted, resumed, on two processes.

How recipes are chained through stored models is in tests/test_composition_chain.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.composition_parts import CALLBACKS
from tests.hub_fixtures import call_python
from tests.hub_server import HubServer

ROOT = Path(__file__).parents[1]


def _make(jobs: list[dict[str, Any]]) -> Any:
    from tests.composition_parts import run_all

    return run_all(jobs)


def runs(hub: HubServer, folder: Path, jobs: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Make runs by name, in one process for all imports; each has a repository of its name."""
    orders = []
    for name, job in jobs.items():
        place = job.get("of", name)
        options = {key: value for key, value in job.items() if key != "of"}
        orders.append({"folder": str(folder / place), "repo_id": f"me/{folder.name}-{place}", **options})
    environment = {"PYTHONPATH": str(ROOT)}
    answers = call_python(_make, orders, server=hub, home=folder, extra_env=environment, timeout=300)
    return dict(zip(jobs, answers, strict=True))


def weights(folder: Path, name: str) -> dict[str, Tensor]:
    found: dict[str, Tensor] = torch.load(folder / name / "weights.pt", weights_only=True)
    return found


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float = 0.0) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        torch.testing.assert_close(value, b[name], rtol=tolerance, atol=tolerance)


def check_run(answer: dict[str, Any], *, interrupted: bool = False) -> None:
    """The module is as it was but for its weights; what was pushed is the best."""
    assert answer["interrupted"] is interrupted
    assert answer["changed"] == []
    for report in answer["reports"]:
        assert report["changed"] == []
    if not interrupted:
        assert answer["pushed_is_best"]
        assert len(answer["reports"][0]["best"]) == 3
        assert len(set(answer["reports"][0]["best"])) == 1


def reordered(order: Sequence[str], by: int) -> list[str]:
    """The same callbacks in another order: from the other end, beginning elsewhere."""
    turned = list(reversed(order))
    return turned[by:] + turned[:by]


_SAME, _HALF = {"teacher_width": 12, "epochs": 2}, {"precision": "bf16-mixed", "epochs": 2}
_JOBS: dict[str, dict[str, Any]] = {
    "plain": {"order": []},
    "whole": {},
    "turned": {"order": reordered(CALLBACKS, 3)},
    "half": {"interrupt": 9},
    "resumed": {"of": "half", "resume": True},
    "one": _SAME,
    "two": {**_SAME, "processes": 2},
    "bf16-whole": _HALF,
    "bf16-half": {**_HALF, "interrupt": 6},
    "bf16-resumed": {**_HALF, "of": "bf16-half", "resume": True},
}


@pytest.fixture(scope="module")
def made(hub_server: HubServer, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Any]]]:
    """The folder and the answers of all runs above, of one process for what they import."""
    folder = tmp_path_factory.mktemp("composed")
    return folder, runs(hub_server, folder, _JOBS)


def test_all_callbacks_at_once(made: tuple[Path, dict[str, dict[str, Any]]]) -> None:
    """One process: interrupted and resumed, and in another order of callbacks, it is the same run to the bit."""
    folder, answers = made
    _check_resumed(answers, folder)
    check_run(answers["turned"])
    assert_equal(weights(folder, "turned"), weights(folder, "whole"))
    whole = answers["whole"]["reports"][0]
    assert {"train/nd", "train/structure", "val/robust/clean", "val/robust/adaptive_0.05"} <= whole["metrics"].keys()
    # The user's own random numbers, in training and afterwards, are those of a run without callbacks.
    assert whole["drawn"] == answers["plain"]["drawn"]
    assert whole["random"] == answers["plain"]["random"]
    plain = weights(folder, "plain")
    assert any(not torch.equal(plain[name], value) for name, value in weights(folder, "whole").items())


def test_two_processes_are_one(made: tuple[Path, dict[str, dict[str, Any]]]) -> None:
    """The same global batches, means over them and gathered neighbours: the same run but for rounding."""
    folder, answers = made
    for name in ("one", "two"):
        check_run(answers[name])
    assert_equal(weights(folder, "two"), weights(folder, "one"), tolerance=2e-5)
    one, (first, second) = answers["one"]["reports"][0], answers["two"]["reports"]
    assert first["best"] == second["best"] == pytest.approx(one["best"], rel=1e-5)
    for name in ("val/loss", "val/acc", "val/robust/clean", "val/robust/adaptive_0.05", "train/structure"):
        assert first["metrics"][name] == second["metrics"][name] == pytest.approx(one["metrics"][name], rel=1e-4), name


def test_bfloat16(made: tuple[Path, dict[str, dict[str, Any]]]) -> None:
    """Under autocast too a resumed run is the run that was not interrupted."""
    folder, answers = made
    _check_resumed(answers, folder, "bf16-")
    assert any(
        not torch.equal(value, weights(folder, "whole")[name]) for name, value in weights(folder, "bf16-whole").items()
    )


@pytest.mark.thorough
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_two_processes_resume(hub: HubServer, tmp_path: Path, precision: str) -> None:
    given = {"precision": precision, "processes": 2, "epochs": 3}
    jobs = {
        "whole": given,
        "turned": {**given, "order": reordered(CALLBACKS, 2)},
        "half": {**given, "interrupt": 6},
        "resumed": {**given, "of": "half", "resume": True},
    }
    answers = runs(hub, tmp_path, jobs)
    _check_resumed(answers, tmp_path)
    assert_equal(weights(tmp_path, "turned"), weights(tmp_path, "whole"))


@pytest.mark.thorough
@pytest.mark.parametrize("by", range(len(CALLBACKS)))
def test_any_order(hub: HubServer, tmp_path: Path, by: int) -> None:
    answers = runs(hub, tmp_path, {"whole": {"epochs": 2}, "turned": {"order": reordered(CALLBACKS, by), "epochs": 2}})
    for answer in answers.values():
        check_run(answer)
    assert_equal(weights(tmp_path, "turned"), weights(tmp_path, "whole"))


def _check_resumed(answers: dict[str, dict[str, Any]], folder: Path, prefix: str = "") -> None:
    whole, half, resumed = (answers[prefix + name] for name in ("whole", "half", "resumed"))
    check_run(whole)
    check_run(resumed)
    check_run(half, interrupted=True)
    assert_equal(weights(folder, f"{prefix}half"), weights(folder, f"{prefix}whole"))
    for first, second in zip(whole["reports"], resumed["reports"], strict=True):
        for name in ("steps", "best", "waited", "metrics"):
            assert first[name] == second[name], name
