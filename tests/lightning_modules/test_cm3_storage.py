"""CM3 from checkpoints and stored folders: the ids, graphs and parts come along, the features do not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from zoo.lightning_modules.cm3 import CM3

import zoo
from tests.cm3_cases import small_data, small_model, toy_data, toy_model
from tests.training import quick_trainer
from zoo.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore:.*(num_workers|tensorboard|litlogger|eval mode|weights_only).*")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[CM3, Path]:
    """A model after an epoch, and a folder with its checkpoint and its stored form."""
    folder = tmp_path_factory.mktemp("cm3")
    torch.manual_seed(0)
    model, trainer = small_model(), quick_trainer(max_epochs=1)
    trainer.fit(model, small_data())
    trainer.save_checkpoint(folder / "one.ckpt")
    model.eval().save_pretrained(folder / "stored")
    return model, folder


def same(one: CM3, other: CM3) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(value, second[key]) for key, value in first.items())


def test_stored_model_needs_no_data(trained: tuple[CM3, Path]) -> None:
    model, folder = trained
    loaded = CM3.from_pretrained(folder / "stored")
    assert same(model, loaded)
    for ours, theirs in zip(loaded.embeddings(), model.embeddings(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert loaded.users.names == [f"u{number}" for number in range(40)]
    assert loaded.recommend(["u7", "u3"], 4) == model.recommend(["u7", "u3"], 4)


def test_ids_are_tensors_and_features_are_not_there(trained: tuple[CM3, Path]) -> None:
    model, folder = trained
    config = json.loads((folder / "stored/config.json").read_text())
    assert config["args"]["num_users"] == 40
    assert config["args"]["feature_dims"] == {"image": 8, "text": 6}
    assert "u39" not in json.dumps(config)
    tensors = load_file(folder / "stored/model.safetensors")
    assert json.loads(bytes(tensors["user_id_bytes"].numpy()))[39] == "u39"
    learned = sum(parameter.numel() for parameter in model.parameters())
    floats = {name: tensor.numel() for name, tensor in tensors.items() if tensor.is_floating_point()}
    # Parameters, the parts of 60 items, and the weights of their neighbours.
    assert sum(floats.values()) == learned + 60 * 12 + 60 * 2


def test_parts_are_those_of_the_parameters_that_are_stored() -> None:
    """Saved in the middle of training, they are computed anew."""
    model = toy_model()
    before = model.state_dict()["item_parts"].clone()
    with torch.no_grad():
        model.model.encoders.encoders[0].reader.weight.add_(1)
    after = model.state_dict()["item_parts"]
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, model._encode(0.5)[0].detach())


def test_checkpoint_goes_on_as_if_nothing_had_been(trained: tuple[CM3, Path]) -> None:
    """In a model of the checkpoint, and in one that knows no sizes yet."""
    model, folder = trained
    resumed = CM3.load_from_checkpoint(folder / "one.ckpt", weights_only=True)
    assert same(model, resumed)
    finished = []
    for start, path in ((resumed, folder / "one.ckpt"), (small_model(), folder / "one.ckpt"), (small_model(), None)):
        torch.manual_seed(0)
        given: dict[str, Any] = {"ckpt_path": str(path), "weights_only": True} if path else {}
        quick_trainer(max_epochs=2).fit(start, small_data(), **given)
        finished.append(start)
    assert same(finished[0], finished[1])
    assert same(finished[0], finished[2])


def test_other_data_are_refused(trained: tuple[CM3, Path]) -> None:
    _, folder = trained
    loaded = CM3.from_pretrained(folder / "stored", for_training=True)
    with pytest.raises(InputError, match="trained on 40 users; these data have 30"):
        quick_trainer(max_epochs=1).fit(loaded, small_data(num_users=30))
    with pytest.raises(InputError, match="trained on 40 users; these data have 30"):
        quick_trainer().validate(loaded, small_data(num_users=30), verbose=False)
    with pytest.raises(InputError, match="not those of the checkpoint"):
        quick_trainer(max_epochs=2).fit(
            small_model(), small_data(data_seed=1), ckpt_path=str(folder / "one.ckpt"), weights_only=True
        )


def test_loaded_model_evaluates_and_trains_on(trained: tuple[CM3, Path]) -> None:
    model, folder = trained
    found = []
    for one in (model, CM3.from_pretrained(folder / "stored", for_training=True)):
        trainer = quick_trainer()
        trainer.limit_test_batches = 1.0
        found.append(trainer.test(one, small_data(), verbose=False)[0])
    assert found[0] == found[1]
    before = one.model.user_parts.detach().clone()
    quick_trainer(max_epochs=1, limit_train_batches=1).fit(one, small_data())
    assert not torch.equal(before, one.model.user_parts)


def test_test_may_leave_out_the_items_of_validation(trained: tuple[CM3, Path]) -> None:
    _, folder = trained
    data = small_data()
    loaded = CM3.from_pretrained(folder / "stored", mask_validation=True)
    trainer = quick_trainer()
    trainer.limit_test_batches = 1.0
    trainer.test(loaded, data, verbose=False)
    masked, seen = loaded._read_masked(), loaded.seen()
    pairs = set(zip(masked.rows().tolist(), masked.columns.tolist(), strict=True))
    expected = set(zip(seen.rows().tolist(), seen.columns.tolist(), strict=True))
    assert pairs == expected | set(zip(*data.interactions["val"].tolist(), strict=True))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "seen_items",
            torch.tensor([99], dtype=torch.int32),
            "are not whole.*rise from 0 to the number of columns, 1, got 0 … 5",
        ),
        (
            "seen_items",
            torch.tensor([99] * 5, dtype=torch.int32),
            "are not whole.*must hold numbers in 0 … 4, found 99",
        ),
        ("seen_items", torch.tensor([-1, 0, 1, 2, 3], dtype=torch.int32), "interactions are not whole.*found -1"),
        ("seen_offsets", torch.tensor([0, 2, 1, 5]), "interactions are not whole.*rise from 0"),
        ("seen_offsets", torch.tensor([1, 2, 3, 5]), "interactions are not whole.*got 1 … 5"),
        ("neighbour_items", torch.full((5, 2, 2), 5, dtype=torch.int32), "graph of items is not whole"),
        ("item_parts", torch.zeros(4, 6), "no parts of items of shape"),
        ("user_id_bytes", torch.tensor([91], dtype=torch.uint8), "stored ids of the users cannot be read"),
        ("item_id_bytes", torch.tensor(list(b'["a"]'), dtype=torch.uint8), "has 1 ids of items, expected 5"),
    ],
)
def test_tables_of_a_hostile_file_are_refused(name: str, value: torch.Tensor, message: str) -> None:
    model = toy_model().eval()
    model._features = {}
    setattr(model, name, value)
    with pytest.raises(InputError, match=message):
        model.recommend(["ann"], 2)


def test_half_precision_round_trip(tmp_path: Path) -> None:
    """Cast as a whole, it is stored and scores as it did."""
    data: Any = toy_data()
    model = CM3(dim=2, neighbours=2)
    model.attach(data)
    model.state_dict()
    model.teardown("fit")
    expected = model.eval()(torch.arange(3))
    model.bfloat16().save_pretrained(tmp_path)
    loaded = zoo.from_pretrained(tmp_path)
    assert next(loaded.parameters()).dtype == torch.bfloat16
    torch.testing.assert_close(loaded(torch.arange(3)), expected, rtol=0.05, atol=0.2)
