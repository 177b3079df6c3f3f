"""Users and items of CM3 in their graphs: from parts on the sphere to embeddings.

"Calibrating Multimodal Recommendation" (arXiv 2508.01226), sections 1.2, 1.3 and 1.6 of the project's notes on its release.
With S = M + 1 parts of width d (one a modality, and the fused one), P_u a user's tables and P_i the parts of an item:

    R = sum_{l=0..L} hat A^l [unit parts of P_u; P_i]          over all users and items
    user = R_u, part j times softmax(gate_u)_j                 item = R_i + (S^l R)_i

hat A is the graph of interactions, S the mean over neighbours in the features.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from zoo.interaction_graph import PairLists, propagate_interactions
from zoo.item_graph import ItemGraph, propagate_items
from zoo.losses.contracts import unit_rows, working_dtype
from zoo.losses.spherical import BezierMode
from zoo.multimodal_items import ItemEncoders

__all__ = ["MultimodalGraph"]


class MultimodalGraph(nn.Module):
    """The parameters of CM3, and what they make of parts and graphs.

    Args:
        num_users: number of users.
        widths: modality -> width of its raw features.
        dim: d, width of a part.
        hops: L, hops over the interactions, at least 0.
        item_hops: l, hops over neighbours in the features, at least 0; with 0 an item is R_i.
        mode: how three and more modalities are fused, see `zoo.losses.spherical_bezier`.
    """

    def __init__(
        self,
        num_users: int,
        widths: Mapping[str, int],
        *,
        dim: int,
        hops: int,
        item_hops: int,
        mode: BezierMode = "de_casteljau",
    ) -> None:
        super().__init__()
        self.num_users = num_users
        self.parts = len(widths) + 1
        self.dim = dim
        self.hops = hops
        self.item_hops = item_hops
        self.encoders = ItemEncoders(widths, dim, mode=mode)
        # The scales of the release's Xavier initialisation, for each table (users, d) and for the gate (users, S, 1).
        self.user_parts = nn.Parameter(torch.randn(num_users, self.parts * dim) * (2 / (num_users + dim)) ** 0.5)
        self.gate = nn.Parameter(torch.randn(num_users, self.parts) * (2 / (num_users + self.parts)) ** 0.5)

    def propagate(self, item_parts: Tensor, graph: PairLists) -> tuple[Tensor, Tensor]:
        """Return R of users (U, S d) and of items (I, S d), float32 or float64.

        Args:
            item_parts: (I, S d), of `ItemEncoders`.
            graph: of the interactions.
        """
        tables = self.user_parts.to(working_dtype(self.user_parts))
        units = unit_rows(tables.view(-1, self.dim)).view_as(tables)
        rows = propagate_interactions(graph, torch.cat([units, item_parts]), hops=self.hops)
        users, items = rows.tensor_split([self.num_users])
        return users, items

    def user_embeddings(self, propagated: Tensor, rows: Tensor | None = None) -> Tensor:
        """Return embeddings (U, S d), or (R, S d) of some users.

        Args:
            propagated: R of all users.
            rows: numbers of users (R,); None for all.
        """
        gate: Tensor = self.gate
        if rows is not None:
            propagated, gate = propagated[rows], gate[rows]
        shares = gate.to(propagated.dtype).softmax(1).unsqueeze(2)
        return (propagated.view(-1, self.parts, self.dim) * shares).flatten(1)

    def item_embeddings(self, propagated: Tensor, graph: ItemGraph, rows: Tensor | None = None) -> Tensor:
        """Return embeddings (I, S d), or (R, S d) of some items.

        Args:
            propagated: R of all items.
            graph: of the items.
            rows: numbers of items (R,); None for all.
        """
        own = propagated if rows is None else propagated[rows]
        if self.item_hops == 0:
            return own
        for _ in range(self.item_hops - 1):
            propagated = propagate_items(graph, propagated)
        return own + propagate_items(graph, propagated, rows)

    def new_item_embeddings(self, parts: Tensor, propagated: Tensor, graph: ItemGraph, neighbours: ItemGraph) -> Tensor:
        """Return embeddings (n, S d) of items without interactions that came after the graph was built.

        Args:
            parts: their unit parts (n, S d).
            propagated: R of all items of the graph.
            graph: of these items.
            neighbours: the nearest items of each new one in the graph, by number (n, M, k - 1), and the weights (n, M) of
                each of its k neighbours, of which it is itself one.
        """
        found, weights = neighbours
        share = weights.to(parts).unsqueeze(2)
        total = hop = parts
        for step in range(self.item_hops):
            near = propagated[found].sum(2)
            hop = (share * (hop.unsqueeze(1) + near)).sum(1)
            propagated = propagate_items(graph, propagated) if step + 1 < self.item_hops else propagated
        return total + hop if self.item_hops else total
