"""What a frozen teacher says about every training image, computed once and kept on the disk.

A teacher that always sees the same images always gives the same features and logits. After one pass over the training data
they come from a file that is mapped into memory, and the teacher is needed no more. That holds for a training transform
without randomness only, so a random one is refused; crops and flips need the teacher itself.

Training batches have to say which samples they hold: ``with_index=True`` of the zoo's data modules, or
`zoo.data.indexed.IndexedDataset` around any other data set.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

import zoo
from zoo import transport
from zoo.errors import InputError, require_choice
from zoo.metrics import ClassMeans
from zoo.stored_config import read_config
from zoo.teacher_file import TeacherFacts, building, commit, map_tensors, partial_path, read_facts, to_rows, write_rows
from zoo.towers import Tower, has_weights
from zoo.training_samples import Share, TrainingSamples, check_indexed

__all__ = ["TeacherCache"]

_CHUNK = 4096
_HASH = re.compile("[0-9a-f]{64}")


class TeacherCache:
    """Features and logits of a frozen teacher for every training sample, in a file that is mapped and not loaded.

    It pickles as its path, so that it may go to other processes. Made by `build` or `open`.

    Args:
        path: the file.

    Raises:
        InputError: the file is no teacher cache, or not whole.

    Attributes:
        path: the file, absolute.
        facts: what it was computed from.

    Example:
        >>> import tempfile
        >>> from zoo import towers
        >>> from zoo.data import DigitsDataModule
        >>> data = DigitsDataModule(with_index=True)
        >>> teacher = towers.create("zoo/resnet8", num_classes=10, in_chans=1, frozen=True)
        >>> path = tempfile.mkdtemp() + "/teacher.safetensors"
        >>> cache = TeacherCache.build(path, teacher, data.train_dataloader(), progress=False)
        >>> images, targets, index = next(iter(data.train_dataloader()))
        >>> features, logits = cache.lookup(index, targets)
        >>> bool(torch.isclose(logits, teacher(images), atol=1e-5).all()), len(cache), features.shape
        (True, 1259, torch.Size([64, 64]))
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).absolute()
        self.facts = read_facts(self.path)
        self._tensors = map_tensors(self.path, self.facts)

    def __len__(self) -> int:
        return self.facts.samples

    def __reduce__(self) -> tuple[type[TeacherCache], tuple[str]]:
        return type(self), (str(self.path),)

    @property
    def dim(self) -> int:
        """Width D of the features."""
        return self.facts.dim

    @property
    def num_classes(self) -> int:
        """Number of logits K."""
        return self.facts.num_classes

    @property
    def tower_facts(self) -> dict[str, Any]:
        """Name, revision and fingerprint of the teacher, as `zoo.hub.tower_facts` states them."""
        return {"name": self.facts.teacher, "revision": self.facts.revision, "sha256": self.facts.sha256}

    @classmethod
    def open(cls, path: str | Path) -> TeacherCache:
        """Open a cache; `check_teacher` and `check_data` say whether it is the right one.

        Args:
            path: the file.

        Raises:
            InputError: it is no teacher cache, of another version, damaged, or not whole.
        """
        return cls(path)

    @classmethod
    def build(
        cls,
        path: str | Path,
        tower: Tower,
        source: Trainer | DataLoader[Any],
        *,
        dtype: str = "float32",
        options: Mapping[str, Any] | None = None,
        progress: bool = True,
    ) -> TeacherCache:
        """Run the teacher over the training data, each sample once, and keep what it says.

        The teacher computes under the autocast that is active around the call. Memory is needed for one batch, the disk
        holds N · (D + K) numbers. In a distributed run all processes call this, and all of them see one file system;
        batch b is the work of process b mod W, so that the file does not depend on W. The random generators are as before
        afterwards. An older cache at this path stays until the new one takes its place.

        The values of a row are those of a forward pass over the batch that it was computed in; another composition of the
        batch may round differently in the last bits, as it would without a cache.

        Args:
            path: the file; missing folders are created.
            tower: the frozen teacher.
            source: the training loader, or the trainer that is about to fit; of the loader the data set, the batch size
                and the worker options count, not its order.
            dtype: ``"float32"``, or ``"float16"`` for half the space (11 bits of precision).
            options: what else the teacher was built with, such as options of its architecture: JSON values, to be
                compared by `check_teacher`.
            progress: show a progress bar, in the first process.

        Returns:
            The cache, in every process.

        Raises:
            InputError: the transform is random, the data have no positions or no integer labels, the teacher's outputs are
                not finite or do not fit into ``dtype``, the file cannot be written, or another run is building it.
        """
        if not tower.frozen:
            raise InputError("a teacher cache needs a frozen teacher: build it with towers.create(…, frozen=True)")
        require_choice("dtype", dtype, ("float32", "float16"))
        path = Path(path).absolute()
        data = TrainingSamples(source, next(tower.parameters()).device)
        with isolate_rng():
            facts = TeacherFacts(
                teacher=tower.name,
                revision=tower.revision,
                sha256=tower.fingerprint,
                stored_sha256=_stored_sha256(tower.name),
                options=_as_text(options),
                samples=data.samples,
                dim=tower.dim,
                num_classes=tower.num_classes,
                dtype=dtype,
                precision=_precision(tower),
                probes=data.probes(),
                zoo_version=zoo.__version__,
            )
            data.check_moved()
            rank, _ = _process()
            with ExitStack() as stack:
                first = rank == 0
                _together((lambda: stack.enter_context(building(path, facts))) if first else None)
                bar = progress and first and data.shows_progress
                _together(lambda: _fill(path, facts, tower, data, progress=bar))
                _together((lambda: commit(path, facts)) if first else None)
        return cls(path)

    def lookup(
        self, indices: Tensor, targets: Tensor | None = None, *, pin_memory: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Return what the teacher says about some samples.

        Args:
            indices: positions in the training data set (B,), integers on the CPU.
            targets: labels of the same samples (B,) on the CPU; compared with those of the cache, which reveals another
                order of the data at the first batch.
            pin_memory: return page-locked memory, which can be copied to a GPU without waiting.

        Returns:
            Features (B, D) and logits (B, K), float32, on the CPU.

        Raises:
            InputError: an index is outside 0 … N - 1, or the labels are others than in the cache.
        """
        if indices.device.type != "cpu" or indices.ndim != 1 or indices.is_floating_point():
            raise InputError(
                f"index must be integers (B,) on the CPU, got {indices.dtype} {tuple(indices.shape)} on {indices.device}: "
                "look up before the batch is moved to the device"
            )
        positions = indices.numpy()
        if len(positions) and not 0 <= positions.min() <= positions.max() < len(self):
            raise InputError(
                f"index must be in 0 … {len(self) - 1}, the samples in {self.path}, got {positions.min()} … "
                f"{positions.max()}: the training data have grown or are others; delete the cache to build it anew"
            )
        if targets is not None:
            known = self._tensors["labels"][positions]
            if targets.shape != indices.shape or bool((known != targets.numpy()).any()):
                raise InputError(
                    f"the labels of a batch are not those that {self.path} has at its positions: the training data are "
                    "in another order, or others; delete the cache to build it anew"
                )
        return self._rows("features", positions, pin=pin_memory), self._rows("logits", positions, pin=pin_memory)

    def _rows(self, name: str, positions: np.ndarray[Any, Any], *, pin: bool) -> Tensor:
        table = self._tensors[name]
        shape = (len(positions), table.shape[1])
        rows = torch.empty(shape, pin_memory=pin)
        # "clip" keeps numpy from gathering into a buffer of its own first; the positions are in range.
        if self.facts.dtype == "float32":
            table.take(positions, axis=0, out=rows.numpy(), mode="clip")
            return rows
        return rows.copy_(torch.from_numpy(table.take(positions, axis=0)))

    def check_teacher(self, teacher: Tower | str, options: Mapping[str, Any] | None = None) -> None:
        """Refuse a cache of another teacher.

        A name is compared without building the network: a stored zoo model by the weights in its folder, weights of timm
        and torchvision by their name.

        Args:
            teacher: the frozen teacher, its fingerprint (64 hexadecimal digits), or its tower name.
            options: what `build` was given.

        Raises:
            InputError: the teacher is another one, or is the name of a bare architecture, which says nothing of weights.
        """
        theirs: str | None = self.facts.sha256
        if isinstance(teacher, Tower):
            ours = teacher.fingerprint
        elif _HASH.fullmatch(teacher):
            ours = teacher
        elif not has_weights(teacher):
            raise InputError(
                f"{teacher!r} is a bare architecture with random weights, which never come out the same: {self.path} can "
                "stand for a teacher with weights only"
            )
        else:
            stored = _stored_sha256(teacher)
            ours = teacher if stored is None else stored
            theirs = self.facts.teacher if stored is None else self.facts.stored_sha256
        if ours != theirs:
            raise InputError(
                f"{self.path} holds another teacher: {_shown(self.facts.teacher, theirs)}, expected "
                f"{_shown(teacher.name if isinstance(teacher, Tower) else teacher, ours)}; give another path, or delete it"
            )
        if _as_text(options) != self.facts.options:
            raise InputError(
                f"{self.path} holds the teacher with options {self.facts.options}, expected {_as_text(options)}; give "
                "another path, or delete it"
            )

    def check_data(self, source: Trainer | DataLoader[Any]) -> None:
        """Refuse training data that are not those of the cache: number, labels, order, images and transform.

        Up to 64 samples are read, evenly spaced, with the random generators as before afterwards. `lookup` compares the
        labels of the others.

        Args:
            source: as for `build`; its batches must be triples ``(x, targets, index)``.

        Raises:
            InputError: something differs; the message says what. Or the batches have no index.
        """
        data = TrainingSamples(source, None)
        again = f"; give another path, or delete {self.path} to build it anew"
        if data.samples != len(self):
            raise InputError(f"{self.path} holds {len(self)} samples, the training data have {data.samples}{again}")
        with isolate_rng():
            probes = data.probes(with_index=True)
        pairs = list(zip(probes, self.facts.probes, strict=True))
        labels = [(ours, theirs) for ours, theirs in pairs if ours[1] != theirs[1]]
        if labels:
            (row, label, _), (_, known, _) = labels[0]
            raise InputError(
                f"{len(labels)} of {len(pairs)} labels are not those of {self.path} (sample {row} has {label}, there "
                f"{known}): other training data, or the same in another order{again}"
            )
        images = [ours[0] for ours, theirs in pairs if ours[2] != theirs[2]]
        if images:
            raise InputError(
                f"{len(images)} of {len(pairs)} images are not those of {self.path} (the first is sample {images[0]}), "
                f"their labels are: another transform, size or normalisation, or the data in another order{again}"
            )
        with isolate_rng():
            data.check_moved()

    def class_means(self) -> tuple[Tensor, Tensor]:
        """Average the cached features by class: what `zoo.class_means.compute_class_means` gives with ``views=1``.

        In a distributed run every process reads its share, and all of them have to call this.

        Returns:
            Means (K, D), float64, zero for classes without samples, and counts (K,), int64, on the CPU.
        """
        metric = ClassMeans(self.num_classes, self.dim)
        rank, world = _process()
        for first in range(rank * _CHUNK, len(self), world * _CHUNK):
            rows = torch.arange(first, min(first + _CHUNK, len(self)))
            metric.update(self.lookup(rows)[0], torch.from_numpy(self._tensors["labels"][rows.numpy()]))
        means: Tensor = metric.compute()
        return means, metric.counts


@torch.no_grad()
def _fill(path: Path, facts: TeacherFacts, tower: Tower, data: TrainingSamples, *, progress: bool) -> None:
    """Write this process's share of the rows."""
    rank, world = _process()
    share = Share(data.samples, data.batch_size, rank=rank, world=world)
    with (
        partial_path(path).open("r+b", buffering=0) as file,
        tqdm(total=len(share), desc="teacher cache", leave=False, disable=not progress) as bar,
    ):
        for rows, batch in zip(share, data.read(share, workers=True), strict=True):
            check_indexed(batch, rows, required=False)
            outputs = tower.features_and_logits(data.moved(batch))
            values = {"labels": batch[1].to(torch.int64).numpy()}
            for name, output in zip(("features", "logits"), outputs, strict=True):
                values[name] = to_rows(output, name, facts, first=rows[0])
            write_rows(file, facts, rows[0], values)
            bar.update()
        os.fsync(file.fileno())


def _process() -> tuple[int, int]:
    """Return rank and number of processes."""
    joint = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if joint else (0, 1)


def _together(work: Callable[[], Any] | None) -> None:
    """Do this process's part; go on when all have done theirs, and fail in all processes if it failed in one.

    Raises:
        InputError: a part failed.
    """
    failure: str | None = None
    own: Exception | None = None
    try:
        if work is not None:
            work()
    except (InputError, OSError) as error:
        own, failure = error, str(error)
    _, world = _process()
    failures: list[str | None] = [failure]
    if world > 1:
        failures = [None] * world
        dist.all_gather_object(failures, failure)
    if isinstance(own, InputError):
        raise own
    for place, message in enumerate(failures):
        if message is not None:
            where = f" in process {place}" if world > 1 else ""
            raise InputError(f"the teacher cache could not be built{where}: {message}") from own


def _precision(tower: Tower) -> str:
    parameter = next(tower.parameters())
    kind = parameter.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else parameter.dtype
    return str(dtype).removeprefix("torch.")


def _stored_sha256(name: str | None) -> str | None:
    """Return the SHA-256 of the weights in a stored model's folder; None for any other tower name."""
    if name is None or not name.startswith((".", "/", "~", "hf://")):
        return None
    sha256: str = read_config(transport.resolve(name)[0])["weights"]["sha256"]
    return sha256


def _as_text(options: Mapping[str, Any] | None) -> str:
    try:
        return json.dumps(dict(options or {}), sort_keys=True)
    except TypeError as error:
        raise InputError(f"the teacher's options must be JSON values: {error}") from error


def _shown(name: str | None, identity: str | None) -> str:
    if identity is not None and _HASH.fullmatch(identity):
        return f"{name} with SHA-256 {identity[:12]}…" if name not in {identity, None} else f"SHA-256 {identity[:12]}…"
    return name or "a module without a name"
