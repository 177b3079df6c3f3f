"""SoftREPA: soft text tokens by which a frozen text-to-image model tells captions apart.

Lee et al.: Aligning Text to Image in Diffusion Models is Easier Than You Think, NeurIPS 2025, arXiv 2503.08250. Against
fine-tuning, the denoiser f and the text encoders stay frozen, and what is learned is a handful of vectors s(k, t) that join
the text of layer k at time t (`zoo.soft_tokens`). Against contrastive training of two encoders, image i and caption j
are scored by how well f denoises i when it is told j, at one time t and with one noise for the whole batch::

    E[i, j] = mean (f(x_t^i, t, y_j, s) - target^i)^2           l[i, j] = scale exp(-E[i, j] / temperature)
    L       = mean_i (logsumexp_j l[i, j] - l[i, i]) + diagonal_weight mean_i E[i, i]

The N x N errors take N^2 passes of f; `zoo.error_matrix` gives the exact gradient with the activations of one image's
captions, or of a few pairs, in memory. Read: the authors' code, through the project's notes; not the paper's equations.
Other than there: initial tokens differ (the released ones of Stable Diffusion 1.5 are one token four times over), equal
captions are no negatives, and rows are averaged once.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from zoo.backbones import frozen_backbone
from zoo.captioned_batch import CaptionedBatch, MaskEqual, error_statistics, own_errors, read_captioned
from zoo.denoisers import denoising_errors
from zoo.error_matrix import Contrast, Pairs, contrast
from zoo.errors import InputError, require_choice
from zoo.generation_evaluation import sample_prompts
from zoo.generation_module import GenerationModule
from zoo.losses.ranks import rank_and_size
from zoo.soft_tokens import Attachment, SoftTokens, attach
from zoo.token_places import network_of, text_blocks, token_places, token_width

__all__ = ["SoftREPA"]

_TIMES = 1000
_CHOICES = {
    "objective": ("softrepa", "denoising"), "pairs": ("full", "rows", "two_pass"), "start": ("normal", "bos"),
    "mask_equal": ("none", "captions", "labels"), "schedule": ("cosine_restarts", "constant"),
}  # fmt: skip


class SoftREPA(GenerationModule):
    """Train soft text tokens for a frozen text-to-image model.

    A batch is a dict with "image" (B, C, H, W), in the units of the backbone's training, and "text", tokens (B, L) or B
    captions; or with what they were encoded to, "latents" (B, c, h, w) and the conditions by the names of the denoiser's
    arguments (see `zoo.data.LatentCaptionsDataModule`). "label" and "caption_id" are used where the data have them.

    The backbone is only needed for training: the stored model is the tokens, with the backbone's name. Loaded, `attach`
    puts them on a diffusers pipeline::

        with zoo.SoftREPA.from_pretrained("me/softrepa-sd3").attach(pipeline):
            pipeline("three cats and a dog", guidance_scale=4.0)

    Logged: ``train/loss`` and what `zoo.captioned_batch.error_statistics` says: ``train/positive_error``, the mean E[i, i];
    ``train/margin``, how much larger the errors under other captions are; ``train/rank1``, for how many images the own
    caption has the smallest error; ``train/live_pairs``, the share of pairs that the temperature leaves a gradient. In
    validation the same at fixed times, with one fixed noise, as ``val/…``, and for each time
    ``val/positive_error/t500`` …; ``val/offset_norm``, the mean length of the offsets; with a `classifier`
    ``val/alignment`` and ``val/frechet`` of sampled images (`zoo.generation_evaluation`). The same under ``test/``.
    The paper's follow-up says that image quality falls while the training loss still falls: stop early, by a score on
    held-out prompts.

    Args:
        backbone: the frozen model: a stored `FlowMatching`, as a path or ``hf://…``; ``diffusers/owner/name@revision`` or
            ``diffusers/./folder`` (`zoo.diffusers_backbone`); or a module (`zoo.denoisers.Backbone`).
        backbone_options: options for loading a diffusers model, such as ``{"denoiser_only": true}`` for cached data.
        tokens: soft tokens m of a layer.
        blocks: which blocks get them, as numbers or names (`zoo.soft_tokens.token_places`); the paper's choice if omitted.
        shared: one bank for all blocks; if omitted, yes for a U-Net and no for joint blocks, as released.
        buckets: ranges of time with an offset of their own; 0 for tokens that are the same at all times.
        init_std: standard deviation of the initial values.
        start: ``"normal"``; or ``"bos"``, which adds the embedding of the first token of the empty caption, as the paper
            does for Stable Diffusion 1.5.
        width: width of a token, recorded from the backbone.
        depth: how many blocks the bank is for, recorded.
        objective: ``"softrepa"``; or ``"denoising"``, the control: the mean E[i, i] and nothing else.
        temperature: of the errors; must be of their order. ``train/live_pairs`` says whether it is.
        scale: factor of the scores.
        diagonal_weight: weight of the mean E[i, i]; the paper's runs have 0 for SD3 and 10 for SD1.5 and SDXL.
        mask_equal: which other captions are no negatives: ``"none"``, as released; ``"captions"``, those that are the same;
            ``"labels"``, those of the same "label".
        pairs: how the gradient is taken, see `zoo.error_matrix`: ``"full"``, ``"rows"`` or ``"two_pass"``. All are exact.
        micro_batch: pairs in one pass of the denoiser, at most.
        negatives: compare each image with so many other captions, drawn anew, in place of all: cheaper, and not exact.
        gather_negatives: under several processes, compare with the captions of all; each process has its own otherwise.
        eval_timesteps: times of the evaluation, 0 … 999.
        classifier: a tower that says which class a sampled image shows; without it nothing is sampled. For backbones
            of this zoo.
        classifier_options: options for its builder.
        eval_samples: images that an evaluation samples in each process, at most; 0 for none.
        sample_steps: Euler steps of a sample.
        guidance: of the samples; 1 is none.
        lr: learning rate of the default optimizer, AdamW.
        weight_decay: its weight decay.
        schedule: ``"cosine_restarts"``, down to lr / 100 and up again every `restart_steps`; ``"constant"``.
        restart_steps: optimizer steps between restarts.

    Attributes:
        bank: the soft tokens.
        places: the module names of their blocks, once a backbone was seen.

    Raises:
        InputError: the backbone cannot be built or take tokens, or a value is out of range.

    Example:
        >>> from zoo.architectures.tiny_mmdit import TinyTextToImage
        >>> model = SoftREPA(TinyTextToImage(vocab_size=10), tokens=4, blocks=[0, 1])
        >>> model.bank
        SoftTokens(depth=2, tokens=4, width=64, buckets=100)
    """

    deployable = "bank"
    training_only = ("backbone", "classifier")
    evaluated_with = ("backbone", "classifier")

    def __init__(
        self,
        backbone: str | dict[str, Any] | nn.Module | None = None,
        *,
        backbone_options: dict[str, Any] | None = None,
        tokens: int = 4,
        blocks: Sequence[int | str] | None = None,
        shared: bool | None = None,
        buckets: int = 100,
        init_std: float = 0.02,
        start: Literal["normal", "bos"] = "normal",
        width: int | None = None,
        depth: int | None = None,
        objective: Literal["softrepa", "denoising"] = "softrepa",
        temperature: float = 0.07,
        scale: float = 4.0,
        diagonal_weight: float = 0.0,
        mask_equal: MaskEqual = "captions",
        pairs: Pairs = "rows",
        micro_batch: int | None = None,
        negatives: int | None = None,
        gather_negatives: bool = False,
        eval_timesteps: Sequence[int] = (100, 300, 500, 700, 900),
        classifier: str | dict[str, Any] | nn.Module | None = None,
        classifier_options: dict[str, Any] | None = None,
        eval_samples: int = 200,
        sample_steps: int = 28,
        guidance: float = 1.0,
        lr: float = 1e-3,
        weight_decay: float = 1e-4,
        schedule: Literal["cosine_restarts", "constant"] = "cosine_restarts",
        restart_steps: int = 5000,
    ) -> None:
        super().__init__(classifier=classifier, classifier_options=classifier_options, eval_samples=eval_samples)
        _check_choices(objective=objective, pairs=pairs, start=start, mask_equal=mask_equal, schedule=schedule)
        self.objective = objective
        self.mask_equal = mask_equal
        self.contrast_options: dict[str, Any] = {
            "temperature": _positive("temperature", temperature), "scale": _positive("scale", scale),
            "diagonal_weight": diagonal_weight, "pairs": pairs, "micro_batch": micro_batch, "negatives": negatives,
        }  # fmt: skip
        self.gather_negatives = gather_negatives
        self.eval_timesteps = _timesteps(eval_timesteps)
        self.sample_options: dict[str, Any] = {"steps": sample_steps, "guidance": guidance}
        self.lr = _positive("lr", lr)
        self.weight_decay = weight_decay
        self.schedule = schedule
        self.restart_steps = int(_positive("restart_steps", restart_steps))
        self.places: Sequence[int | str] | None = None if blocks is None else list(blocks)
        if backbone is not None:
            self.attach_frozen("backbone", frozen_backbone(backbone, backbone_options))
            width, depth = self._fit_backbone(shared, width, depth)
        if width is None or depth is None:
            raise InputError(
                "backbone must be given: a stored FlowMatching, a diffusers name such as "
                "'diffusers/stabilityai/stable-diffusion-3-medium-diffusers', or a module"
            )
        self.bank = SoftTokens(depth, tokens, width, buckets, init_std=init_std)
        if start == "bos" and backbone is not None:
            self.bank.start_at(self._backbone.condition([""])["encoder_hidden_states"][0, 0])
        self._attachment: Attachment | None = None

    @property
    def _backbone(self) -> Any:
        if "backbone" not in self.frozen_towers:
            raise InputError(
                "the backbone is not loaded: it is needed for training and sampling, so load the model with "
                "for_training=True, or attach() the tokens to a network or a pipeline of yours"
            )
        return self.frozen_towers["backbone"].network

    def _fit_backbone(self, shared: bool | None, width: int | None, depth: int | None) -> tuple[int, int]:
        """Read the sizes of the bank off the backbone, and record them for a model that is loaded without it."""
        denoiser = self._backbone.denoiser
        places = token_places(denoiser, self.places)
        if shared is None:
            shared = not text_blocks(network_of(denoiser)).joint
        found = {"width": token_width(denoiser), "depth": 1 if shared else len(places)}
        for name, ours in (("width", width), ("depth", depth)):
            if ours is not None and ours != found[name]:
                raise InputError(f"{name} is {ours}, but {found[name]} for this backbone: leave it out")
        self.places = places
        self._arguments.update(found, blocks=places)
        self.hparams.update(found, blocks=places)
        return found["width"], found["depth"]

    # -- use -------------------------------------------------------------------------------------------------------

    def attach(self, denoiser: Any) -> Attachment:
        """Put the tokens on a network or a diffusers pipeline, until the end of a ``with`` or ``detach()``.

        Args:
            denoiser: see `zoo.soft_tokens.attach`; of the backbone's architecture.

        Raises:
            InputError: the tokens do not fit it, or it has some already.
        """
        return attach(denoiser, self.bank, self.places)

    def forward(self, timestep: Tensor) -> Tensor:
        """Return the tokens (B, depth, tokens, width) at times (B,) in 0 … 1000."""
        found: Tensor = self.bank(timestep)
        return found

    def example_input(self, generator: torch.Generator) -> Tensor:
        """Return seeded times (8,)."""
        return 1000 * torch.rand(8, generator=generator)

    @torch.no_grad()
    def sample(self, text: Tensor | list[str], *, steps: int | None = None, guidance: float | None = None,
               seed: int = 0) -> Tensor:  # fmt: skip
        """Return an image (C, H, W) of each text, from noise that depends on the seed alone; see `sample_prompts`.

        Args:
            text: tokens (B, L), or B texts.
            steps: Euler steps; the module's if omitted.
            guidance: 1 is none; the module's if omitted.
            seed: of the noise.

        Raises:
            InputError: the backbone is not loaded, or not of this zoo.
        """
        given = {"steps": steps, "guidance": guidance}
        options = self.sample_options | {name: value for name, value in given.items() if value is not None}
        if self._attachment is not None:
            return sample_prompts(self._backbone, text, seed=seed, **options)
        with self.attach(self._backbone.denoiser):
            return sample_prompts(self._backbone, text, seed=seed, **options)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return an image for each caption of a batch."""
        return self.sample(batch["text"], seed=batch_idx)

    # -- errors ----------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Put the tokens on the backbone for the run.

        Raises:
            InputError: the backbone is not loaded, or not the one that made the cached data.
        """
        # Lightning warns of modules in eval mode; the frozen backbone is meant to be.
        warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode at the start of training")
        check = getattr(getattr(self._trainer, "datamodule", None), "check_backbone", None)
        if check is not None:
            check(self._backbone)
        self._put_on()

    def teardown(self, stage: str) -> None:
        """Take the tokens off the backbone."""
        self._take_off()

    def _put_on(self) -> None:
        if self._attachment is None:
            self._attachment = self.attach(self._backbone.denoiser)

    def _take_off(self) -> None:
        if self._attachment is not None:
            self._attachment.detach()
            self._attachment = None

    def _read(self, batch: Any, generator: torch.Generator | None = None) -> CaptionedBatch:
        return read_captioned(
            batch, self._backbone, mask_equal=self.mask_equal, gather=self.gather_negatives, generator=generator
        )

    def _contrast(self, batch: CaptionedBatch, timestep: Tensor, noise: Tensor) -> Contrast:
        """Return loss and errors at one time with one noise, whatever the objective."""
        backbone = self._backbone

        def errors_of(images: Tensor, texts: Tensor) -> Tensor:
            condition = {name: value[texts] for name, value in batch.condition.items()}
            return denoising_errors(
                backbone.process, backbone.denoiser, batch.clean[images], noise, timestep, condition
            )  # fmt: skip

        rows = len(batch.clean)
        if self.objective == "denoising" and torch.is_grad_enabled():
            own = torch.arange(rows, device=noise.device)
            errors = errors_of(own, own + batch.first_row)
            matrix = torch.full((rows, batch.captions), torch.nan, device=noise.device)
            return Contrast(errors.mean(), matrix.index_put((own, own + batch.first_row), errors.detach().float()))
        found = contrast(
            errors_of, rows=rows, columns=batch.captions, parameters=list(self.bank.parameters()), mask=batch.mask,
            first_row=batch.first_row, backward_scale=self._backward_scale(), **self.contrast_options,
        )  # fmt: skip
        if self.objective == "denoising":
            return Contrast(own_errors(found.errors, batch.first_row).mean(), found.errors)
        return found

    def _backward_scale(self) -> float:
        """Return the factor of the gradient scaler: the gradient is taken inside, where the scaler does not reach."""
        trainer = self._trainer
        scaler = getattr(trainer.precision_plugin, "scaler", None) if trainer is not None else None
        return float(scaler.get_scale()) if scaler is not None and torch.is_grad_enabled() else 1.0

    # -- fit -------------------------------------------------------------------------------------------------------

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of one batch; see the class for what a batch is."""
        given = self._read(batch)
        timestep = torch.randint(_TIMES, (1,), device=given.clean.device)
        noise = torch.randn_like(given.clean[:1], dtype=torch.promote_types(given.clean.dtype, torch.float32))
        if rank_and_size(gather=self.gather_negatives)[1] > 1:
            timestep, noise = self.trainer.strategy.broadcast((timestep, noise))
        found = self._contrast(given, timestep, noise)
        logged = {"loss": found.loss, **self._statistics(found.errors, given.first_row)}
        self.log_dict({f"train/{name}": value for name, value in logged.items()}, batch_size=len(given.clean))
        return found.loss

    def _statistics(self, errors: Tensor, first_row: int) -> dict[str, Tensor]:
        return error_statistics(errors, first_row=first_row, temperature=self.contrast_options["temperature"])

    def configure_optimizers(self) -> Any:
        """Return AdamW and the schedule, per step.

        LightningCLI's ``optimizer`` and ``lr_scheduler`` take its place when given.
        """
        optimizer = torch.optim.AdamW(self.bank.parameters(), lr=self.lr, weight_decay=self.weight_decay)
        if self.schedule == "constant":
            return optimizer
        restarts = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(
            optimizer, T_0=self.restart_steps, eta_min=self.lr / 100
        )
        return [optimizer], [{"scheduler": restarts, "interval": "step"}]

    # -- evaluation ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, batch: Any, batch_idx: int, split: str) -> None:
        """Log the loss and the errors at fixed times, with one fixed noise."""
        generator = torch.Generator().manual_seed(batch_idx)
        given = self._read(batch, generator)
        noise = torch.randn(given.clean[:1].shape, generator=generator).to(given.clean.device)
        found: dict[str, list[Tensor]] = {}
        for time in self.eval_timesteps:
            result = self._contrast(given, torch.tensor([time], device=noise.device), noise)
            statistics = self._statistics(result.errors, given.first_row)
            statistics[f"positive_error/t{time}"] = statistics["positive_error"]
            for name, value in {"loss": result.loss, **statistics}.items():
                found.setdefault(name, []).append(value)
        logged = {name: torch.stack(values).mean() for name, values in found.items()}
        if self.bank.offset is not None:
            logged["offset_norm"] = self.bank.offset.norm(dim=-1).mean()
        self.log_dict(
            {f"{split}/{name}": value for name, value in logged.items()}, sync_dist=True, batch_size=len(given.clean)
        )

    def draw_samples(self, text: Tensor | list[str], *, seed: int) -> Tensor:
        """Return an image (B, C, H, W) of each text with the tokens."""
        return self.sample(text, seed=seed)

    def draw_also(self, text: Tensor | list[str], *, seed: int) -> dict[str, Tensor]:
        """Return the images without the tokens."""
        self._take_off()
        try:
            return {"base": sample_prompts(self._backbone, text, seed=seed, **self.sample_options)}
        finally:
            self._put_on()


def _timesteps(times: Sequence[int]) -> list[int]:
    if not times or any(not 0 <= time < _TIMES for time in times):
        raise InputError(f"eval_timesteps must be at least one time in 0 … {_TIMES - 1}, got {list(times)}")
    return [int(time) for time in times]


def _positive(name: str, value: float) -> float:
    if not 0 < value < float("inf"):
        raise InputError(f"{name} must be positive and finite, got {value}")
    return value


def _check_choices(**chosen: str) -> None:
    for name, value in chosen.items():
        require_choice(name, value, _CHOICES[name])
