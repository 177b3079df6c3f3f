"""A user's own module under every callback at once, and a chain of stored models: what tests/test_composition.py runs.

The runs need a Hub, so they are made in a fresh process (tests/hub_fixtures.py), which imports once and forks for each.
"""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import sklearn.datasets
import torch
import zoo.callbacks as ours
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor, nn
from torch.multiprocessing import ProcessRaisedException
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import zoo
from zoo import model_card

__all__ = ["CALLBACKS", "Digits", "Reader", "make_callbacks", "run", "run_all"]

CALLBACKS = ("nd", "structure", "saliency", "robustness", "push", "checkpoint", "stopping")
_TRAINED, _JUDGED, _BATCH = 96, 40, 24
# What each run would import anew.
_PRELOADED = (
    "PIL.PngImagePlugin", "PIL.JpegImagePlugin", "matplotlib.figure", "matplotlib.backends.backend_agg", "zoo.attack_plan",
    "zoo.attacks", "zoo.callbacks.nd_regularizer", "zoo.callbacks.normgrad_saliency", "zoo.callbacks.push_to_hub",
    "zoo.callbacks.robustness_evaluation", "zoo.callbacks.structure_regularizer", "zoo.cards", "zoo.hub_client",
    "zoo.overlays", "zoo.plain_weights", "zoo.publish", "zoo.robustness", "zoo.saliency", "zoo.towers",
)  # fmt: skip


class Reader(pl.LightningModule):
    """What a user has: a small network of digits with random numbers of its own. No class of the zoo."""

    def __init__(self, rate: float = 0.4) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.rate = rate
        self.net = nn.Sequential()
        for name, layer in (
            ("conv", nn.Conv2d(1, 4, 3, padding=1)),
            ("act", nn.ReLU(inplace=True)),
            ("flat", nn.Flatten()),
            ("hidden", nn.Linear(256, 12)),
            ("bend", nn.Tanh()),
            ("head", nn.Linear(12, 10)),
        ):
            self.net.add_module(name, layer)
        self.drawn: list[float] = []

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.net(images)
        return logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.drawn.append(float(torch.rand(())))
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        logits = self(batch[0])
        self.log("val/loss", F.cross_entropy(logits, batch[1]), sync_dist=True)
        self.log("val/acc", (logits.argmax(1) == batch[1]).float().mean(), sync_dist=True)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.rate, momentum=0.9, weight_decay=1e-4)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 5, 0.5), "interval": "step"}]


