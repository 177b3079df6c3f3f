"""What it costs to begin: ``import zoo``, ``zoo list``, and ``zoo fit --help`` against a bare LightningCLI.

    python benchmarks/startup.py [--rounds 5]

Each is a process of its own, with the files in the system's cache; the medians of ``--rounds``, in turn. ``import zoo`` is
what the statement takes within a running interpreter, by its clock. The commands are measured from their start to their end,
the interpreter included, in seconds of the processor, which other processes of the machine disturb less. The bare
LightningCLI has a LightningModule with one argument and the zoo's digits: ``fit --help`` of LightningCLI as everyone has it.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import statistics
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console
from structure import table, verdict

IMPORT_TARGET, LIST_TARGET, HELP_TARGET = 0.05, 1.0, 1.2
IMPORT = "import time; t = time.perf_counter(); import zoo; print(time.perf_counter() - t)"
BARE = """
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LightningCLI

class Model(LightningModule):
    def __init__(self, width: int = 8) -> None:
        '''A model.

        Args:
            width: of it.
        '''
        super().__init__()

if __name__ == "__main__":
    LightningCLI(Model, subclass_mode_model=False)
"""


def seconds_of(words: list[str], cwd: Path | None = None) -> float:
    """Return the processor seconds of a process and its children."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL, cwd=cwd)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def import_seconds() -> float:
    """Return what ``import zoo`` takes in a fresh interpreter."""
    answer = subprocess.run([sys.executable, "-c", IMPORT], check=True, stdout=subprocess.PIPE, text=True)
    return float(answer.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description="What it costs to begin")
    parser.add_argument("--rounds", type=int, default=5, help="processes of each kind, of which the medians are taken")
    rounds = parser.parse_args().rounds
    os.environ["OMP_NUM_THREADS"] = "1"
    python = [sys.executable, "-W", "ignore"]
    with TemporaryDirectory() as folder:
        script = Path(folder, "bare.py")
        script.write_text(BARE)
        commands = {
            "python -c pass": [*python, "-c", "pass"],
            "zoo list": [*python, "-m", "zoo", "list"],
            "zoo show NDDistillation": [*python, "-m", "zoo", "show", "NDDistillation"],
            "LightningCLI fit --help": [*python, str(script), "fit", "--help"],
            "zoo fit --help": [*python, "-m", "zoo", "fit", "--help"],
        }
        taken: dict[str, list[float]] = {name: [] for name in ("import zoo", *commands)}
        for index in range(rounds + 1):
            found = {"import zoo": import_seconds()}
            found |= {name: seconds_of(words, Path(folder)) for name, words in commands.items()}
            for name, value in found.items():
                if index:  # the first one fills the caches
                    taken[name].append(value)
    median = {name: statistics.median(values) for name, values in taken.items()}
    ratio = median["zoo fit --help"] / median["LightningCLI fit --help"]
    targets = {
        "import zoo": verdict(median["import zoo"] < IMPORT_TARGET, f"< {1e3 * IMPORT_TARGET:.0f} ms"),
        "zoo list": verdict(median["zoo list"] < LIST_TARGET, f"< {LIST_TARGET:.0f} s"),
        "zoo fit --help": verdict(ratio <= HELP_TARGET, f"<= {HELP_TARGET} of LightningCLI's"),
    }
    made = table(f"Python {platform.python_version()}, medians of {rounds} processes", "", "seconds", "ratio", "target")
    for name, value in median.items():
        shown = f"{ratio:.2f}" if name == "zoo fit --help" else ""
        made.add_row(name, f"{value:.3f}", shown, targets.get(name, ""))
    Console(width=140).print(made)


if __name__ == "__main__":
    main()
