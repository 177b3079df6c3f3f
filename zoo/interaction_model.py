"""`InteractionModel`: a model of users and items that takes its sizes from the data, and needs no data once it is stored.

The data are known when a run begins, and the model is built before. So its parameters are made in `attach`, which
`setup` calls, and the sizes join the arguments that are stored. The ids of users and items, and which items each user had
in training, are stored as tensors.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from zoo.errors import InputError
from zoo.interaction_graph import PairLists, interaction_graph, pair_lists, require_lists
from zoo.module import ZooModule
from zoo.stored_ids import NameIndex, names_from_tensor, names_to_tensor

__all__ = ["InteractionModel"]


class InteractionModel(ZooModule):
    """Parameters, ids and interactions of users and items; a subclass says what is made of them.

    The data module has after ``setup()``: ``user_ids`` and ``item_ids`` (lists of strings), ``interactions`` (split ->
    (2, N), users and items) and what `read_data` of the subclass asks for.

    Args:
        num_users: number of users, if known.
        num_items: number of items, if known.
    """

    deployable = "recommender"
    sized_by_file: ClassVar[tuple[str, ...]] = (
        "user_id_bytes",
        "item_id_bytes",
        "seen_offsets",
        "seen_items",
        "added_items",
    )

    recommender: nn.Module | None
    user_id_bytes: Tensor | None
    item_id_bytes: Tensor | None
    seen_offsets: Tensor | None
    seen_items: Tensor | None
    added_items: Tensor | None

    def __init__(self, *, num_users: int | None, num_items: int | None) -> None:
        super().__init__()
        for name, size in (("num_users", num_users), ("num_items", num_items)):
            if size is not None and size < 1:
                raise InputError(f"{name} must be at least 1, got {size}")
        self.num_users = num_users
        self.num_items = num_items
        for name in self.sized_by_file:
            self.register_buffer(name, None)
        # They are the same in every process: DDP need not send them with each step.
        self._ddp_params_and_buffers_to_ignore = list(self.sized_by_file)
        self.register_module("recommender", None)
        self._forget()

    # -- what a subclass says --------------------------------------------------------------------------------------

    def build(self) -> nn.Module:
        """Return the parameters for the sizes that are known."""
        raise NotImplementedError

    def read_data(self, data: Any) -> dict[str, Any]:
        """Return further sizes of the data by argument, and keep what the model needs of them."""
        return {}

    def fill(self) -> None:
        """Fill buffers that come from the data, once the parameters are there."""

    def embed(self) -> tuple[Tensor, Tensor]:
        """Return the embeddings (users, d) and (items, d) for scoring, without chance."""
        raise NotImplementedError

    # -- data ------------------------------------------------------------------------------------------------------

    def attach(self, data: Any) -> None:
        """Take sizes, ids and interactions from a data module that is set up; `setup` does it at the start of fit.

        Args:
            data: see the class.

        Raises:
            InputError: the model belongs to other users or items.
        """
        found = {"num_users": len(data.user_ids), "num_items": len(data.item_ids), **self.read_data(data)}
        if self.recommender is not None:
            self.require_same_data(data)
        for name, value in found.items():
            ours = getattr(self, name)
            if ours is not None and ours != value:
                raise InputError(f"{name} is {ours!r}, but the data have {value!r}: give the data of this model")
            setattr(self, name, value)
        self._arguments.update(found)
        self.hparams.update(found)
        if self.recommender is None:
            self.recommender = self.build().to(self.device)
        seen = pair_lists(
            *data.interactions["train"].cpu(), num_rows=found["num_users"], num_columns=found["num_items"]
        )
        self.seen_offsets, self.seen_items = seen.offsets.to(self.device), seen.columns.int().to(self.device)
        self.user_id_bytes, self.item_id_bytes = (
            names_to_tensor(ids).to(self.device) for ids in (data.user_ids, data.item_ids)
        )
        self.added_items = None
        self._forget()
        self.fill()

    def require_same_data(self, data: Any) -> None:
        """Refuse a data module with other users or items.

        Raises:
            InputError: it has others.
        """
        if self.user_id_bytes is None:
            return
        for what, ours, theirs in (
            ("users", self.users.names, data.user_ids),
            ("items", self.items.names[: self.num_items], data.item_ids),
        ):
            if list(theirs) != ours:
                raise InputError(
                    f"the model was trained on {len(ours)} {what}; these data have {len(theirs)}, and not the same ones in "
                    "the same order: give its own data, or train a new model"
                )

    def setup(self, stage: str) -> None:
        """Take what is needed from the data module.

        Raises:
            InputError: there is none, or the model belongs to other users or items.
        """
        data = getattr(self.trainer, "datamodule", None)
        if data is not None and (stage == "fit" or self.recommender is None):
            self.attach(data)
        elif data is not None:
            self.require_same_data(data)
        elif self.recommender is None:
            raise InputError(
                "a recommender takes its sizes from the data: give fit a data module, or call attach(data)"
            )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Make room for the tables of a checkpoint.

        Raises:
            InputError: it was trained on other users, items or interactions.
        """
        super().on_load_checkpoint(checkpoint)
        for name in self.sized_by_file:
            stored = checkpoint["state_dict"].get(name)
            ours: Tensor | None = getattr(self, name)
            if stored is None:
                continue
            if ours is None:
                setattr(self, name, torch.zeros_like(stored, device=self.device))
            elif name in InteractionModel.sized_by_file and not torch.equal(ours.cpu(), stored.cpu()):
                raise InputError(
                    f"the users, items or interactions are not those of the checkpoint ({name} differs): resume with its "
                    "data"
                )

    # -- caches ----------------------------------------------------------------------------------------------------

    def _forget(self) -> None:
        self._tables: dict[str, Any] = {}
        self._embeddings: tuple[Tensor, Tensor] | None = None

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        self._forget()
        return super()._apply(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load parameters and tables, and forget what was computed from others."""
        self._forget()
        return super().load_state_dict(*args, **kwargs)

    def train(self, mode: bool = True) -> Self:
        """Change the mode; embeddings that were computed for evaluation are dropped by training."""
        if mode:
            self._embeddings = None
        return super().train(mode)

    def table(self, name: str, make: Any) -> Any:
        """Return what `make()` returned the first time, until the model moves or loads."""
        if name not in self._tables:
            # Evaluation may ask first, and what its inference mode makes is of no use for training.
            with torch.inference_mode(False), torch.no_grad():
                self._tables[name] = make()
        return self._tables[name]

    @property
    def users(self) -> NameIndex:
        """The ids of the users."""
        return self._names("user", self.user_id_bytes, self.num_users)

    @property
    def items(self) -> NameIndex:
        """The ids of the items, those of `add_items` last."""
        added = 0 if self.added_items is None else len(self.added_items)
        return self._names("item", self.item_id_bytes, (self.num_items or 0) + added)

    def _names(self, what: str, stored: Tensor | None, count: int | None) -> NameIndex:
        if stored is None:
            raise InputError("the model has no users and items yet: fit it, or load a stored one")

        def make() -> NameIndex:
            names = names_from_tensor(stored, f"{what}s")
            if len(names) != count:
                raise InputError(f"the stored model has {len(names)} ids of {what}s, expected {count}")
            return NameIndex(names, what)

        found: NameIndex = self.table(f"{what}_index", make)
        return found

    def seen(self) -> PairLists:
        """The items of each user in training, on the model's device."""
        found: PairLists = self.table("seen", self._read_seen)
        return found

    def _read_seen(self) -> PairLists:
        offsets, items = self.seen_offsets, self.seen_items
        if offsets is None or items is None:
            raise InputError("the model has no interactions yet: fit it, or load a stored one")
        assert self.num_users is not None
        assert self.num_items is not None
        lists = PairLists(offsets.long(), items.long())
        try:
            require_lists("seen_items", lists, rows=self.num_users, columns=self.num_items)
        except InputError as error:
            raise InputError(
                f"the stored interactions are not whole: store or pull the model anew ({error})"
            ) from error
        return lists

    def graph(self) -> PairLists:
        """The bipartite graph of the interactions in training, on the model's device."""

        def make() -> PairLists:
            seen = self.seen()
            assert self.num_users is not None
            assert self.num_items is not None
            return interaction_graph(seen.rows(), seen.columns, num_users=self.num_users, num_items=self.num_items)

        found: PairLists = self.table("graph", make)
        return found

    def embeddings(self) -> tuple[Tensor, Tensor]:
        """Return the embeddings (users, d) and (items, d) that are scored; kept in eval mode until training goes on."""
        if self._embeddings is None:
            if self.recommender is None:
                raise InputError("the model has no parameters yet: fit it, or load a stored one")
            with torch.inference_mode(False), torch.no_grad(), torch.autocast(self.device.type, enabled=False):
                users, items = self.embed()
                if self.added_items is not None:
                    items = torch.cat([items, self.added_items.to(items)])
            if self.training:
                return users, items
            self._embeddings = users, items
        return self._embeddings
