"""The parts of CM3 put together by hand: the whole toy model of the notes, to ten digits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.interaction_graph import interaction_graph, propagate_interactions
from zoo.item_graph import item_graph, propagate_items
from zoo.losses.cm3 import alignment_loss, calibrated_uniformity_loss, uniformity_loss
from zoo.losses.spherical import slerp

# Inputs and numbers: section 7.4 of the project's notes on CM3 (shared/papers/cm3.md), compared there with the official
# model in float64. Three users, five items, of which the last has no interaction.
USERS, ITEMS = torch.tensor([0, 0, 1, 1, 2]), torch.tensor([0, 1, 1, 2, 3])
WEIGHT_OF_TEXT = [0.25, 0.5, 0.75, 0.1, 0.9]
MIX = [
    [0.2288730853, -0.9734562706],
    [0.8995049685, 0.4369105305],
    [0.0162249666, -0.9998683666],
    [0.8536988652, 0.5207669801],
    [-0.9974227219, -0.0717489646],
]
USER_0 = [0.8827407018, 0.9203913847, 0.3720649065, -0.1237927354, 0.5988846632, -0.5390629744]
ITEM_0 = [2.7752046925, 1.6186529655, 0.0455876265, -2.7038439391, 1.4702634739, -2.6880004060]
ITEM_4 = [-0.3970173278, -0.2423758363, -0.7115942247, -2.0873710450, -0.8903681751, -0.8812178319]
SCORES = [
    [6.6207779150, 6.9628208712, 2.1372862513, 1.0094674926, -0.6380977923],
    [6.5523031249, 6.5792152269, 5.0041786759, 2.8547005111, 0.7620499311],
    [4.0349546620, 4.5050071495, 4.8934892836, 4.1290287433, 1.9695999709],
]
LOSSES = {"L_a": 0.6526411985, "L_u": -1.2304295132, "L_i": 2.6750882099, "total": 1.0138058727}
# Rows of the item graph: 0.5 in both lists, 0.45 in the text's, 0.05 in the image's; all times 1 / (1 + 5e-8).
GRAPH = [
    {0: 0.5, 1: 0.05, 4: 0.45},
    {0: 0.05, 1: 0.5, 3: 0.45},
    {2: 0.5, 3: 0.05, 4: 0.45},
    {1: 0.45, 2: 0.05, 3: 0.5},
    {0: 0.45, 3: 0.05, 4: 0.5},
]
CLOSE: dict[str, Any] = {"rtol": 0, "atol": 2e-10}


def double(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def wave(seed: float, rows: int, columns: int) -> Tensor:
    r, c = torch.arange(rows).double().unsqueeze(1), torch.arange(columns).double()
    return 0.5 * torch.sin(seed + 0.7 * r + 1.3 * c)


def raw_features() -> tuple[Tensor, Tensor]:
    def rows(seed: float, width: int, shift: int) -> Tensor:
        r, c = torch.arange(5).double().unsqueeze(1), torch.arange(width).double()
        return torch.sin(seed + 0.7 * r + 1.3 * c) + 0.3 * torch.cos((r + shift) * (c + 1))

    return rows(0.1, 4, 1), rows(2.0, 3, 2)[[2, 0, 4, 1, 3]]


def mlp(features: Tensor, first: float, bias: float, second: float) -> Tensor:
    hidden = F.leaky_relu(features @ wave(first, 8, features.shape[1]).t() + wave(bias, 8, 1).squeeze(1), 0.01)
    return hidden @ wave(second, 2, 8).t()


def head(features: Tensor, weight: float, bias: float) -> Tensor:
    return features @ wave(weight, 2, features.shape[1]).t() + wave(bias, 2, 1).squeeze(1)


@pytest.fixture(scope="module")
def model() -> dict[str, Tensor]:
    image, text = raw_features()
    mix = slerp(head(text, 0.8, 0.2), head(image, 1.9, 2.6), double(WEIGHT_OF_TEXT))
    segments = [
        F.normalize(torch.cat([wave(seed, 3, 2), side]))
        for seed, side in ((0.4, mlp(image, 0.3, 0.9, 1.1)), (1.4, mlp(text, 0.5, 1.7, 2.2)), (2.4, mix))
    ]
    graph = interaction_graph(USERS, ITEMS, num_users=3, num_items=5)
    nodes = propagate_interactions(graph, torch.cat(segments, 1), hops=2)
    gates = wave(3.0, 3, 3).softmax(1).repeat_interleave(2, dim=1)
    similar = item_graph([image, text], k=2, modality_weights=[0.1, 0.9], dtype=torch.float64)
    items = nodes[3:]
    return {"mix": mix, "users": nodes[:3] * gates, "items": items + propagate_items(similar, items)}


def test_golden_item_graph() -> None:
    graph = item_graph(raw_features(), k=2, modality_weights=[0.1, 0.9], dtype=torch.float64)
    dense = propagate_items(graph, torch.eye(5, dtype=torch.float64))
    expected = torch.zeros(5, 5, dtype=torch.float64)
    for row, values in enumerate(GRAPH):
        for column, value in values.items():
            expected[row, column] = value / (1 + 5e-8)
    torch.testing.assert_close(dense, expected, rtol=0, atol=1e-15)


def test_golden_embeddings(model: dict[str, Tensor]) -> None:
    torch.testing.assert_close(model["mix"], double(MIX), **CLOSE)
    torch.testing.assert_close(model["users"][0], double(USER_0), **CLOSE)
    torch.testing.assert_close(model["items"][[0, 4]], double([ITEM_0, ITEM_4]), **CLOSE)
    torch.testing.assert_close(model["users"] @ model["items"].t(), double(SCORES), **CLOSE)


def test_golden_losses(model: dict[str, Tensor]) -> None:
    users, positives, negatives = [0, 1, 2], [1, 2, 3], [3, 0, 1]
    values = {
        "L_a": alignment_loss(model["users"][users], model["items"][positives]),
        "L_u": uniformity_loss(model["users"][users]),
        "L_i": calibrated_uniformity_loss(model["items"][negatives], model["mix"][negatives], max_similarity=0.8),
    }
    values["total"] = values["L_a"] + 0.5 * (values["L_u"] + values["L_i"]) / 2
    assert {name: value.item() for name, value in values.items()} == pytest.approx(LOSSES, abs=2e-10)