class Digits(pl.LightningDataModule):
    """Digits in [0, 1] in a fixed order; the batches of all processes together are those of one.

    Args:
        processes: how many share a batch.
    """

    def __init__(self, processes: int = 1) -> None:
        super().__init__()
        self.processes = processes

    def train_dataloader(self) -> DataLoader[Any]:
        return self._loader(0, _TRAINED)

    def val_dataloader(self) -> DataLoader[Any]:
        return self._loader(_TRAINED, _TRAINED + _JUDGED)

    def _loader(self, start: int, stop: int) -> DataLoader[Any]:
        found = sklearn.datasets.load_digits()
        images = torch.tensor(found.images[start:stop], dtype=torch.float32).unsqueeze(1) / 16
        rows = TensorDataset(images, torch.tensor(found.target[start:stop]))
        # Lightning's own would shuffle.
        sampler = None if self.processes == 1 else DistributedSampler(rows, shuffle=False)
        return DataLoader(rows, batch_size=_BATCH // self.processes, sampler=sampler)


class Interrupt(pl.Callback):
    """Fail in the middle of an epoch, as a machine that goes away does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise ConnectionAbortedError("interrupted")


class Report(pl.Callback):
    """Write down, when all is over, what each process is left with."""

    def __init__(self, folder: str, before: dict[str, Any]) -> None:
        self.folder = folder
        self.before = before

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._write(trainer, pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._write(trainer, pl_module)

    def _write(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        (checkpoint,) = trainer.checkpoint_callbacks
        (stopping,) = trainer.early_stopping_callbacks
        (push,) = (found for found in trainer.callbacks if isinstance(found, ours.PushToHub))
        assert isinstance(checkpoint, ModelCheckpoint)
        found = {
            "steps": trainer.global_step,
            "best": [float(x) for x in (checkpoint.best_model_score, stopping.best_score, push.best) if x is not None],
            "best_path": checkpoint.best_model_path,
            "waited": stopping.wait_count,
            "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
            "drawn": pl_module.drawn,
            "changed": list(_changes(self.before, pl_module)),
            "random": float(torch.rand(())),
        }
        Path(self.folder, f"report-{trainer.global_rank}.json").write_text(json.dumps(found))


def make_callbacks(names: Sequence[str], folder: str, repo_id: str, teacher_width: int) -> list[pl.Callback]:
    """The callbacks in an order.

    Args:
        names: which, as in `CALLBACKS`.
        folder: of the checkpoints.
        repo_id: where to push.
        teacher_width: of the teacher's features; 12 needs no projector, whose first weights are random.
    """
    with torch.random.fork_rng():
        torch.manual_seed(7)
        teacher = nn.Sequential(nn.Flatten(), nn.Linear(64, teacher_width), nn.Tanh(), nn.Linear(teacher_width, 10))
    makers = {
        "nd": lambda: ours.NDRegularizer(
            teacher, "net.bend", weight=1.5, warmup_epochs=1, projector_dropout=0.0, num_classes=10
        ),
        "structure": lambda: ours.StructureRegularizer("net.flat", "net.hidden", 0.5, warmup_steps=6, temperature=0.2),
        "saliency": lambda: ours.NormGradSaliency("net.conv", every_n_epochs=2, max_images=3),
        "robustness": lambda: ours.RobustnessEvaluation(
            (0.05,), ("pgd-ce",), every_n_epochs=2, max_samples=20, steps=2, check_samples=0, mean=[0.0], std=[1.0]
        ),
        "push": lambda: ours.PushToHub(repo_id, "val/loss", "min"),
        "checkpoint": lambda: ModelCheckpoint(f"{folder}/checkpoints", monitor="val/loss", mode="min", save_last=True),
        "stopping": lambda: EarlyStopping("val/loss", patience=3),
    }
    return [makers[name]() for name in names]


def run(
    folder: str,
    repo_id: str,
    *,
    order: Sequence[str] = CALLBACKS,
    processes: int = 1,
    precision: Any = "32-true",
    interrupt: int | None = None,
    resume: bool = False,
    epochs: int = 4,
    teacher_width: int = 8,
) -> dict[str, Any]:
    """Train a `Reader` and tell how it ended; its weights go to ``weights.pt`` in the folder.

    Args:
        folder: of the run.
        repo_id: where it pushes.
        order: of the callbacks.
        processes: how many.
        precision: of the trainer.
        interrupt: the step before which the run fails.
        resume: whether to go on from the last checkpoint.
        epochs: how many in all.
        teacher_width: as for `make_callbacks`.
    """
    pl.seed_everything(3, verbose=False)
    module = Reader()
    before = _state_of(module)
    callbacks = make_callbacks(order, folder, repo_id, teacher_width) if order else []
    if order:
        callbacks.append(Report(folder, before))
    if interrupt is not None:
        callbacks.append(Interrupt(interrupt))
    trainer = pl.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        devices=processes,
        strategy="ddp_fork" if processes > 1 else "auto",
        precision=precision,
        max_epochs=epochs,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=bool(order),
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    interrupted = False
    try:
        path = f"{folder}/checkpoints/last.ckpt" if resume else None
        trainer.fit(module, Digits(processes), ckpt_path=path, weights_only=True)
    except (ConnectionAbortedError, ProcessRaisedException) as error:
        if "interrupted" not in str(error):
            raise
        interrupted = True
    torch.save(module.state_dict(), f"{folder}/weights.pt")
    # Where one process fails, the others are stopped wherever they are.
    ranks = range(0 if not order else 1 if interrupted else processes)
    reports = [json.loads(Path(folder, f"report-{rank}.json").read_text()) for rank in ranks]
    answer = {"interrupted": interrupted, "changed": list(_changes(before, module)), "reports": reports}
    if not order:
        answer |= {"drawn": module.drawn, "random": float(torch.rand(()))}
    elif not interrupted:
        loaded = Reader()
        zoo.load_weights(repo_id, loaded)
        best = torch.load(reports[0]["best_path"], weights_only=True)["state_dict"]
        pushed = loaded.state_dict()
        answer["pushed_is_best"] = best.keys() == pushed.keys() and all(torch.equal(best[k], pushed[k]) for k in best)
    return answer


def run_all(jobs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Make runs one after another, each in a fork of this process, in which nothing has run.

    Args:
        jobs: the arguments of `run`.
    """
    # The curves of a card take longer to draw than such a run to make.
    model_card.write_figures = lambda history, folder: []  # type: ignore[assignment]
    torch.set_num_threads(1)
    for name in _PRELOADED:
        import_module(name)
    answers = []
    for job in jobs:
        folder = Path(job["folder"])
        folder.mkdir(parents=True, exist_ok=True)
        pid = os.fork()
        if pid == 0:
            os._exit(_answered(job, folder))
        status = os.waitpid(pid, 0)[1]
        written = (folder / "answer.txt").read_text() if (folder / "answer.txt").exists() else "killed"
        assert status == 0, f"{job}\n{written}"
        answers.append(json.loads(written))
    return answers


def _answered(job: dict[str, Any], folder: Path) -> int:
    try:
        written, status = json.dumps(run(**job)), 0
    except BaseException:  # noqa: BLE001 - the test prints it
        written, status = traceback.format_exc(), 1
    (folder / "answer.txt").write_text(written)
    return status


def _state_of(module: pl.LightningModule) -> dict[str, Any]:
    return {
        "parts": [name for name, _ in module.named_modules()],
        "parameters": {name: parameter.requires_grad for name, parameter in module.named_parameters()},
        # Lightning leaves its redirection of `forward` behind where it has wrapped a module for DDP.
        "attributes": sorted(vars(module).keys() - {"forward"}),
        "hooks": _hooks(module),
        "modes": {name: part.training for name, part in module.named_modules()},
        "types": [type(part).__qualname__ for part in module.modules()],
    }


def _hooks(module: nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(part, kind)) for part in module.modules() for kind in kinds)


def _changes(before: dict[str, Any], module: pl.LightningModule) -> Iterator[str]:
    after = _state_of(module)
    for name, value in before.items():
        if after[name] != value:
            yield f"{name}: {value} became {after[name]}"
    if "training_step" in vars(module):
        yield "training_step is patched"
