"""CM3: the toy model of the project's notes, training, chance, missing modalities, processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from zoo.lightning_modules.cm3 import CM3

from tests.cm3_cases import LAMBDA, TOY_BATCH, small_data, small_model, toy_data, toy_model
from tests.processes import run_processes
from tests.training import quick_trainer
from zoo.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore:.*(num_workers|tensorboard|litlogger|eval mode).*")

# Section 7.4 of the notes.
MIX = [
    [0.2288730853, -0.9734562706], [0.8995049685, 0.4369105305], [0.0162249666, -0.9998683666],
    [0.8536988652, 0.5207669801], [-0.9974227219, -0.0717489646],
]  # fmt: skip
GRAPH = [
    {0: 0.5, 1: 0.05, 4: 0.45}, {0: 0.05, 1: 0.5, 3: 0.45}, {2: 0.5, 3: 0.05, 4: 0.45}, {1: 0.45, 2: 0.05, 3: 0.5},
    {0: 0.45, 3: 0.05, 4: 0.5},
]  # fmt: skip
USER_0 = [0.8827407018, 0.9203913847, 0.3720649065, -0.1237927354, 0.5988846632, -0.5390629744]
ITEM_0 = [2.7752046925, 1.6186529655, 0.0455876265, -2.7038439391, 1.4702634739, -2.6880004060]
ITEM_4 = [-0.3970173278, -0.2423758363, -0.7115942247, -2.0873710450, -0.8903681751, -0.8812178319]
SCORES = [
    [6.6207779150, 6.9628208712, 2.1372862513, 1.0094674926, -0.6380977923],
    [6.5523031249, 6.5792152269, 5.0041786759, 2.8547005111, 0.7620499311],
    [4.0349546620, 4.5050071495, 4.8934892836, 4.1290287433, 1.9695999709],
]


def close(found: Tensor, expected: Any) -> None:
    torch.testing.assert_close(found.detach(), torch.as_tensor(expected, dtype=torch.float64), rtol=0, atol=1e-9)


def test_golden_toy_model() -> None:
    model = toy_model()
    parts, fused = model._encode(LAMBDA)
    close(fused, MIX)
    dense = torch.zeros(5, 5, dtype=torch.float64)
    graph = model.item_graph()
    for item in range(5):
        for modality in range(2):
            dense[item, graph.neighbours[item, modality]] += graph.weights[item, modality]
    expected = torch.zeros(5, 5, dtype=torch.float64)
    for item, row in enumerate(GRAPH):
        for other, weight in row.items():
            expected[item, other] = weight / (1 + 5e-8)
    close(dense, expected)
    users, items = model.model.propagate(parts, model.graph())
    users, items = model.model.user_embeddings(users), model.model.item_embeddings(items, graph)
    close(users[0], USER_0)
    close(items[0], ITEM_0)
    close(items[4], ITEM_4)
    close(users @ items.t(), SCORES)
    losses = model.losses(TOY_BATCH, parts, fused)
    close(losses["alignment"], 0.6526411985)
    close(losses["user_uniformity"], -1.2304295132)
    close(losses["item_uniformity"], 2.6750882099)
    total = losses["alignment"] + model.uniformity_weight * (losses["user_uniformity"] + losses["item_uniformity"]) / 2
    close(total, 1.0138058727)


def test_evaluation_is_one_clean_forward() -> None:
    """Lambda is 1/2, whatever was drawn before, and the cached embeddings go with training."""
    model = toy_model().eval()
    parts, _ = model._encode(0.5)
    users, items = model.model.propagate(parts, model.graph())
    expected = model.model.user_embeddings(users) @ model.model.item_embeddings(items, model.item_graph()).t()
    close(model(torch.arange(3)), expected)
    assert model.embeddings() is model.embeddings()
    with torch.no_grad():
        model.model.user_parts.neg_()
    close(model(torch.arange(3)), expected)
    model.train()
    model.eval()
    assert not torch.allclose(model(torch.arange(3)), expected)


def test_fusion_weights_follow_seed_and_step_alone() -> None:
    model = small_model()
    model.attach(small_data())
    first = model.fusion_weights(7)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert torch.equal(model.fusion_weights(7), first)
    assert torch.equal(torch.get_rng_state(), state), "the draw is no part of the global sequence"
    assert not torch.equal(model.fusion_weights(8), first)
    model._seed = 1
    assert not torch.equal(model.fusion_weights(7), first)
    assert bool(((first >= 0) & (first <= 1)).all())


@pytest.mark.parametrize(("alpha", "outer"), [(0.1, 0.32), (0.5, 0.063), (0.9, 0.014)])
def test_fusion_weights_are_of_the_beta_distribution(alpha: float, outer: float) -> None:
    """Section 1.4 of the notes counts the share below 0.01; a quarter of its error is allowed for 40,000 draws."""
    model = CM3(alpha=alpha)
    model.num_items = 40_000
    drawn = model.fusion_weights(0)
    assert float((drawn < 0.01).float().mean()) == pytest.approx(outer, rel=0.15)
    assert float(drawn.mean()) == pytest.approx(0.5, abs=0.01)


@pytest.fixture(scope="module")
def trained() -> tuple[CM3, dict[str, Tensor]]:
    """A model after two epochs, and what was logged."""
    torch.manual_seed(0)
    model = small_model(detach_similarity=True)
    trainer = quick_trainer(max_epochs=3)
    trainer.fit(model, small_data())
    logged = dict(trainer.callback_metrics)
    validation = quick_trainer()
    validation.limit_val_batches = 1.0
    found: Any = validation.validate(model, small_data(), verbose=False)[0]
    return model, {**logged, **found}


def test_training_logs_the_terms_and_the_share_of_clipped_pairs(trained: tuple[CM3, dict[str, Tensor]]) -> None:
    _, logged = trained
    loss = logged["train/alignment"] + 0.5 * (logged["train/user_uniformity"] + logged["train/item_uniformity"]) / 2
    assert float(logged["train/loss"]) == pytest.approx(float(loss), abs=1e-5)
    assert {"cm3/similarity", "cm3/clipped_share", "cm3/clipped_above"} <= logged.keys()
    assert 0 < logged["val/recall@20"] <= 1
    assert {f"val/{m}@{k}" for m in ("recall", "ndcg", "precision", "map") for k in (5, 20)} <= logged.keys()


def test_edge_evaluation_before_training() -> None:
    """Lightning's sanity check asks for the graphs in inference mode; what it gets has to do for training as well."""
    model = small_model()
    model.attach(small_data())
    with torch.inference_mode():
        assert not model.graph().columns.is_inference()
    trainer = quick_trainer(max_steps=1)
    trainer.limit_val_batches, trainer.num_sanity_val_steps = 1.0, 1
    trainer.fit(model, small_data())
    assert trainer.global_step == 1
    assert not any(part.is_inference() for part in model.embeddings())
    assert model._features == {}
    assert "features" not in model._tables


