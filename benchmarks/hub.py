"""The stored format: size, time and memory against torch.save and PyTorchModelHubMixin; what PushToHub costs a run.

    python benchmarks/hub.py

Each measurement runs in a process of its own; ratios are between rows of one run. Peak memory of a load is what the process
holds at most (resident, files that are mapped included) beyond what it held before, as a multiple of the stored weights.
PushToHub talks to the Hub of tests/hub_server on loopback; the time it adds is that of its hooks in the training thread.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
KINDS = {
    "distilled": "student resnet18, frozen teacher resnet50",
    "trained": "everything trained, resnet50",
}
FORMATS = ("zoo", "torch.save", "mixin")


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def build(kind: str) -> Any:
    import torch

    import zoo

    torch.manual_seed(0)
    if kind == "tiny":
        model = zoo.NDDistillation("timm/resnet10t", "timm/resnet10t", 10)
    elif kind == "trained":
        model = zoo.Classifier("timm/resnet50", 1000)
    else:
        model = zoo.NDDistillation("timm/resnet18", "timm/resnet50", 1000)
    model.example_shape = (3, 64, 64)
    return model


def mixin_of(kind: str) -> Any:
    """The same networks in a LightningModule with PyTorchModelHubMixin, which stores whatever it holds."""
    import lightning.pytorch as pl
    import timm
    from huggingface_hub import PyTorchModelHubMixin

    class Mixed(pl.LightningModule, PyTorchModelHubMixin):
        def __init__(self, kind: str = kind) -> None:
            super().__init__()
            self.student = timm.create_model("resnet50" if kind == "trained" else "resnet18")
            self.teacher = None if kind == "trained" else timm.create_model("resnet50").requires_grad_(False)

    return Mixed()


def child(action: str, kind: str, form: str, folder: str) -> None:
    """Save or load once and print seconds, bytes and peak memory."""
    import torch

    import zoo

    path = Path(folder, f"{kind}-{form}")
    torch.set_num_threads(1)
    saving = action == "save"
    with tempfile.TemporaryDirectory() as warm:  # imports and first calls are not what is compared
        zoo.from_pretrained(build("tiny").save_pretrained(warm))
        mixin_of("tiny")
    model = mixin_of(kind) if form == "mixin" else build(kind) if saving else None
    mixin = type(model)
    if not saving:
        del model
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # memory that was freed must not hide what the load takes
        Path("/proc/self/clear_refs").write_text("5")  # start the peak anew
    before, start = resident(), time.perf_counter()
    if form == "torch.save":
        torch.save(model, path) if saving else torch.load(path, weights_only=False)
    elif form == "zoo":
        model.save_pretrained(path) if saving else zoo.from_pretrained(path)
    else:
        model.save_pretrained(path) if saving else mixin.from_pretrained(path)
    seconds = time.perf_counter() - start
    size = sum(file.stat().st_size for file in path.rglob("*")) if path.is_dir() else path.stat().st_size
    print(json.dumps({"seconds": seconds, "bytes": size, "peak": peak() - before}))


def measure(action: str, kind: str, form: str, folder: str) -> dict[str, float]:
    command = [sys.executable, "-W", "ignore", __file__, action, kind, form, folder]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(result.stderr)
    answer: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    return answer


def pushing(folder: str) -> None:
    """Train with PushToHub against the loopback Hub, and print the share of its hooks in an epoch."""
    import lightning.pytorch as pl
    import torch

    import zoo

    torch.set_num_threads(1)

    class Timed(zoo.PushToHub):
        spent: list[float] = []  # noqa: RUF012 - one instance

        def _stage(self, *args: Any) -> None:
            start = time.perf_counter()
            super()._stage(*args)
            self.spent.append(time.perf_counter() - start)

    class Epochs(pl.Callback):
        marks: list[float] = []  # noqa: RUF012 - one instance

        def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            self.marks.append(time.perf_counter())

    push = Timed("me/bench", on="last", folder=f"{folder}/staged")
    epochs = Epochs()
    model = zoo.Classifier("timm/resnet18", 10)
    trainer = pl.Trainer(
        max_epochs=4, limit_train_batches=20, limit_val_batches=1, callbacks=[push, epochs], logger=False, accelerator="cpu",
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(model, zoo.DigitsDataModule(image_size=32, channels=3))
    lengths = [b - a for a, b in zip(epochs.marks, epochs.marks[1:], strict=False)]
    print(json.dumps({"staging": statistics.median(push.spent), "epoch": statistics.median(lengths)}))


def main() -> None:
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        table = Table("model", "format", "save, s", "load, s", "MiB", "peak of load / weights", title="stored format")
        for kind, text in KINDS.items():
            for form in FORMATS:
                saved, loaded = measure("save", kind, form, folder), measure("load", kind, form, folder)
                table.add_row(
                    text, form, f"{saved['seconds']:.2f}", f"{loaded['seconds']:.2f}", f"{saved['bytes'] / 2**20:.1f}",
                    f"{loaded['peak'] / saved['bytes']:.2f}",
                )  # fmt: skip
        console.print(table)
        sys.path.insert(0, str(ROOT))
        from tests.hub_server import HubServer

        with HubServer(Path(folder, "hub")) as server:
            environment = {**os.environ, **server.environment("hf_local"), "HF_HOME": f"{folder}/home"}
            environment.pop("HF_HUB_OFFLINE", None)
            command = [sys.executable, "-W", "ignore", __file__, "push", folder]
            result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if result.returncode:
            raise RuntimeError(result.stderr)
        spent = json.loads(result.stdout.splitlines()[-1])
        console.print(
            f"PushToHub, resnet18 (45 MiB), a version an epoch: {1e3 * spent['staging']:.0f} ms in the training thread of "
            f"an epoch of {spent['epoch']:.1f} s ({spent['staging'] / spent['epoch']:.2%}); no step waits for the network"
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["push"]:
        pushing(sys.argv[2])
    elif len(sys.argv) > 1:
        child(*sys.argv[1:5])
    else:
        main()
