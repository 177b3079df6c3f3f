"""Continuously weighted contrastive learning: soft positives from the geometry of a frozen tower.

Srinivasa, Cho, Yang, Saidutta, Lee, Shen, Jin: CWCL: Cross-Modal Transfer with Continuously Weighted Contrastive Loss,
NeurIPS 2023, arXiv 2309.14580. Against InfoNCE, an anchor of the trained tower is drawn to every candidate of the frozen
tower, by weights that say how alike the frozen tower finds the two::

    w_ij = (1 + <r_i, r_j>) / 2
    L    = - 1/N sum_i sum_j w_ij / (sum_k w_ik) log softmax_j(s <p_i, q_j>)    anchors p of the trained tower
           - 1/N sum_i log softmax_k(s <p_k, q_i>)_i                            the other direction, plain InfoNCE

with unit embeddings p (trained) and q (frozen), unit features r of the frozen tower, and a learned scale s. No official code
was found; what is not in the abstract or the introduction is reconstructed (see the card).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor, nn

from zoo.errors import require_choice
from zoo.losses import cwcl_loss, cwcl_statistics
from zoo.two_towers import TwoTowerModule

__all__ = ["CWCL"]

_CHOICES = {
    "weighted_direction": ("trained", "both"),
    "kernel": ("affine", "power", "exp", "topk"),
    "weight_source": ("frozen", "projected"),
    "direction_reduction": ("sum", "mean"),
}


class CWCL(TwoTowerModule):
    """Train a tower against a frozen one with the continuously weighted contrastive loss.

    A batch is a dict with the inputs of both towers by modality, as `ImageTextDataModule`, `FeaturePairsDataModule` and
    `DigitsCaptionsDataModule` give it. Under several processes the loss, weights included, spans all of their batches. The
    control is `CLIP` with the same arguments.

    The weighted part has a floor, the entropy of its targets; what is learned is the divergence above it. Every
    ``log_every_n_steps`` steps: the directions ``cwcl/from_trained`` and ``cwcl/from_frozen``, ``cwcl/entropy``, ``cwcl/kl``
    (nats), and ``cwcl/effective_positives``, the mean of exp(entropy) over anchors.

    Args:
        trained: the tower that is trained: a tower name, or a module that returns embeddings and has ``output_dim``.
        frozen: the tower whose geometry is transferred, and which is not changed.
        trained_modality: key of the trained tower's inputs in a batch.
        frozen_modality: key of the frozen tower's inputs.
        embed_dim: width of the common space; that of the frozen tower, which then needs no head, if omitted.
        trained_options: options for the builder of a named tower, such as ``{width: 128}``.
        frozen_options: the same for the frozen tower.
        weighted_direction: ``"trained"`` weights the direction whose anchors are the trained embeddings (the paper);
            ``"both"`` weights the other as well.
        weight_source: features that the weights come from: ``"frozen"``, the frozen tower's own, or ``"projected"``, those
            behind its head, which then move with training. The same without a head.
        kernel: ``"affine"`` is the paper's; ``"power"``, ``"exp"`` and ``"topk"`` sharpen the weights and are ours; see
            `zoo.losses.cwcl_loss`.
        exponent: of the kernel ``"power"``.
        kernel_temperature: of the kernel ``"exp"``; that of the loss is 1 / scale.
        neighbours: of the kernel ``"topk"``.
        direction_reduction: ``"sum"`` or ``"mean"`` of the two directions.
        init_scale: start of the scale, the inverse temperature.
        max_scale: bound of the scale.
        learn_scale: learn its logarithm.
        k: the k of the retrieval metrics.
        chunk_size: tile of the loss; the engine chooses if omitted.
        lr: learning rate of the default optimizer, AdamW.
        weight_decay: its weight decay; biases, norms and the scale have none.
        lr_warmup_share: share of the steps in which the learning rate grows linearly, before it falls as a cosine to 0.

    Raises:
        InputError: a tower cannot be built, or a value is out of range.

    Example:
        >>> model = CWCL("zoo/text_transformer", "zoo/resnet8", trained_options={"width": 32, "vocab_size": 100})
        >>> model.encode_image(torch.zeros(2, 3, 8, 8)).shape
        torch.Size([2, 64])
    """

    def __init__(
        self,
        trained: str | dict[str, Any] | nn.Module,
        frozen: str | dict[str, Any] | nn.Module,
        *,
        trained_modality: str = "text",
        frozen_modality: str = "image",
        embed_dim: int | None = None,
        trained_options: dict[str, Any] | None = None,
        frozen_options: dict[str, Any] | None = None,
        weighted_direction: Literal["trained", "both"] = "trained",
        weight_source: Literal["frozen", "projected"] = "frozen",
        kernel: Literal["affine", "power", "exp", "topk"] = "affine",
        exponent: float = 2.0,
        kernel_temperature: float = 0.1,
        neighbours: int = 8,
        direction_reduction: Literal["sum", "mean"] = "sum",
        init_scale: float = 1 / 0.07,
        max_scale: float = 100.0,
        learn_scale: bool = True,
        k: Sequence[int] = (1, 5, 10),
        chunk_size: int | None = None,
        lr: float = 5e-4,
        weight_decay: float = 0.1,
        lr_warmup_share: float = 0.05,
    ) -> None:
        super().__init__(
            trained=trained, frozen=frozen, trained_modality=trained_modality, frozen_modality=frozen_modality,
            locked=True, embed_dim=embed_dim, trained_options=trained_options, frozen_options=frozen_options,
            init_scale=init_scale, max_scale=max_scale, learn_scale=learn_scale, k=k, chunk_size=chunk_size,
            lr=lr, weight_decay=weight_decay, lr_warmup_share=lr_warmup_share,
        )  # fmt: skip
        given = {
            "weighted_direction": weighted_direction, "kernel": kernel, "weight_source": weight_source,
            "direction_reduction": direction_reduction,
        }  # fmt: skip
        for name, value in given.items():
            require_choice(name, value, _CHOICES[name])
        self.weight_source = weight_source
        self.weighted_direction = weighted_direction
        self.kernel_options: dict[str, Any] = {
            "kernel": kernel, "exponent": exponent, "kernel_temperature": kernel_temperature, "neighbours": neighbours,
        }  # fmt: skip
        self.direction_reduction = direction_reduction

    def batch_loss(self, trained: Tensor, frozen: Tensor, features: Tensor) -> Tensor:
        """Return the loss of a batch; see `TwoTowerModule.batch_loss`."""
        weights = features if self.weight_source == "frozen" else frozen
        loss = cwcl_loss(
            trained, frozen, scale=self.scale, weight_features=weights, weighted_direction=self.weighted_direction,
            direction_reduction=self.direction_reduction, gather=self.spans_processes, chunk_size=self.chunk_size,
            **self.kernel_options,
        )  # fmt: skip
        self._log_statistics(trained, frozen, weights)
        return loss

    def _log_statistics(self, trained: Tensor, frozen: Tensor, weights: Tensor) -> None:
        if not self.trainer.training or self.global_step % max(1, getattr(self.trainer, "log_every_n_steps", 50)):
            return
        statistics = cwcl_statistics(
            trained, frozen, scale=self.scale, weight_features=weights, gather=self.spans_processes,
            chunk_size=self.chunk_size, **self.kernel_options,
        )  # fmt: skip
        self.log_dict({f"cwcl/{name}": value for name, value in statistics.items()}, batch_size=len(trained))
