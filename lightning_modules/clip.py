"""Contrastive training of two towers with InfoNCE both ways: CLIP, and LiT where one of them is locked.

Radford et al.: Learning Transferable Visual Models From Natural Language Supervision, ICML 2021, arXiv 2103.00020; Zhai et
al.: LiT: Zero-Shot Transfer with Locked-image text Tuning, CVPR 2022, arXiv 2111.07991. For N pairs with unit embeddings
p_i and q_i and a scale s::

    L = - 1 / 2N sum_i [ log softmax_j(s <p_i, q_j>)_i + log softmax_j(s <p_j, q_i>)_i ]

It is the control of `CWCL`: the same towers, data, scale and schedule, and no weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from zoo.losses import clip_loss
from zoo.two_towers import TwoTowerModule

__all__ = ["CLIP"]


class CLIP(TwoTowerModule):
    """Align two towers with InfoNCE in both directions.

    A batch is a dict with the inputs of both towers by modality, as `ImageTextDataModule`, `FeaturePairsDataModule` and
    `DigitsCaptionsDataModule` give it. Under several processes the loss spans all of their batches.

    Args:
        trained: the tower that is trained: a tower name, or a module that returns embeddings and has ``output_dim``.
        frozen: the other tower, which is not changed as long as ``locked`` holds.
        trained_modality: key of the trained tower's inputs in a batch.
        frozen_modality: key of the frozen tower's inputs.
        locked: keep the frozen tower as it is (LiT); otherwise both are trained (CLIP).
        embed_dim: width of the common space; that of the frozen tower, which then needs no head, if omitted.
        trained_options: options for the builder of a named tower, such as ``{width: 128}``.
        frozen_options: the same for the frozen tower.
        init_scale: start of the scale, the inverse temperature; 1 / 0.07 in CLIP, 10 in LiT.
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
        >>> model = CLIP("zoo/text_transformer", "zoo/resnet8", trained_options={"width": 32, "vocab_size": 100})
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
        locked: bool = True,
        embed_dim: int | None = None,
        trained_options: dict[str, Any] | None = None,
        frozen_options: dict[str, Any] | None = None,
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
            locked=locked, embed_dim=embed_dim, trained_options=trained_options, frozen_options=frozen_options,
            init_scale=init_scale, max_scale=max_scale, learn_scale=learn_scale, k=k, chunk_size=chunk_size,
            lr=lr, weight_decay=weight_decay, lr_warmup_share=lr_warmup_share,
        )  # fmt: skip

    def batch_loss(self, trained: Tensor, frozen: Tensor, features: Tensor) -> Tensor:
        """Return the mean of both directions; ``features`` are not used."""
        return clip_loss(trained, frozen, scale=self.scale, gather=self.spans_processes, chunk_size=self.chunk_size)
