"""Text-to-image generation by rectified flow: the base that SoftREPA needs, small enough for a CPU.

Liu, Gong, Liu: Flow Straight and Fast: Learning to Generate and Transfer Data with Rectified Flow, ICLR 2023, arXiv
2209.03003; Esser et al.: Scaling Rectified Flow Transformers for High-Resolution Image Synthesis, ICML 2024, arXiv
2403.03206 (times from a logit-normal distribution, the network). With a network v and a caption c::

    x_s = (1 - s) x_0 + s e,   s = sigmoid(mean + std n),   L = E |v(x_s, 1000 s, c) - (e - x_0)|^2 / (C H W)

A tenth of the captions is left out, for classifier-free guidance (Ho, Salimans, arXiv 2207.12598).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from zoo import towers
from zoo.backbones import require_backbone
from zoo.denoisers import denoising_errors
from zoo.errors import InputError
from zoo.flow_sampling import sample
from zoo.generation_evaluation import sample_prompts
from zoo.generation_module import GenerationModule

__all__ = ["FlowMatching"]

_TIMES = (100.0, 300.0, 500.0, 700.0, 900.0)  # of the validation loss


class FlowMatching(GenerationModule):
    """Train a text-to-image backbone with rectified flow.

    A batch is a dict: "image" (B, C, H, W), in the units in which images are to come out, "text" (B, L), tokens of the
    captions, and for evaluation with a classifier "label" (B,), the class that the caption asks for.

    Called with tokens, the module returns one image for each, from fixed noise, at ``sample_steps`` and ``guidance``;
    `sample` has every choice.

    Logged: ``train/loss``. In validation ``val/loss``, the mean over five fixed times and fixed noise, always of the right
    caption. With a classifier, at the end of a validation, on the captions of its first ``eval_samples`` images and on fixed
    noise: ``val/alignment``, the share of images that the classifier takes for the class that was asked for, and
    ``val/frechet``, the Fréchet distance of its features to all real images of the split. It depends on the numbers of
    images: compare it at equal ones. The same under ``test/``.

    Args:
        backbone: what is trained: ``"zoo/tiny_text_to_image"``, a stored model, or a module with the members of
            `zoo.denoisers.Backbone` and ``latent_shape``.
        backbone_options: options of a named backbone, such as ``{sample_size: 32, channels: 3, patch_size: 4}``.
        classifier: frozen judge of the samples: a tower name, or a module, that reads images in the units of the data. It
            is used in evaluation alone and is not stored.
        classifier_options: options for the builder of a named classifier.
        time_mean: mean of the normal variable whose sigmoid is the time; larger is noisier.
        time_std: its standard deviation; 0 has one time only.
        caption_dropout: share of the captions that are left out in training.
        caption_noise: share of the captions that are another image's of the batch in training: a misalignment that is
            put in on purpose, to study its repair.
        sample_steps: Euler steps of a sample.
        guidance: of a sample; 1 is none. The same in evaluation.
        eval_samples: images that an evaluation samples in each process, at most; 0 for none.
        lr: learning rate of the default optimizer, AdamW.
        weight_decay: its weight decay.
        lr_warmup_steps: optimizer steps over which the learning rate grows to ``lr``.
        decay: let the learning rate fall to 0 over the run, as a cosine, after the warm-up.

    Raises:
        InputError: a value is out of range, the backbone lacks a member, or a tower cannot be built.

    Example:
        >>> model = FlowMatching(backbone_options={"vocab_size": 100, "depth": 2}, sample_steps=4)
        >>> model(torch.tensor([[1, 7, 2, 0], [1, 8, 2, 0]])).shape
        torch.Size([2, 1, 8, 8])
    """

    deployable = "backbone"
    training_only = ("classifier",)
    evaluated_with = ("classifier",)

    def __init__(
        self,
        backbone: str | dict[str, Any] | nn.Module = "zoo/tiny_text_to_image",
        *,
        backbone_options: dict[str, Any] | None = None,
        classifier: str | nn.Module | None = None,
        classifier_options: dict[str, Any] | None = None,
        time_mean: float = 0.0,
        time_std: float = 1.0,
        caption_dropout: float = 0.1,
        caption_noise: float = 0.0,
        sample_steps: int = 20,
        guidance: float = 1.0,
        eval_samples: int = 100,
        lr: float = 1e-3,
        weight_decay: float = 0.01,
        lr_warmup_steps: int = 100,
        decay: bool = False,
    ) -> None:
        super().__init__(classifier=classifier, classifier_options=classifier_options, eval_samples=eval_samples)
        _check(
            time_std=time_std, caption_dropout=caption_dropout, caption_noise=caption_noise, sample_steps=sample_steps,
            guidance=guidance, eval_samples=eval_samples, lr=lr, weight_decay=weight_decay, lr_warmup_steps=lr_warmup_steps,
        )  # fmt: skip
        self.backbone: Any = _backbone(backbone, backbone_options)
        self.time_mean = time_mean
        self.time_std = time_std
        self.caption_dropout = caption_dropout
        self.caption_noise = caption_noise
        self.sample_steps = sample_steps
        self.guidance = guidance
        self.lr = lr
        self.weight_decay = weight_decay
        self.lr_warmup_steps = lr_warmup_steps
        self.decay = decay

    # -- samples ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self,
        text: Tensor | list[str],
        *,
        steps: int | None = None,
        guidance: float | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return images of texts.

        Args:
            text: tokens (B, L), int64, or B texts, where the backbone has a tokenizer.
            steps: Euler steps; the module's if omitted.
            guidance: 1 is none; the module's if omitted.
            noise: where to begin, of the shape of the backbone's latents; drawn if omitted.
            generator: of the noise; torch's own if omitted.

        Returns:
            (B, C, H, W), in the units of the training data.

        Raises:
            InputError: see `zoo.flow_sampling.sample`.
        """
        latents = sample(
            self.backbone, self.backbone.condition(text), noise=noise, generator=generator,
            steps=self.sample_steps if steps is None else steps, guidance=self.guidance if guidance is None else guidance,
        )  # fmt: skip
        images: Tensor = self.backbone.images(latents)
        return images

    def forward(self, text: Tensor) -> Tensor:
        """Return one image (C, H, W) for each row of tokens (B, L), from noise that is always the same."""
        return self.draw_samples(text)

    def draw_samples(self, text: Tensor | list[str], *, seed: int = 0) -> Tensor:
        """Return an image (B, C, H, W) of each text, from noise that depends on the seed alone."""
        return sample_prompts(self.backbone, text, steps=self.sample_steps, guidance=self.guidance, seed=seed)

    def example_input(self, generator: torch.Generator) -> Tensor | None:
        """Return seeded tokens (1, L) for the golden output, or None for a backbone that does not say how many it has."""
        length, vocabulary = (getattr(self.backbone, name, None) for name in ("context_length", "vocab_size"))
        if length is None or vocabulary is None:
            return None
        return torch.randint(vocabulary, (1, length), generator=generator)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return an image for each caption of a batch."""
        return self.draw_samples(batch["text"], seed=batch_idx)

    # -- fit -------------------------------------------------------------------------------------------------------

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of one batch; see the class for what a batch is."""
        images, text = _parts(batch)
        clean = self.backbone.latents(images)
        times = 1000 * torch.sigmoid(self.time_mean + self.time_std * torch.randn(len(clean), device=clean.device))
        condition = self._dropped(self.backbone.condition(self._misled(text)))
        noise = torch.randn_like(clean)
        loss = denoising_errors(
            self.backbone.process, self.backbone.denoiser, clean, noise, times, condition
        ).mean()  # fmt: skip
        self.log("train/loss", loss, batch_size=len(clean))
        return loss

    def _misled(self, text: Tensor) -> Tensor:
        """Give some images the caption of another one."""
        if not self.caption_noise or len(text) < 2:
            return text
        others = text.roll(int(torch.randint(1, len(text), ())), 0)
        return torch.where(self._chosen(self.caption_noise, text)[:, None], others, text)

    def _dropped(self, condition: dict[str, Tensor]) -> dict[str, Tensor]:
        """Take some images their caption."""
        if not self.caption_dropout:
            return condition
        like = next(iter(condition.values()))
        null = self.backbone.null_condition(len(like))
        gone = self._chosen(self.caption_dropout, like)
        return {
            name: torch.where(gone.view(-1, *[1] * (value.ndim - 1)), null[name], value)
            for name, value in condition.items()
        }

    @staticmethod
    def _chosen(share: float, like: Tensor) -> Tensor:
        return torch.rand(len(like), device=like.device) < share

    def configure_optimizers(self) -> Any:
        """Return AdamW and the schedule, per step.

        LightningCLI's ``optimizer`` and ``lr_scheduler`` take its place when given.

        Raises:
            InputError: ``decay`` over a run without an end.
        """
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=self.weight_decay)
        total = self.trainer.estimated_stepping_batches if self.decay else 0
        if not math.isfinite(total):
            raise InputError("decay needs a run of known length: set max_steps, or max_epochs over data with a length")

        def factor(step: int) -> float:
            rising = min(1.0, (step + 1) / (self.lr_warmup_steps + 1))
            if not self.decay:
                return rising
            done = (step - self.lr_warmup_steps) / max(1.0, total - self.lr_warmup_steps)
            return rising * 0.5 * (1.0 + math.cos(math.pi * min(1.0, max(0.0, done))))

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    # -- evaluation ------------------------------------------------------------------------------------------------

    def evaluate(self, batch: Any, batch_idx: int, split: str) -> None:
        """Log the loss at fixed times with fixed noise."""
        images, text = _parts(batch)
        loss = self._fixed_error(images, text, seed=batch_idx)
        self.log(f"{split}/loss", loss, sync_dist=True, batch_size=len(images))

    def _fixed_error(self, images: Tensor, text: Tensor, *, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        clean = self.backbone.latents(images, generator)
        noise = torch.randn(clean.shape, generator=generator).to(clean)
        condition = self.backbone.condition(text)
        denoiser, process = self.backbone.denoiser, self.backbone.process
        errors = [denoising_errors(process, denoiser, clean, noise, time, condition).mean() for time in _TIMES]
        return torch.stack(errors).mean()


def _backbone(name: str | dict[str, Any] | nn.Module, options: dict[str, Any] | None) -> nn.Module:
    network = towers.create(name, **towers.tower_options("backbone_options", options)).network
    require_backbone(network, "latent_shape")
    return network


def _parts(batch: Any) -> tuple[Tensor, Tensor]:
    if not isinstance(batch, dict) or "image" not in batch or "text" not in batch:
        told = sorted(batch) if isinstance(batch, dict) else type(batch).__name__
        raise InputError(f'a batch must be a dict with "image" and "text", got {told}')
    return batch["image"], batch["text"]


def _check(**numbers: float) -> None:
    positive, whole = {"lr"}, {"sample_steps": 1, "eval_samples": 0, "lr_warmup_steps": 0}
    for name, value in numbers.items():
        if name in ("caption_dropout", "caption_noise"):
            good, rule = 0 <= value < 1, "in [0, 1)"
        elif name in whole:
            good, rule = value >= whole[name], f"at least {whole[name]}"
        else:
            good = 0 < value < math.inf or (value == 0 and name not in positive)
            rule = "positive and finite" if name in positive else "finite and not negative"
        if not good:
            raise InputError(f"{name} must be {rule}, got {value}")
