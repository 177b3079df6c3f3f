"""Lists for users, neighbours of items, export and new items, by the user's own ids."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from zoo.lightning_modules.cm3 import CM3

from tests.cm3_cases import toy_data, toy_model
from zoo.embedding_export import write_embeddings
from zoo.errors import InputError
from zoo.stored_ids import NameIndex, names_to_tensor

SEEN = {"ann": {"a", "b"}, "bob": {"b", "c"}, "cid": {"d"}}


@pytest.fixture(scope="module")
def model() -> CM3:
    found = toy_model(keep_features=True).eval()
    found.teardown("fit")
    return found


def scores(model: CM3) -> dict[str, dict[str, float]]:
    users, items = model.embeddings()
    rows = (users @ items.t()).tolist()
    return {u: dict(zip(model.items.names, row, strict=True)) for u, row in zip(model.users.names, rows, strict=True)}


def test_recommend_leaves_out_what_was_seen(model: CM3) -> None:
    found = model.recommend(["cid", "ann", "cid"], 5)
    for user, items, values in zip(["cid", "ann", "cid"], *found, strict=True):
        expected = sorted(
            ((value, name) for name, value in scores(model)[user].items() if name not in SEEN[user]), reverse=True
        )
        assert items == [name for _, name in expected]
        assert values == pytest.approx([value for value, _ in expected], rel=1e-6)
    assert set(model.recommend(["ann"], 5, exclude_seen=False).items[0]) == set("abcde")
    assert model.recommend(["ann"], 1).items == [found.items[1][:1]]
    assert model.recommend([]) == ([], [])


def test_recommend_among_candidates(model: CM3) -> None:
    assert set(model.recommend(["ann"], 9, candidates=["e", "b", "c"]).items[0]) == {"c", "e"}
    with pytest.raises(InputError, match="1 of the 2 items are unknown, the first is 'z'"):
        model.recommend(["ann"], candidates=["a", "z"])


def test_unknown_user_is_told_the_nearest_and_the_remedy(model: CM3) -> None:
    with pytest.raises(InputError, match=r"the first is 'anne'. Did you mean ann\?.*histories="):
        model.recommend(["bob", "anne"])
    with pytest.raises(InputError, match="not the one string 'ann'"):
        model.recommend("ann")
    with pytest.raises(InputError, match="Ids are strings, this is int"):
        model.recommend([0])  # type: ignore[list-item]


def test_new_user_is_the_mean_of_their_items_or_of_all_users(model: CM3) -> None:
    users, items = model.embeddings()
    found = model.recommend(["new", "none", "bob"], 5, histories={"new": ["b", "d"], "none": []})
    expected = items @ items[[1, 3]].mean(0)
    assert found.items[0] == [
        model.items.names[i] for i in expected.argsort(descending=True).tolist() if i not in (1, 3)
    ]
    expected = items @ users.mean(0)
    assert found.items[1] == [model.items.names[i] for i in expected.argsort(descending=True).tolist()]
    assert found.items[2] == model.recommend(["bob"], 5).items[0]


def test_cosine_differs_from_dot(model: CM3) -> None:
    found = model.recommend(["ann"], 5, exclude_seen=False, score="cosine").scores[0]
    assert max(found) <= 1 + 1e-6
    users, items = (torch.nn.functional.normalize(part, dim=1) for part in model.embeddings())
    assert found == pytest.approx((items @ users[0]).sort(descending=True).values.tolist(), abs=1e-6)


def test_similar_items_leave_themselves_out(model: CM3) -> None:
    items = torch.nn.functional.normalize(model.embeddings()[1], dim=1)
    cosines = (items @ items.t()).fill_diagonal_(-2)
    found = model.similar_items(["c", "a"], 4)
    assert found.items[0][0] == model.items.names[int(cosines[2].argmax())]
    assert "a" not in found.items[1]
    assert len(found.items[1]) == 4


@pytest.mark.parametrize("suffix", [".npz", ".parquet"])
def test_export(model: CM3, tmp_path: Path, suffix: str) -> None:
    users, items = (part.float().numpy() for part in model.embeddings())
    path = model.export_embeddings(tmp_path / f"embeddings{suffix}")
    if suffix == ".npz":
        with np.load(path, allow_pickle=False) as file:
            assert file["item_ids"].tolist() == model.items.names
            assert str(file["measure"]) == "ip"
            np.testing.assert_array_equal(file["users"], users)
            np.testing.assert_array_equal(file["items"], items)
        return
    table = pq.read_table(path)
    assert table.schema.metadata[b"measure"] == b"ip"
    assert table["id"].to_pylist() == [*model.users.names, *model.items.names]
    assert table["kind"].to_pylist() == ["user"] * 3 + ["item"] * 5
    np.testing.assert_array_equal(np.stack(table["embedding"].to_numpy()), np.concatenate([users, items]))


def test_bad_export(tmp_path: Path) -> None:
    rows = torch.zeros(1, 2)
    given = {"users": rows, "items": rows, "user_ids": ["u"], "item_ids": ["i"], "measure": "cos"}
    with pytest.raises(InputError, match=r"must end in .npz or .parquet"):
        write_embeddings(tmp_path / "a.csv", **given)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="folder that exists"):
        write_embeddings(tmp_path / "no/a.npz", **given)  # type: ignore[arg-type]


def test_new_item_is_its_parts_and_the_mean_of_its_neighbours(model: CM3, tmp_path: Path) -> None:
    """Formula of section 5 of the notes, restated by hand: k = 2, itself and one neighbour in each modality."""
    added = toy_model(keep_features=True).eval()
    added.teardown("fit")
    data = toy_data()
    image, text = torch.randn(2, 4).double(), torch.randn(2, 3).double()
    text[1] = 0  # lacks it
    added.add_items(["x", "y"], {"image": image, "text": text})
    assert added.items.names == [*"abcde", "x", "y"]
    present = torch.tensor([[True, True], [True, False]])
    parts, _ = added.model.encoders({"image": image, "text": text}, present, 0.5)
    _, known = added.model.propagate(model.item_parts, model.graph())
    nearest = {
        name: (torch.nn.functional.normalize(rows, dim=1) @ torch.nn.functional.normalize(data.features[name], dim=1).t())
        .argmax(1)
        for name, rows in (("image", image), ("text", text))
    }  # fmt: skip
    first = (
        parts[0] + 0.1 * (parts[0] + known[nearest["image"][0]]) / 2 + 0.9 * (parts[0] + known[nearest["text"][0]]) / 2
    )
    second = parts[1] + (parts[1] + known[nearest["image"][1]]) / 2
    torch.testing.assert_close(added.embeddings()[1][5:], torch.stack([first, second]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(added.embeddings()[1][:5], model.embeddings()[1])
    assert set(added.recommend(["ann"], 9).items[0]) == set("cdexy")


def test_new_items_are_stored_and_come_in_several_calls(tmp_path: Path) -> None:
    model = CM3(dim=2, neighbours=2)
    model.attach(toy_data())
    model.eval().teardown("fit")
    known = {name: rows.float() for name, rows in toy_data().features.items()}
    model.add_items(["x"], {"image": torch.randn(1, 4)}, known_features=known)
    model.add_items(["y"], {"text": torch.randn(1, 3)}, known_features=known)
    model.save_pretrained(tmp_path)
    loaded = CM3.from_pretrained(tmp_path)
    assert loaded.items.names[5:] == ["x", "y"]
    assert loaded.similar_items(["y"], 3) == model.similar_items(["y"], 3)
    assert loaded.recommend(["new"], 2, histories={"new": ["x"]}, candidates=["y"]).items == [["y"]]


def test_bad_new_items(model: CM3) -> None:
    one = {"image": torch.zeros(1, 4)}
    with pytest.raises(InputError, match="ids must be different, 'a' is there twice"):
        model.add_items(["a"], one)
    with pytest.raises(InputError, match=r"features\['images'\].*Did you mean image"):
        model.add_items(["x"], {"images": torch.zeros(1, 4)})
    with pytest.raises(InputError, match=r"finite and of shape \(1, 4\)"):
        model.add_items(["x"], {"image": torch.zeros(2, 4)})
    with pytest.raises(InputError, match="at least one of the modalities"):
        model.add_items(["x"], {})
    other = CM3(dim=2, neighbours=2)
    other.attach(toy_data())
    with pytest.raises(InputError, match="keep_features=True, or give known_features"):
        other.add_items(["x"], one)
    with pytest.raises(InputError, match=r"known_features\['image'\] must have shape"):
        other.add_items(["x"], one, known_features={"text": torch.zeros(5, 3)})


def test_model_without_data_says_so() -> None:
    for ask in (lambda model: model.recommend(["a"]), lambda model: model.similar_items(["a"]), CM3.embeddings):
        with pytest.raises(InputError, match="fit it, or load a stored one"):
            ask(CM3())


def test_names() -> None:
    with pytest.raises(InputError, match="ids must be strings, number 1 is int"):
        names_to_tensor(["a", 1])  # type: ignore[list-item]
    assert "b" in NameIndex(["b"], "user")
    assert len(NameIndex(["b"], "user")) == 1
