"""Pictures of a run, to whatever loggers the trainer has; Lightning itself has no one way for it.

Read: the loggers of Lightning 2.6; the calls of TensorBoard, MLflow and Comet are those of their documentation.
"""

from __future__ import annotations

import re
from io import BytesIO
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.loggers import CometLogger, CSVLogger, Logger, MLFlowLogger, TensorBoardLogger

from zoo.errors import InputError

__all__ = ["log_image"]

_NAME = re.compile(r"[\w.-]+(/[\w.-]+)*")


def log_image(trainer: pl.Trainer, name: str, png: bytes, *, step: int) -> Path | None:
    """Log a picture with every logger that takes one, or write it to a file if none does.

    A logger takes pictures if it has ``log_image(key, images, step)`` as Lightning's W&B logger does, or is Lightning's for
    Comet or MLflow, or if its ``experiment`` has TensorBoard's ``add_image``. Else, and without a logger, the file is
    ``images/NAME/step-STEP.png`` below the run's folder; a file of that name is replaced.

    Nothing here is collective: it may be called in the first process alone, unlike ``trainer.log_dir``. In any other
    process, and under ``fast_dev_run``, it does nothing.

    What a logger or the disk raises is raised, as it is by Lightning when it logs a metric.

    Args:
        trainer: the trainer of the run.
        name: of the picture: letters, digits, ``_``, ``-`` and ``.``, in parts that are joined by ``/``.
        png: the picture, a PNG file.
        step: of the run, usually ``trainer.global_step``.

    Returns:
        The file, or None where none was written.

    Raises:
        InputError: the name cannot be the name of a file.

    Example:
        >>> import tempfile
        >>> from zoo.overlays import overlay_grid
        >>> trainer = pl.Trainer(logger=False, accelerator="cpu", default_root_dir=tempfile.mkdtemp())
        >>> picture = overlay_grid(torch.rand(1, 3, 8, 8), torch.rand(1, 1, 4, 4))
        >>> log_image(trainer, "saliency", picture, step=7).name
        'step-00000007.png'
    """
    if not _NAME.fullmatch(name) or any(not part.strip(".") for part in name.split("/")):
        raise InputError(f"name must be letters, digits, '_', '-' and '.', in parts joined by '/', got {name!r}")
    if not trainer.is_global_zero or getattr(trainer, "fast_dev_run", False):
        return None
    taken = [_hand_over(logger, name, png, step) for logger in trainer.loggers]
    if any(taken):
        return None
    path = _folder(trainer) / "images" / name / f"step-{step:08d}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png)
    return path


def _hand_over(logger: Logger, name: str, png: bytes, step: int) -> bool:
    """Give the picture to one logger; return whether it takes pictures."""
    if callable(getattr(logger, "log_image", None)):
        logger.log_image(key=name, images=[_picture(png)], step=step)  # type: ignore[attr-defined]
        return True
    # Asked of the class: an error inside the property must not look like its absence.
    experiment: Any = logger.experiment if hasattr(type(logger), "experiment") else None  # type: ignore[attr-defined]
    if isinstance(logger, CometLogger):
        experiment.log_image(_picture(png), name=name, step=step)
    elif isinstance(logger, MLFlowLogger):
        file = f"images/{name}/step-{step:08d}.png"
        experiment.log_image(run_id=logger.run_id, image=_picture(png), artifact_file=file)
    elif callable(getattr(experiment, "add_image", None)):
        pixels = np.asarray(_picture(png).convert("RGB"))
        experiment.add_image(name, pixels.transpose(2, 0, 1), global_step=step)
    else:
        return False
    return True


def _picture(png: bytes) -> Any:
    from PIL import Image

    return Image.open(BytesIO(png))


def _folder(trainer: pl.Trainer) -> Path:
    """Return the folder of ``trainer.log_dir``, which asks all processes."""
    folder: str | None = None
    if trainer.loggers:
        first = trainer.loggers[0]
        folder = first.log_dir if isinstance(first, TensorBoardLogger | CSVLogger) else first.save_dir
    return Path(folder or trainer.default_root_dir)
