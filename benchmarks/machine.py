"""The machine and the versions that the figures of `make bench` and `make bench-gpu` belong to."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path

import torch

PACKAGES = ("torch", "torchvision", "lightning", "timm", "torchmetrics", "huggingface_hub", "numpy", "scipy")


def processor() -> str:
    """Return the name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def main() -> None:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"{processor()}, {os.cpu_count()} cores, {memory:.0f} GiB; load before the run {load}")
    for index in range(torch.cuda.device_count()):
        print(f"{torch.cuda.get_device_name(index)}, CUDA {torch.version.cuda}")
    print(f"{platform.system()} {platform.release()}, Python {platform.python_version()}")
    print(", ".join(f"{name} {version(name)}" for name in PACKAGES))


if __name__ == "__main__":
    main()