def test_training_learns(trained: tuple[CM3, dict[str, Tensor]]) -> None:
    """After three epochs held-out items come sooner than by chance, which finds 20 of 60."""
    assert float(trained[1]["val/recall@20"]) > 0.45


def test_one_step_moves_every_parameter() -> None:
    model, data = small_model(), small_data()
    model.attach(data)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    quick_trainer(max_steps=1).fit(model, data)
    assert before.keys() == dict(model.named_parameters()).keys()
    assert all(not torch.equal(before[name], value) for name, value in model.named_parameters())


@pytest.mark.parametrize("modalities", [{"text": 5}, {"audio": 4, "image": 8, "text": 6}])
def test_any_number_of_modalities(modalities: dict[str, int]) -> None:
    model = small_model(fusion="fold")
    quick_trainer(max_epochs=1, limit_train_batches=2).fit(model, small_data(modalities=modalities, missing=0.3))
    assert model.feature_dims == modalities
    assert model.embeddings()[1].shape == (60, (len(modalities) + 1) * 4)
    assert all(bool(part.isfinite().all()) for part in model.embeddings())


def test_edge_what_stands_for_a_missing_modality_does_not_count() -> None:
    """NaN there changes nothing; an item with no modality at all is what its users make of it."""
    found = []
    for filling in (0.0, torch.nan):
        data = toy_data()
        data.present["image"][1] = False
        data.features["image"][1] = filling
        data.present["text"][4] = data.present["image"][4] = False
        torch.manual_seed(0)
        model = CM3(dim=2, neighbours=2)
        model.attach(data)
        loss = sum(model.losses(TOY_BATCH, *model._encode(0.5)).values())
        assert isinstance(loss, Tensor)
        loss.backward()  # type: ignore[no-untyped-call]
        found.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
        assert bool((model.embeddings()[1][4] == 0).all())
    for clean, other in zip(*found, strict=True):
        assert torch.equal(clean, other)


