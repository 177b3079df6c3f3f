"""Pictures reach each kind of logger in its own way, and else a file; nothing is collective."""

from __future__ import annotations

import sys
from io import BytesIO
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
from lightning.pytorch.loggers import CometLogger, CSVLogger, Logger, MLFlowLogger, TensorBoardLogger
from PIL import Image

from zoo.errors import InputError
from zoo.image_logging import log_image


def png(mode: str = "RGB") -> bytes:
    file = BytesIO()
    Image.new(mode, (5, 3), "red" if mode == "RGB" else None).save(file, format="png")
    return file.getvalue()


class Recorder:
    """An experiment that takes pictures as TensorBoard, Comet and MLflow do, and notes what it got."""

    def __init__(self) -> None:
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def add_image(self, tag: str, img_tensor: Any, global_step: int | None = None) -> None:
        self.calls.append(((tag, img_tensor), {"global_step": global_step}))

    def log_image(self, *args: Any, **kwargs: Any) -> None:
        self.calls.append((args, kwargs))


class Silent(Logger):
    """A logger of one's own."""

    def __init__(self, experiment: Any = None, folder: str | None = None) -> None:
        super().__init__()
        self._of = experiment
        self._at = folder

    experiment = property(lambda self: self._of)
    save_dir = property(lambda self: self._at)
    name = "silent"
    version = 0

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, *args: Any, **kwargs: Any) -> None:
        pass


class WandbLike(Silent):
    def log_image(self, key: str, images: list[Any], step: int | None = None) -> None:
        if self._of is None:
            raise ConnectionError("the tracker is away")
        self._of.log_image(key, images, step=step)


def trainer(folder: Path, *loggers: Logger, **options: Any) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu", logger=list(loggers) or False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, default_root_dir=folder, **options,
    )  # fmt: skip


def made(kind: type[Logger], **attributes: Any) -> Any:
    """A logger of Lightning's whose package is not installed."""
    logger = kind.__new__(kind)
    for name, value in attributes.items():
        setattr(logger, name, value)
    return logger


def test_file_without_a_logger(tmp_path: Path) -> None:
    path = log_image(trainer(tmp_path), "grid/first", png(), step=7)
    assert path == tmp_path / "images" / "grid" / "first" / "step-00000007.png"
    assert path.read_bytes() == png()
    assert log_image(trainer(tmp_path), "grid/first", b"new", step=7) == path
    assert path.read_bytes() == b"new"


def test_file_beside_the_metrics(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path / "csv", name="run")
    path = log_image(trainer(tmp_path, logger), "a", png(), step=0)
    assert path == Path(logger.log_dir, "images", "a", "step-00000000.png")
    path = log_image(trainer(tmp_path, Silent(folder=str(tmp_path / "own"))), "a", png(), step=0)
    assert path == tmp_path / "own" / "images" / "a" / "step-00000000.png"
    path = log_image(trainer(tmp_path, Silent()), "a", png(), step=0)
    assert path == tmp_path / "images" / "a" / "step-00000000.png"


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
def test_add_image(tmp_path: Path, mode: str) -> None:
    for logger in (Silent(Recorder()), made(TensorBoardLogger, _experiment=Recorder())):
        assert log_image(trainer(tmp_path, logger), "a", png(mode), step=4) is None
        (((tag, pixels), options),) = logger.experiment.calls
        assert (tag, options) == ("a", {"global_step": 4})
        assert (pixels.dtype, pixels.shape) == (np.uint8, (3, 3, 5))
        assert pixels[:, 0, 0].tolist() == ([255, 0, 0] if mode == "RGB" else [0, 0, 0])
    assert list(tmp_path.iterdir()) == []


def test_each_logger_in_its_own_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", ModuleType("mlflow"))  # Lightning imports it before it gives its client
    wandb, comet, mlflow = Recorder(), Recorder(), Recorder()
    loggers = [
        WandbLike(wandb),
        made(CometLogger, _comet_experiment=comet, _experiment=comet),
        made(MLFlowLogger, _mlflow_client=mlflow, _initialized=True, _run_id="r7", _experiment_id="e"),
        CSVLogger(tmp_path / "csv"),
    ]
    assert log_image(trainer(tmp_path), "a/b", png(), step=4) is not None
    assert log_image(trainer(tmp_path, *loggers), "a/b", png(), step=4) is None
    (((key, pictures), options),) = wandb.calls
    assert (key, pictures[0].size, options) == ("a/b", (5, 3), {"step": 4})
    (((picture,), options),) = comet.calls
    assert (picture.size, options) == ((5, 3), {"name": "a/b", "step": 4})
    (((), options),) = mlflow.calls
    assert options.pop("image").size == (5, 3)
    assert options == {"run_id": "r7", "artifact_file": "images/a/b/step-00000004.png"}


def test_other_processes_and_fast_dev_run_do_nothing(tmp_path: Path) -> None:
    other = SimpleNamespace(is_global_zero=False, fast_dev_run=False)  # asking it for more would raise
    assert log_image(other, "a", png(), step=0) is None  # type: ignore[arg-type]
    assert log_image(trainer(tmp_path, fast_dev_run=True), "a", png(), step=0) is None
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_collective(tmp_path: Path) -> None:
    one = trainer(tmp_path, CSVLogger(tmp_path))
    one.strategy.broadcast = one.strategy.barrier = None  # type: ignore[method-assign, assignment]
    assert log_image(one, "a", png(), step=0) is not None


def test_errors_are_raised(tmp_path: Path) -> None:
    with pytest.raises(ConnectionError, match="the tracker is away"):
        log_image(trainer(tmp_path, WandbLike()), "a", png(), step=0)
    (tmp_path / "images").touch()
    with pytest.raises(OSError, match="images"):
        log_image(trainer(tmp_path), "a", png(), step=0)


@pytest.mark.parametrize("name", ["", "/a", "a/", "a//b", "..", "a/../b", "a b", "a\\b", "a\n"])
def test_bad_names(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="name must be letters, digits"):
        log_image(trainer(tmp_path), name, png(), step=0)
