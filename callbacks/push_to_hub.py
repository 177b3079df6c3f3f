"""Push versions of a model to the Hub while it trains, without slowing, blocking or killing the run.

Each version is first stored completely on disk, then sent in the background by the first process. What cannot be sent stays
on disk, and the log names the command that sends it. A crash at any moment leaves the last complete version on the Hub and
on disk; a resumed run sends what an earlier one could not.
"""

from __future__ import annotations

import logging
import math
import re
import shlex
import shutil
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from safetensors import SafetensorError
from torch import Tensor

from zoo import hub, hub_client, run_facts, storage, transport
from zoo.errors import InputError

__all__ = ["PushToHub"]

# Records, not warnings: where warnings are errors, one raised in the background would end the upload. Below Lightning's
# logger, so that they are seen where its own messages are.
_log = logging.getLogger("lightning.pytorch.callbacks.push_to_hub")
_STAGED = re.compile(r"\d+-epoch-\d+(?:-step-\d+)?")
_SENT = ".sent"


class PushToHub(pl.Callback):
    """Store and push a LightningModule's best, last or final weights, with a model card.

    A `ZooModule` is stored as `save_pretrained` does it; any other LightningModule as plain weights with its JSON
    hyper-parameters, which ``zoo.load_weights(repo_id, module)`` puts back. Token: that of the environment (``HF_TOKEN``) or
    of the login, never an argument. With a sharded strategy (FSDP, DeepSpeed) no process has all weights: refused.

    Args:
        repo_id: ``owner/name``, or ``name`` for the token's user; created at the first push if needed.
        monitor: the metric that says what is best; that of the trainer's ModelCheckpoint if omitted.
        mode: whether the metric is better when it is lower or higher; that of the ModelCheckpoint with this monitor if
            omitted.
        every_n_epochs: look for a version in every so many epochs, counted from 1.
        on: ``"best"`` pushes whenever the metric improves, ``"last"`` each time, ``"end"`` once, after the last epoch.
        private: make a new repository private.
        tag_versions: tag the commit of each version ``epoch-N`` (from 0; ``epoch-N-step-M`` in mid-epoch) and send every
            one; otherwise a version that was not sent before a newer one came is left out. A tag that stands already
            stays where it is.
        folder: where versions are staged; ``hub/<name>`` in the trainer's ``default_root_dir`` if omitted.

    Raises:
        InputError: an argument is out of its range; at the start of fit: nobody is logged in, the token may not write
            there, or there is nothing to monitor. A Hub that cannot be reached is no error.
    """

    def __init__(
        self,
        repo_id: str,
        monitor: str | None = None,
        mode: Literal["min", "max"] | None = None,
        *,
        every_n_epochs: int = 1,
        on: Literal["best", "last", "end"] = "best",
        private: bool | None = None,
        tag_versions: bool = False,
        folder: str | None = None,
    ) -> None:
        transport.parse_source(f"hf://{repo_id}")
        if on not in ("best", "last", "end"):
            raise InputError(f"on must be best, last or end, got {on!r}")
        if mode not in (None, "min", "max"):
            raise InputError(f"mode must be min or max, got {mode!r}")
        if every_n_epochs < 1:
            raise InputError(f"every_n_epochs must be at least 1, got {every_n_epochs}")
        self.repo_id = repo_id
        self.monitor = monitor
        self.mode = mode
        self.every_n_epochs = every_n_epochs
        self.on = on
        self.private = private
        self.tag_versions = tag_versions
        self.folder = folder
        self.best: float | None = None
        self._active = False
        self._watch: tuple[str, str] = ("", "")
        self._before: Tensor | None = None
        self._validated = False
        self._folder = Path()
        self._order = 0
        self._writer: ThreadPoolExecutor | None = None
        self._sender: ThreadPoolExecutor | None = None
        self._jobs: list[Future[None]] = []
        self._pending: dict[Path, hub.Snapshot] = {}
        self._newest: Path | None = None
        self._ending = False
        self._given_up = False
        self._started = 0.0
        self._history: dict[str, list[list[float]]] = {}

    @property
    def state_key(self) -> str:
        """Two callbacks may stand side by side if they push to different repositories or different versions."""
        return self._generate_state_key(repo_id=self.repo_id, on=self.on, monitor=self.monitor)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs: the best value so far, and the curves of the card."""
        return {"best": self.best, "history": self._history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        self.best = state_dict["best"]
        self._history = state_dict["history"]

    # -- life ------------------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check the metric, the token and the name before the first step; only the first process asks the Hub.

        Raises:
            InputError: see the class; raised in every process.
        """
        if stage != "fit" or getattr(trainer, "fast_dev_run", False):
            return
        self._check_trainer(trainer)
        name = self.repo_id.rpartition("/")[2]
        self._folder = Path(self.folder) if self.folder else Path(trainer.default_root_dir, "hub", name)
        problem = trainer.strategy.broadcast(self._check_hub() if trainer.is_global_zero else None)
        if problem is not None:
            raise InputError(problem)
        self._active = True
        self._validated = self._ending = self._given_up = False
        self._started = time.monotonic()
        if trainer.is_global_zero:
            self._writer = ThreadPoolExecutor(1, thread_name_prefix="zoo-store")
            self._sender = ThreadPoolExecutor(1, thread_name_prefix="zoo-push")
            self._resume_unsent()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remember the metric, to see afterwards whether validation is what makes it."""
        if self._active:
            self._before = trainer.callback_metrics.get(self._watch[0])

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take note of the metrics, and push where they are the best so far."""
        if not self._active or trainer.sanity_checking:
            return
        self._note(trainer)
        if trainer.callback_metrics.get(self._watch[0]) is not self._before:
            self._validated = True
            if self.on == "best" and self._is_due(trainer) and self._has_improved(trainer):
                self._stage(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Push the last weights where they are asked for, or the best by a metric that training makes."""
        if not self._active:
            return
        self._note(trainer)
        by_training = self.on == "best" and not self._validated
        if self._is_due(trainer) and (self.on == "last" or (by_training and self._has_improved(trainer))):
            self._stage(trainer, pl_module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Push the final weights where they are asked for, and wait for what is under way."""
        if self._active and self.on == "end":
            self._stage(trainer, pl_module)
        self._finish()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Send what is staged before the run ends."""
        self._finish()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Wait for what is under way."""
        self._finish()

    # -- steps -----------------------------------------------------------------------------------------------------

    def _check_trainer(self, trainer: pl.Trainer) -> None:
        if not isinstance(trainer.strategy, pl.strategies.DDPStrategy | pl.strategies.SingleDeviceStrategy):
            raise InputError(
                f"PushToHub cannot store sharded weights ({type(trainer.strategy).__name__}): use DDP or one device"
            )
        if self.on != "best":
            return
        watched = {
            getattr(found, "monitor", None): getattr(found, "mode", None) for found in trainer.checkpoint_callbacks
        }
        monitor = self.monitor or next((name for name in watched if name is not None), None)
        if monitor is None:
            raise InputError(
                "PushToHub has no metric to call best: give monitor=… and mode=…, or on='last' or on='end'"
            )
        mode = self.mode or watched.get(monitor)
        if mode is None:
            raise InputError(f"PushToHub needs mode='min' or mode='max' for monitor={monitor!r}")
        self._watch = (monitor, mode)

    def _check_hub(self) -> str | None:
        """Return what is wrong, in a sentence, or None."""
        try:
            transport.check_access(self.repo_id)
        except hub_client.UnreachableError as error:
            _log.warning("PushToHub: %s. The run goes on; versions are kept in %s", error, self._folder)
        except InputError as error:
            return str(error)
        return None

    def _is_due(self, trainer: pl.Trainer) -> bool:
        return (trainer.current_epoch + 1) % self.every_n_epochs == 0

    def _note(self, trainer: pl.Trainer) -> None:
        """Keep the curves; in every process, since reading a metric for the first time may gather it from all."""
        for name, value in trainer.callback_metrics.items():
            number = float(value)
            if math.isfinite(number):
                points = self._history.setdefault(name, [])
                if points and points[-1][0] == trainer.current_epoch:
                    points[-1][1] = number
                else:
                    points.append([trainer.current_epoch, number])

    def _has_improved(self, trainer: pl.Trainer) -> bool:
        monitor, mode = self._watch
        value = trainer.callback_metrics.get(monitor)
        if value is None or not math.isfinite(float(value)):
            if trainer.is_global_zero:
                what = "missing" if value is None else "not finite"
                _log.warning("PushToHub: %r is %s in epoch %d, nothing is pushed", monitor, what, trainer.current_epoch)
            return False
        number = float(value)
        better = self.best is None or (number < self.best if mode == "min" else number > self.best)
        if better:
            self.best = number
        return better

    def _stage(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Copy the weights now, write and send them in the background."""
        if self._writer is None:
            return  # the first process does it
        epochs, whole = trainer.current_epoch, True
        if self.on != "end":  # in its epoch, whose number the trainer has not raised yet
            whole = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
            epochs += whole
        version = f"epoch-{max(epochs - 1, 0)}" if whole else f"epoch-{epochs}-step-{trainer.global_step}"
        try:
            facts, figures = self._facts(trainer, epochs), run_facts.figures(trainer)
            snapshot = hub.snapshot(pl_module, run=facts, figures=figures)
        except InputError as error:
            _log.warning("PushToHub: %s is not pushed: %s", version, error)
            return
        self._order += 1
        folder = self._folder / f"{self._order:04d}-{version}"
        if not self.tag_versions:
            self._pending.clear()  # what a slow disk has not taken yet would hold memory for nothing
        self._pending[folder] = snapshot
        self._jobs.append(self._writer.submit(self._write_and_send, folder))

    def _facts(self, trainer: pl.Trainer, epochs: int) -> dict[str, Any]:
        facts = run_facts.collect(
            trainer,
            metrics=run_facts.by_split(trainer.callback_metrics),
            seconds=time.monotonic() - self._started,
            monitor=self._watch[0] or None,
            history={name: [list(point) for point in points] for name, points in self._history.items()},
        )
        return {**facts, "epochs": epochs}

    def _write_and_send(self, folder: Path) -> None:
        assert self._sender is not None
        snapshot = self._pending.pop(folder, None)
        if snapshot is None:
            return  # a newer one waits behind it
        try:
            snapshot.write(folder)
        except (InputError, OSError, SafetensorError) as error:
            _log.warning("PushToHub: %s could not be stored: %s", folder, error)
            return
        self._newest = folder
        self._jobs.append(self._sender.submit(self._send, folder))

    def _send(self, folder: Path) -> None:
        """Send one version; this thread alone deletes staged versions, so none goes while it is read."""
        if folder != self._newest and not self.tag_versions:
            return  # a newer one waits behind it
        version = _version(folder)
        tag = version if self.tag_versions else None
        try:
            if self._given_up:
                raise hub_client.UnreachableError("the Hub cannot be reached")
            pushed = hub.push(folder, self.repo_id, private=self.private, message=f"Store {version}", tag=tag)
        except hub_client.TagTakenError as error:
            _log.warning("PushToHub: %s is sent. %s", version, error)
            (folder / _SENT).touch()
        except InputError as error:
            self._given_up = self._ending and isinstance(error, hub_client.UnreachableError)
            _log.warning(
                "PushToHub: %s could not be sent: %s. It is kept; `%s` sends it", version, error, self._command(folder)
            )
        else:
            _log.info("PushToHub: %s is %s@%s", version, pushed.repo_id, (pushed.commit or "")[:8])
            (folder / _SENT).touch()
        # This version is complete on disk, so the older ones have done their service.
        for other in _staged(folder.parent):
            if _order(other) < _order(folder) and not (self.tag_versions and _is_unsent(other)):
                shutil.rmtree(other, ignore_errors=True)

    def _command(self, folder: Path) -> str:
        words = ["zoo", "push", str(folder), self.repo_id]
        if self.private:
            words.append("--private")
        return shlex.join([*words, "--tag", _version(folder)] if self.tag_versions else words)

    def _resume_unsent(self) -> None:
        """Send what an interrupted run left unsent on disk; what the Hub has already makes no commit."""
        assert self._sender is not None
        found = _staged(self._folder)
        self._order = _order(found[-1]) if found else 0
        whole = [folder for folder in found if storage.locate(folder, "model.safetensors") is not None]
        if whole:
            self._newest = whole[-1]
        self._jobs += [self._sender.submit(self._send, folder) for folder in whole if _is_unsent(folder)]

    def _finish(self) -> None:
        """Wait for the background; nothing that happened there ends the run."""
        self._active = False
        if self._writer is None or self._sender is None:
            return
        self._ending = True
        self._writer.shutdown(wait=True)
        self._sender.shutdown(wait=True)
        self._writer = self._sender = None
        for job in self._jobs:
            defect = job.exception()
            if defect is not None:
                _log.error("PushToHub has a defect; versions are kept in %s", self._folder, exc_info=defect)
        self._jobs = []


def _staged(folder: Path) -> list[Path]:
    """Return what is staged, the oldest first; after a crash the last may be incomplete."""
    return sorted((path for path in folder.glob("*-epoch-*") if _STAGED.fullmatch(path.name)), key=_order)


def _order(folder: Path) -> int:
    return int(folder.name.partition("-")[0])


def _version(folder: Path) -> str:
    return folder.name.partition("-")[2]


def _is_unsent(folder: Path) -> bool:
    return storage.locate(folder, "model.safetensors") is not None and not (folder / _SENT).exists()
