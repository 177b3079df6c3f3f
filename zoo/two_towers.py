"""What the contrastive methods share: two towers, a learned scale, zero-shot and retrieval in validation.

One tower, called *frozen*, gives the geometry; the other, *trained*, learns to land beside it. A batch is a dict of tensors
by modality ("image", "text", …), with "label" and "id" where the data have them, as the data modules of pairs give it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zoo import towers
from zoo.encoder import Encoder
from zoo.errors import InputError, require_choice
from zoo.features import FeatureTap, OutputTap
from zoo.module import ZooModule
from zoo.open_clip_networks import build_tokenizer
from zoo.pair_evaluation import PairEvaluation, unit

__all__ = ["TwoTowerModule"]


class TwoTowerModule(ZooModule):
    """Two towers and a scale; a subclass says what the loss of a batch is.

    The frozen tower stays in eval mode and its weights get no gradient. If they have a public name (timm, torchvision,
    open_clip with a tag, a stored model on the Hub) they are not stored with the model; otherwise they are.

    Logged: ``train/loss``, ``train/scale``; in validation ``val/loss``, ``val/retrieval/{a}_to_{b}/r{k}`` and
    ``…/median_rank``, ``val/structure`` (Spearman correlation between the pairwise cosines of the trained embeddings and of
    the frozen features), and ``val/zero_shot/{name}`` where one modality is text and the data module has
    ``zero_shot_prompts()``: name -> prompts of each class; the batch needs "label" then. The same under ``test/``.

    Args:
        trained: the tower that is trained: a tower name or a module with ``output_dim``.
        frozen: the tower that gives the geometry.
        trained_modality: key of its inputs in a batch.
        frozen_modality: key of the frozen tower's inputs.
        locked: keep the frozen tower as it is; otherwise both are trained.
        embed_dim: width of the common space; that of the frozen tower, which then needs no head, if omitted.
        trained_options: options for the builder of a named tower.
        frozen_options: the same for the frozen tower.
        init_scale: start of the scale, the inverse temperature.
        max_scale: bound of the scale.
        learn_scale: learn its logarithm.
        k: the k of the retrieval metrics.
        chunk_size: tile of the loss; the engine chooses if omitted.
        lr: learning rate of the default optimizer, AdamW.
        weight_decay: its weight decay; biases, norms and the scale have none.
        lr_warmup_share: share of the steps in which the learning rate grows linearly, before it falls as a cosine to 0.
    """

    deployable = "trained"
    stored_towers = ("frozen",)

    def __init__(
        self,
        *,
        trained: str | dict[str, Any] | nn.Module,
        frozen: str | dict[str, Any] | nn.Module,
        trained_modality: str,
        frozen_modality: str,
        locked: bool,
        embed_dim: int | None,
        trained_options: dict[str, Any] | None,
        frozen_options: dict[str, Any] | None,
        init_scale: float,
        max_scale: float,
        learn_scale: bool,
        k: Sequence[int],
        chunk_size: int | None,
        lr: float,
        weight_decay: float,
        lr_warmup_share: float,
    ) -> None:
        super().__init__()
        _check_numbers(
            trained_modality=trained_modality, frozen_modality=frozen_modality, init_scale=init_scale, max_scale=max_scale,
            embed_dim=embed_dim, lr_warmup_share=lr_warmup_share,
        )  # fmt: skip
        self.trained_modality = trained_modality
        self.frozen_modality = frozen_modality
        self.locked = locked
        self.chunk_size = chunk_size
        self.max_scale = max_scale
        self.lr = lr
        self.weight_decay = weight_decay
        self.lr_warmup_share = lr_warmup_share

        geometry = _create(frozen, frozen_modality, "frozen_options", frozen_options, locked=locked)
        tower = _create(trained, trained_modality, "trained_options", trained_options, locked=False)
        dim = geometry.dim if embed_dim is None else embed_dim
        self.trained = Encoder(tower, dim)
        self.frozen: towers.Tower | Encoder
        self.frozen_projection: nn.Module = nn.Identity()
        if not locked:
            self.frozen = Encoder(geometry, dim)
        else:
            if geometry.dim != dim:
                self.frozen_projection = nn.Linear(geometry.dim, dim, bias=False)
            if towers.has_public_weights(frozen):
                self.attach_frozen("frozen", geometry)
            else:
                self.frozen = geometry
        named = {trained_modality: trained, frozen_modality: frozen}
        self._clip_names = {
            modality: name if isinstance(name, str) and name.startswith("open_clip/") else None
            for modality, name in named.items()
        }
        self.log_scale = nn.Parameter(torch.tensor(math.log(init_scale)), requires_grad=learn_scale)

        self.evaluation = PairEvaluation((frozen_modality, trained_modality), ["structure"], k)

    # -- embeddings ------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        """Return the unit embeddings (B, D) of the trained modality."""
        return unit(self.trained(x))

    def encode(self, modality: str, x: Tensor | list[str]) -> Tensor:
        """Return unit embeddings, float32.

        Args:
            modality: ``trained_modality`` or ``frozen_modality``.
            x: inputs (B, …) of that tower, or texts where it reads text.

        Returns:
            (B, D), of length 1, or 0 where the tower gives zeros; with a gradient if the tower is trained.

        Raises:
            InputError: there is no such modality, or texts for a tower that reads none.
        """
        known = (self.trained_modality, self.frozen_modality)
        require_choice("modality", modality, known)
        trained = modality == self.trained_modality
        if not isinstance(x, Tensor):
            x = self._tokens(self.trained if trained else self.frozen, modality, x)
        if trained:
            embeddings: Tensor = self(x)
            return embeddings
        return self._frozen_pair(x)[1]

    def encode_image(self, x: Tensor) -> Tensor:
        """Return unit embeddings (B, D) of images (B, C, H, W)."""
        return self.encode("image", x)

    def encode_text(self, x: Tensor | list[str]) -> Tensor:
        """Return unit embeddings (B, D) of tokens (B, L), or of a list of texts."""
        return self.encode("text", x)

    def _frozen_pair(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the frozen tower says (B, D_r), a constant, and its unit embedding (B, D)."""
        if not self.locked:
            embedding = self.frozen(x)
            return embedding.detach(), unit(embedding)
        assert isinstance(self.frozen, towers.Tower)
        # Its weights are frozen: there is a graph only where the inputs have one, as under an attack.
        features = self.frozen.features(x)
        return features.detach(), unit(self.frozen_projection(features))

    def _tokens(self, tower: nn.Module, modality: str, texts: list[str]) -> Tensor:
        network = tower.network if isinstance(tower, towers.Tower) else tower
        length = getattr(network, "context_length", None)
        if length is None:
            raise InputError(f"the {modality} tower reads no text: it has no context_length; give its tensors")
        return build_tokenizer(self._clip_names[modality], int(length))(texts).to(self.device)

    def example_input(self, generator: torch.Generator) -> Tensor | None:
        """Return one seeded input of the trained tower: tokens where it reads text, else as `ZooModule` does."""
        vocabulary = getattr(self.trained, "vocab_size", None)
        if self.example_shape is None or vocabulary is None:
            return super().example_input(generator)
        return torch.randint(0, vocabulary, (1, *self.example_shape), generator=generator)

    # -- fit -------------------------------------------------------------------------------------------------------

    def batch_loss(self, trained: Tensor, frozen: Tensor, features: Tensor) -> Tensor:
        """Return the loss of a batch.

        Args:
            trained: unit embeddings (B, D) of the trained tower.
            frozen: unit embeddings (B, D) of the frozen tower.
            features: what the frozen tower said (B, D_r), a constant.
        """
        raise NotImplementedError

    @property
    def scale(self) -> Tensor:
        """The scale of the cosines, a scalar in float32 (float64 stays) with its gradient."""
        wide = self.log_scale if self.log_scale.dtype == torch.float64 else self.log_scale.float()
        return wide.exp()

    @property
    def spans_processes(self) -> bool:
        """Whether the loss has to gather the batches of several processes."""
        return self._trainer is not None and self.trainer.training and self.trainer.world_size > 1

    def setup(self, stage: str) -> None:
        """Keep the feature hooks for the whole run, so that a compiled step need not register them."""
        # Lightning warns of modules in eval mode; the frozen tower is meant to be.
        warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode at the start of training")
        for tap in self._taps:
            tap.install()

    def teardown(self, stage: str) -> None:
        """Take the feature hooks away."""
        for tap in self._taps:
            tap.remove()

    @property
    def _taps(self) -> list[FeatureTap | OutputTap]:
        return [self.trained.tap, self.frozen.tap]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of one batch; see the class for what a batch is."""
        trained, frozen = self._pair(batch)
        if self.example_shape is None:
            self.example_shape = tuple(trained.shape[1:])
        features, embeddings = self._frozen_pair(frozen)
        loss = self.batch_loss(self(trained), embeddings, features)
        self.log_dict({"train/loss": loss, "train/scale": self.scale.detach()}, batch_size=len(trained))
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Keep the scale below its bound; bounding the parameter, not its use, keeps its gradient."""
        with torch.no_grad():
            self.log_scale.clamp_(max=math.log(self.max_scale))

    def _pair(self, batch: Any) -> tuple[Tensor, Tensor]:
        wanted = (self.trained_modality, self.frozen_modality)
        if not isinstance(batch, dict) or not all(name in batch for name in wanted):
            found = ", ".join(map(str, batch)) if isinstance(batch, dict) else type(batch).__name__
            raise InputError(
                f"a batch must be a dict with {wanted[0]!r} and {wanted[1]!r}, got {found}: set trained_modality and "
                "frozen_modality, or use a data module of pairs"
            )
        trained, frozen = (batch[name] for name in wanted)
        if len(trained) != len(frozen):
            raise InputError(
                f"a batch must be pairs, got {len(trained)} {wanted[0]} and {len(frozen)} {wanted[1]} rows"
            )
        return trained, frozen

    # -- evaluation ------------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """Embed the prompts of the classes with the text tower as it is now."""
        self._start_evaluation()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log ``val/loss`` and update the metrics."""
        self._evaluate(batch, "val")

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of the split."""
        self._log_metrics("val")

    def on_test_epoch_start(self) -> None:
        """See `on_validation_epoch_start`."""
        self._start_evaluation()

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Log ``test/loss`` and update the metrics."""
        self._evaluate(batch, "test")

    def on_test_epoch_end(self) -> None:
        """Log the metrics of the split."""
        self._log_metrics("test")

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Return the unit embeddings (B, D) of each modality that the batch has."""
        known = (self.trained_modality, self.frozen_modality)
        return {name: self.encode(name, batch[name]) for name in known if name in batch}

    def _start_evaluation(self) -> None:
        self.evaluation.start(self.encode_text, getattr(self.trainer, "datamodule", None), self.device)

    def _evaluate(self, batch: Any, split: str) -> None:
        trained, frozen = self._pair(batch)
        features, embeddings = self._frozen_pair(frozen)
        embedded = self(trained)
        loss = self.batch_loss(embedded, embeddings, features)
        self.log(f"{split}/loss", loss, sync_dist=True, batch_size=len(trained))
        self.evaluation.update(
            {self.frozen_modality: embeddings, self.trained_modality: embedded},
            {"structure": (embedded, features)},
            ids=batch.get("id"), labels=batch.get("label"),
        )  # fmt: skip

    def _log_metrics(self, split: str) -> None:
        # Every process has computed the value of all of them; the mean only says so to Lightning.
        self.log_dict({f"{split}/{name}": v for name, v in self.evaluation.finish().items()}, sync_dist=True)

    def configure_optimizers(self) -> Any:
        """Return AdamW and, per step, a linear warm-up followed by a cosine to 0.

        LightningCLI's ``optimizer`` and ``lr_scheduler`` take its place when given.
        """
        learned = [parameter for parameter in self.parameters() if parameter.requires_grad]
        groups = [
            {"params": [p for p in learned if p.ndim > 1], "weight_decay": self.weight_decay},
            {"params": [p for p in learned if p.ndim <= 1], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=self.lr, betas=(0.9, 0.98))
        total = max(1, int(self.trainer.estimated_stepping_batches))
        rise = max(1, round(total * self.lr_warmup_share))

        def factor(step: int) -> float:
            if step < rise:
                return (step + 1) / rise
            return 0.5 * (1.0 + math.cos(math.pi * min(1.0, (step - rise) / max(1, total - rise))))

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def _create(
    name: str | dict[str, Any] | nn.Module,
    modality: str,
    argument: str,
    options: dict[str, Any] | None,
    *,
    locked: bool,
) -> towers.Tower:
    given = towers.tower_options(argument, options)
    return towers.create(name, frozen=locked, embedding=True, modality=modality, **given)


def _check_numbers(**options: Any) -> None:
    if options["trained_modality"] == options["frozen_modality"]:
        raise InputError(
            f"trained_modality and frozen_modality must be two keys of a batch, got {options['frozen_modality']!r} twice"
        )
    if not 0 < options["init_scale"] <= options["max_scale"]:
        raise InputError(
            f"init_scale must be positive and at most max_scale, got {options['init_scale']} and {options['max_scale']}"
        )
    if options["embed_dim"] is not None and options["embed_dim"] < 1:
        raise InputError(f"embed_dim must be positive or None, got {options['embed_dim']}")
    if not 0 <= options["lr_warmup_share"] < 1:
        raise InputError(f"lr_warmup_share must be a share of the steps in [0, 1), got {options['lr_warmup_share']}")
