"""Training runs with PushToHub, each in a process of its own that costs no imports: a server forks them.

``python -m tests.push_runs`` reads one order a line (JSON) and forks a process for it, which runs :func:`fit`,
:func:`load` or :func:`zoo` and can stop at a given place until it is told to go on, or is killed there. :class:`Runs` is
the other end.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from tests.hub_fixtures import client_environment
from tests.hub_server import HubServer

__all__ = ["Runs"]


class Runs:
    """Start runs that see ``server`` as the Hub.

    Args:
        server: the Hub.
        folder: where answers and what the runs print are kept.
        figures: draw the figures of the cards, which is most of what a version of so small a network costs.
    """

    def __init__(self, server: HubServer, folder: Path, *, figures: bool = True) -> None:
        root = Path(__file__).parents[1]
        self.folder = folder
        self.figures = figures
        self.printed = ""
        environment = client_environment(server, home=folder / "home", extra_env={"PYTHONPATH": str(root)})
        command = [sys.executable, "-W", "ignore", "-m", "tests.push_runs"]
        self._process = subprocess.Popen(
            command, env=environment, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        self._pid = 0
        self._count = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def __call__(self, job: str, *, token: str | None = "hf_local", **options: Any) -> Any:
        """Run a job to its end and return its answer."""
        self.start(job, token=token, **options)
        return self.finish()

    def start(self, job: str, *, token: str | None = "hf_local", **options: Any) -> None:
        """Start a job."""
        self._count += 1
        self._answer = self.folder / f"answer-{self._count}.json"
        self._output = self.folder / f"output-{self._count}.txt"
        order = {"job": job, "token": token, "answer": str(self._answer), "output": str(self._output)}
        self._say({**order, "figures": self.figures, "options": options})
        self._pid = self._hear()["pid"]

    def reach(self, place: str) -> None:
        """Wait until the run stops at ``place``."""
        assert self._hear() == {"at": place}

    def go_on(self) -> None:
        """Let it go on."""
        self._say("go")

    def kill(self) -> None:
        """SIGKILL the run."""
        os.kill(self._pid, 9)
        assert self._hear() == {"status": 9}
        self.printed = self._output.read_text()

    def finish(self) -> Any:
        """Wait for the end of the run and return its answer; ``printed`` is what it wrote."""
        status = self._hear()
        self.printed = self._output.read_text()
        assert status == {"status": 0}, f"{status}\n{self.printed}"
        return json.loads(self._answer.read_text())

    def _say(self, message: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message) + "\n")

    def _hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the server of the runs has ended"
        return json.loads(line)


# -- in the forked process -------------------------------------------------------------------------------------------


def _serve() -> None:
    # Pauses between tries are for real networks; the client and the zoo take this function when they are imported.
    time.sleep = lambda seconds: None
    import tempfile

    # What the runs would import, each anew.
    import sklearn.datasets
    import torch
    import zoo.callbacks.push_to_hub
    import zoo.lightning_modules.classifier

    import zoo.data  # noqa: F401
    from zoo import model_card

    sklearn.datasets.load_digits()
    with tempfile.TemporaryDirectory() as folder:
        model_card.write_figures({"val/score": [[0, 0.0], [1, 1.0]]}, Path(folder))
    torch.set_num_threads(1)
    while line := _read():
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os._exit(_run(order))
        _write({"pid": pid})
        _write({"status": os.waitpid(pid, 0)[1]})


def _run(order: dict[str, Any]) -> int:
    output = os.open(order["output"], os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 2)
    os.environ.pop("HF_TOKEN", None)
    if order["token"] is not None:
        os.environ["HF_TOKEN"] = order["token"]
    if not order["figures"]:
        from zoo import model_card

        model_card.write_figures = lambda history, folder: []
    try:
        answer = {"fit": fit, "load": load, "zoo": zoo}[order["job"]](**order["options"])
        Path(order["answer"]).write_text(json.dumps(answer))
    except BaseException:  # noqa: BLE001 - the test prints it
        traceback.print_exc()
        sys.stderr.flush()
        return 1
    sys.stderr.flush()
    return 0


def stop(place: str) -> None:
    """Say where the run is, and wait to be told to go on."""
    _write({"at": place})
    _read()


def _write(message: Any) -> None:
    os.write(1, (json.dumps(message) + "\n").encode())


def _read() -> str:
    """Read one line and nothing beyond it: the next one may be for another process."""
    line = b""
    while not line.endswith(b"\n") and (byte := os.read(0, 1)):
        line += byte
    return line.decode()


def load(sources: list[str]) -> list[str]:
    """Return the fingerprints of the weights of stored models."""
    from zoo import hub, towers

    return [towers.fingerprint(hub.from_pretrained(source)) for source in sources]


def zoo(words: list[str]) -> int:
    """Run a zoo command."""
    from zoo import cli

    sys.argv = ["zoo", *words]
    os.dup2(2, 1)
    try:
        cli.main()
    except SystemExit as error:
        return int(error.code or 0)
    return 0


def fit(
    folder: str,
    push: list[dict[str, Any]],
    *,
    scores: Sequence[float | None] = (),
    epochs: int = 3,
    resume: bool = False,
    plain: bool = False,
    stop_after: Sequence[int] = (),
    stop_in: tuple[str, str, int] | None = None,
    nan_in: int | None = None,
    silence: float | None = None,
    **trainer_options: Any,
) -> dict[str, Any]:
    """Train a small network on the digits.

    Args:
        folder: of the run.
        push: arguments of each PushToHub; none for the control.
        scores: ``val/score`` of each epoch; None logs none.
        epochs: the number of epochs.
        resume: from the last checkpoint.
        plain: a LightningModule that is no component of the zoo.
        stop_after: epochs after which the run stops until it is told to go on.
        stop_in: module, function and number of the call before which it stops.
        nan_in: the epoch after which a weight is not a number.
        silence: seconds after which a silent connection is given up.
        trainer_options: arguments of the trainer.
    """
    import lightning.pytorch as pl
    import torch
    from lightning.pytorch.callbacks import ModelCheckpoint
    from zoo.callbacks.push_to_hub import PushToHub
    from zoo.lightning_modules.classifier import Classifier

    from tests import push_parts
    from zoo import hub_client, towers
    from zoo.data import DigitsDataModule
    from zoo.errors import InputError

    if silence is not None:
        hub_client.SILENCE_SECONDS = silence
    if stop_in is not None:
        push_parts.stop_before(*stop_in, stop)
    pl.seed_everything(0, verbose=False)
    classifier = Classifier("zoo/resnet8", 10, student_options={"in_chans": 1})
    model = push_parts.Plain(classifier.student) if plain else classifier
    callbacks = [PushToHub(**options) for options in push]
    parts = [push_parts.Scores(folder, scores, nan_in), push_parts.Stops(stop_after, stop)]
    checkpoint = ModelCheckpoint(f"{folder}/checkpoints", monitor="val/score", mode="max", save_last=True)
    trainer = pl.Trainer(
        default_root_dir=folder,
        max_epochs=epochs,
        callbacks=[parts[0], *callbacks, parts[1], checkpoint],
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=1,
        log_every_n_steps=1,
        **{"devices": 1, **trainer_options},
    )
    data = DigitsDataModule(train_samples=32, batch_size=16)
    path = f"{folder}/checkpoints/last.ckpt" if resume else None
    error = None
    try:
        trainer.fit(model, data, ckpt_path=path, weights_only=True)
    except InputError as refused:
        error = str(refused)
    return {
        "error": error,
        "steps": trainer.global_step,
        "weights": towers.fingerprint(dict(model.state_dict())),
        "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
        "random": torch.rand(1).item(),
        "best": [callback.best for callback in callbacks],
    }


if __name__ == "__main__":
    _serve()
