"""Figures that modules and callbacks draw: from the run into the stored model and its card, and no further."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest

import zoo
from tests.stored import seeded_distillation
from zoo import publish, run_facts, storage
from zoo.errors import InputError

PNG = b"\x89PNG of a map"


class Draws(pl.Callback):
    def __init__(self, **drawn: bytes) -> None:
        self.drawn = drawn

    def card_figures(self) -> dict[str, bytes]:
        return self.drawn


def run_of(*callbacks: pl.Callback, module: Any = None) -> Any:
    return SimpleNamespace(lightning_module=module, callbacks=[pl.Callback(), *callbacks])


def test_figures_of_module_and_callbacks_have_their_places() -> None:
    run = run_of(Draws(saliency=b"s"), Draws(), Draws(robustness=b"r"), module=Draws(layers=b"l"))
    assert run_facts.figures(run) == {
        "figures/layers.png": b"l",
        "figures/saliency.png": b"s",
        "figures/robustness.png": b"r",
    }


def test_several_of_one_name_are_numbered() -> None:
    run = run_of(*(Draws(saliency=bytes([number])) for number in range(6)))
    names = ["saliency", "saliency_2", "saliency_3", "saliency_4"]
    assert run_facts.figures(run) == {f"figures/{name}.png": bytes([number]) for number, name in enumerate(names)}


def test_bad_name_is_refused() -> None:
    message = r"Draws.card_figures\(\) may return layers, robustness, saliency, samples, got '../escaped'"
    with pytest.raises(InputError, match=message):
        run_facts.figures(run_of(Draws(**{"../escaped": PNG})))


def test_stored_with_the_model_and_gone_with_the_next() -> None:
    model = seeded_distillation()
    model.run_figures = run_facts.figures(run_of(Draws(saliency=PNG)))
    folder = model.save_pretrained("stored")
    assert (folder / "figures/saliency.png").read_bytes() == PNG
    assert "figures/saliency.png" in storage.names(folder)
    shown = "![saliency](figures/saliency.png)"
    assert shown in (folder / "README.md").read_text()
    publish.write_card(folder, existing=publish.read_text(folder, "README.md"))
    assert (folder / "README.md").read_text().count(shown) == 1
    scratch = Path("scratch")
    scratch.mkdir()
    publish.write_card(scratch, repo_id="me/x", source=folder)
    assert shown in (scratch / "README.md").read_text(), "the card that is pushed shows it too"

    zoo.from_pretrained(folder).save_pretrained(folder)
    assert not (folder / "figures/saliency.png").exists()
    assert "saliency.png" not in (folder / "README.md").read_text()


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