def test_detached_similarity_leaves_the_fused_features_to_the_embeddings() -> None:
    grads = []
    for detach in (False, True):
        model = toy_model(detach_similarity=detach)
        parts, fused = model._encode(LAMBDA)
        fused = fused.detach().requires_grad_()
        model.losses(TOY_BATCH, parts.detach(), fused)["item_uniformity"].backward()
        grads.append(fused.grad)
    assert grads[0] is not None
    assert grads[1] is None


def _share(rank: int, world_size: int) -> dict[str, Tensor]:
    model = toy_model()
    rows = {
        "user": torch.tensor([0, 1, 2, 0]), "positive": torch.tensor([1, 2, 3, 0]), "negative": torch.tensor([3, 0, 1, 4]),
    }  # fmt: skip
    batch = {name: value.chunk(world_size)[rank] for name, value in rows.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CM3, "_spans_processes", world_size > 1)
        losses = model.losses(batch, *model._encode(LAMBDA))
    loss = losses["alignment"] + (losses["user_uniformity"] + losses["item_uniformity"]) / 4
    loss.backward()
    return {"loss": loss.detach(), **{name: value.grad for name, value in model.named_parameters()}}


def test_two_processes_equal_one(tmp_path: Path) -> None:
    """The loss is that of all batches, and the mean of the gradients its gradient."""
    both = run_processes(_share, world_size=2, folder=tmp_path)
    alone = _share(0, 1)
    for name, expected in alone.items():
        torch.testing.assert_close((both[0][name] + both[1][name]) / 2, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(both[0]["loss"], both[1]["loss"], rtol=0, atol=0)


def test_ddp_is_told_to_leave_tables_alone() -> None:
    """They are equal everywhere, and sending them with each step would take longer than the step."""
    model = small_model()
    model.attach(small_data())
    sent = {name for name, _ in model.named_buffers()} - set(model._ddp_params_and_buffers_to_ignore)
    assert sent == set()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 0}, "dim must be finite and at least 1, got 0"),
        ({"alpha": 0.0}, "alpha must be positive"),
        ({"eval_lambda": 1.5}, "eval_lambda must be in 0 … 1"),
        ({"uniformity_weight": -1.0}, "uniformity_weight must be finite and at least 0"),
        ({"score": "cos"}, "score must be one of dot, cosine"),
        ({"fusion": "mean"}, "fusion must be one of de_casteljau, fold"),
        ({"num_users": 0}, "num_users must be at least 1"),
        ({"num_users": 2, "num_items": 2, "feature_dims": {}}, "at least one modality"),
        ({"min_similarity": 0.9, "max_similarity": 0.8}, "min_similarity <= max_similarity"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        CM3(**options)


def test_bad_data() -> None:
    with pytest.raises(InputError, match="modality_weights must name the modalities"):
        small_model(modality_weights={"image": 1.0}).attach(small_data())
    with pytest.raises(InputError, match=r"feature_dims is .* but the data have"):
        small_model(feature_dims={"image": 3}).attach(small_data())
    data = toy_data()
    data.features = {}
    with pytest.raises(InputError, match="CM3 needs features"):
        CM3().attach(data)
    with pytest.raises(InputError, match="takes its sizes from the data"):
        quick_trainer(max_epochs=1).fit(CM3(), small_data().train_dataloader())
