"""Every public metric, given anything: finite numbers, an `InputError`, or NaN where its docstring says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.fuzz_parts import Case, Drawer, Strategies, fuzz
from zoo import metrics
from zoo.interaction_graph import PairLists, pair_lists
from zoo.metrics.embeddings import unit_rows

_STRATEGIES = Strategies()

# A metric that has seen nothing says so in this way.
pytestmark = pytest.mark.filterwarnings("ignore:The ``compute`` method of metric .* was called before:UserWarning")


def _function(draw: Drawer, name: str, **given: Any) -> Case:
    arguments, spoiled = draw.arguments(**given)
    return Case(getattr(metrics, name), arguments, spoiled=spoiled)


def _metric(
    draw: Drawer,
    name: str,
    options: dict[str, Any],
    undefined: Callable[[dict[str, Any]], bool] | None = None,
    **given: Any,
) -> Case:
    """Make the metric, update it once or twice with the same batch, and compute."""
    arguments, spoiled = draw.arguments(**options, **given)
    times = draw.choice(1, 2, 0)

    def run(**arguments: Any) -> Any:
        chosen = {key: value for key, value in arguments.items() if key in options}
        metric = getattr(metrics, name)(**chosen)
        for _ in range(times):
            metric.update(**{key: value for key, value in arguments.items() if key not in options})
        return metric.compute()

    return Case(
        run, arguments, lambda arguments: times == 0 or (undefined is not None and undefined(arguments)), spoiled
    )


@_STRATEGIES.of(
    "CKA", "cka_table", "mutual_knn_table", "MutualKNN", "Trustworthiness", "Continuity", "StructureTransfer"
)
def _two_sides(draw: Drawer, name: str) -> Case:
    rows = draw.choice(6, 3, 1, 0, 12)
    first, second = draw.floats(rows, draw.width()), draw.floats(rows, draw.width())
    chunk_size = draw.choice(None, 1, 2)
    unbiased = draw.choice(False, True)
    if name == "cka_table":
        given = {"unbiased": unbiased, "eps": draw.choice(1e-6, 0.1), "chunk_size": chunk_size}
        return _function(draw, name, image_layers=[first, first], text_layers=[second], **given)
    k = draw.choice(1, 2, "rice", "sqrt", "sturges")
    if name == "mutual_knn_table":
        return _function(draw, name, image_layers=[first], text_layers=[second, first], k=k, chunk_size=chunk_size)
    ids = torch.arange(rows) if draw.choice(False, True) else None
    if name in ("CKA", "MutualKNN"):
        options: dict[str, Any] = {"unbiased": unbiased, "eps": draw.choice(1e-6, 0.1)}
        if name == "MutualKNN":
            options = {"k": k, "chunk_size": chunk_size}
        given = {"image_features": first, "text_features": second} | ({} if name == "CKA" else {"sample_ids": ids})
        return _metric(draw, name, options, _too_few("image_features"), **given)
    options = {"k": draw.choice(1, 2), "chunk_size": chunk_size}
    if name == "StructureTransfer":
        options = {"max_samples": draw.choice(2000, 3), "seed": draw.choice(0, 7)}
        given = {"embeddings": first, "reference": second, "sample_ids": ids}
        return _metric(draw, name, options, lambda arguments: _different(arguments) < 3, **given)
    return _metric(draw, name, options, _too_few("embeddings"), embeddings=first, reference=second, sample_ids=ids)


def _too_few(name: str) -> Callable[[dict[str, Any]], bool]:
    """NaN is documented for fewer samples than the metric needs: at most five a neighbour here."""
    return lambda arguments: len(arguments[name]) < max(5, 5 * arguments["k"] if type(arguments.get("k")) is int else 5)


def _different(arguments: dict[str, Any]) -> int:
    """How many samples there are: without numbers, rows whose directions are the same are one, as documented."""
    sides = [arguments[name] for name in ("embeddings", "reference")]
    if arguments["sample_ids"] is not None or not all(side.ndim == 2 and side.numel() for side in sides):
        return len(sides[0])
    return len(torch.unique(torch.cat([unit_rows(side).float() for side in sides], 1), dim=0))


@_STRATEGIES.of("cosine_structure_correlation")
def _correlation(draw: Drawer, name: str) -> Case:
    rows = draw.choice(6, 3, 1, 0)
    case = _function(draw, name, embeddings=draw.floats(rows, draw.width()), reference=draw.floats(rows, draw.width()))
    case.undefined = lambda arguments: len(arguments["embeddings"]) < 3  # documented: no two pairs
    return case


@_STRATEGIES.of("mutual_knn")
def _shared(draw: Drawer, name: str) -> Case:
    rows, k = draw.rows(), draw.choice(2, 1, 0)
    sides = {side: torch.stack([torch.randperm(9)[:k] for _ in range(rows)]) if rows else torch.zeros(0, k).long()
             for side in ("first", "second")}  # fmt: skip
    case = _function(draw, name, **sides)
    case.undefined = lambda arguments: len(arguments["first"]) == 0  # documented: no rows
    return case


@_STRATEGIES.of("neighbour_count")
def _count(draw: Drawer, name: str) -> Case:
    k = draw.choice(1, "rice", "sqrt", "sturges", 10**9)
    arguments, spoiled = draw.arguments(k=k, samples=draw.choice(5, 0, 1, 2**40))
    return Case(lambda **given: torch.tensor(metrics.neighbour_count(**given)), arguments, spoiled=spoiled)


@_STRATEGIES.of("nearest_neighbours")
def _neighbours(draw: Drawer, name: str) -> Case:
    rows = draw.rows()
    return _function(
        draw, name, features=draw.floats(rows, draw.width()), k=draw.choice(1, 2, 7), chunk_size=draw.choice(None, 1, 2)
    )


@_STRATEGIES.of("ClassMeans")
def _means(draw: Drawer, name: str) -> Case:
    classes, width, rows = draw.choice(3, 1), draw.choice(4, 1), draw.rows()
    options = {"num_classes": classes, "dim": width}
    return _metric(draw, name, options, features=draw.floats(rows, width), targets=draw.labels(rows, classes))


def _lists(draw: Drawer, rows: int, columns: int) -> PairLists:
    pairs = draw.choice(5, 0) if rows and columns else 0
    users = torch.randint(0, max(rows, 1), (pairs,), generator=draw.generator)
    items = torch.randint(0, max(columns, 1), (pairs,), generator=draw.generator)
    return pair_lists(users, items, num_rows=rows, num_columns=columns)


@_STRATEGIES.of("FullRanking", "topk_items")
def _ranking(draw: Drawer, name: str) -> Case:
    users, items, width = draw.rows(), draw.rows(), draw.width()
    of_users, of_items = draw.floats(users, width), draw.floats(items, width)
    options: dict[str, Any] = {
        "k": draw.choice(1, 3, 100), "score": draw.choice("dot", "cosine"), "memory": draw.choice(2**20, 1, 1000),
    }  # fmt: skip
    listed = _lists(draw, users, items) if draw.choice(True, False) else None
    if name == "FullRanking":
        given = {"held_out": _lists(draw, users, items), "seen": listed}
        case = _metric(draw, name, options, user_embeddings=of_users, item_embeddings=of_items, **given)
        # Documented: NaN without a user who has held-out items.
        plain = case.undefined
        case.undefined = lambda arguments: plain(arguments) or len(arguments["held_out"].columns) == 0
        return case
    candidates = torch.randint(0, max(items, 1), (3,), generator=draw.generator) if draw.choice(False, True) else None
    case = _function(draw, name, users=of_users, items=of_items, exclude=listed, candidates=candidates, **options)

    def items_alone(**arguments: Any) -> Tensor:
        found = metrics.topk_items(**arguments)
        # Documented: -inf where no item is left. And products of 1e30 are beyond float32.
        assert not bool(found.scores.isnan().any())
        assert bool(((found.items >= -1) & (found.items < len(arguments["items"]))).all())
        return found.items

    case.call = items_alone
    return case


@_STRATEGIES.of("ranking_values")
def _values(draw: Drawer, name: str) -> Case:
    rows = draw.rows()
    hits = draw.mask(rows, draw.width())
    held_out = hits.sum(1) + draw.choice(0, 2)
    return _function(draw, name, hits=hits, held_out=held_out, ks=[1, 3, 20])


@_STRATEGIES.of("RetrievalRecall")
def _recall(draw: Drawer, name: str) -> Case:
    images, width = draw.rows(), draw.width()
    numbered, further = draw.choice("no", "images", "both"), draw.choice(0, 2)
    texts = images + (further if numbered == "both" else 0)
    options = {"k": draw.choice(1, 10), "chunk_size": draw.choice(None, 1)}
    given = {
        "image_ids": torch.arange(images) if numbered != "no" else None,
        "text_image_ids": torch.arange(texts) % max(images, 1) if numbered == "both" else None,
        "text_ids": torch.arange(texts) if draw.choice(False, True) else None,
    }
    sides = {"image_embeddings": draw.floats(images, width), "text_embeddings": draw.floats(texts, width)}
    # Documented: NaN in a direction that has no query, as where ids do not meet.
    undefined = lambda arguments: not _ids_meet(arguments)  # noqa: E731
    return _metric(draw, name, options, undefined, **sides, **given)


def _ids_meet(arguments: dict[str, Any]) -> bool:
    images, texts = len(arguments["image_embeddings"]), len(arguments["text_embeddings"])
    if arguments["text_image_ids"] is None:
        return min(images, texts) > 0
    return bool(torch.isin(arguments["text_image_ids"], arguments["image_ids"]).any())


@_STRATEGIES.of("RobustAccuracy")
def _robust(draw: Drawer, name: str) -> Case:
    rows = draw.rows()
    verdicts = {"clean": draw.mask(rows), "attacked": draw.mask(draw.choice(2, 0), rows)}
    # Documented: NaN without samples.
    return _metric(
        draw, name, {"conditions": ["clean", "attacked"]},
        lambda arguments: any(x.ndim == 0 or x.shape[-1] == 0 for x in arguments["verdicts"].values()), verdicts=verdicts,
    )  # fmt: skip


class _Network(nn.Module):
    """Logits (B, 3) of images of one channel."""

    def forward(self, images: Tensor) -> Tensor:
        return torch.stack([images.mean((1, 2, 3)), images.amax((1, 2, 3)), images.flatten(1)[:, 0]], 1)


@_STRATEGIES.of("insertion_deletion", "InsertionDeletion")
def _curves(draw: Drawer, name: str) -> Case:
    rows, side = draw.rows(), draw.choice((3, 4), (1, 1), (2, 1))
    baseline = ("blur", "zero", "mean")
    options: dict[str, Any] = {
        "steps": draw.choice(None, 1, 3),
        "insertion_baseline": draw.choice(*baseline),
        "deletion_baseline": draw.choice(*baseline),
        "batch_size": draw.choice(64, 1),
        "blur_size": draw.choice(11, 1),
        "blur_sigma": draw.choice(5.0, 0.1),
    }
    given: dict[str, Any] = {
        "model": _Network(),
        "images": draw.floats(rows, 1, *side),
        "maps": draw.floats(rows, 1, *side),
        "targets": draw.choice(None, 1, draw.labels(rows, 3)),
    }
    if name == "InsertionDeletion":
        # Documented: NaN without an image.
        return _metric(draw, name, options, lambda arguments: len(arguments["images"]) == 0, **given)
    return _function(draw, name, **given, **options)


@_STRATEGIES.of("SaliencyCurves")
def _areas(draw: Drawer, name: str) -> Case:
    rows, steps = draw.rows(), draw.choice(4, 1)
    shares = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    scores = draw.shares(rows, steps + 1), draw.shares(rows, steps + 1)

    def areas(insertion: Tensor, deletion: Tensor) -> tuple[Tensor, Tensor]:
        curves = metrics.SaliencyCurves(shares, insertion, deletion)
        return curves.insertion_area, curves.deletion_area

    return Case(areas, {"insertion": scores[0], "deletion": scores[1]})


@_STRATEGIES.of("pointing_hits", "PointingGame")
def _pointing(draw: Drawer, name: str) -> Case:
    rows, height, width = draw.rows(), draw.choice(4, 1), draw.choice(5, 1)
    corner = draw.shares(rows, 2, highest=3.0, dtype=torch.float32)
    boxes = torch.cat([corner, corner + draw.choice(0, 2)], 1)
    kind = draw.choice("boxes", "list", "masks", "maps of masks")
    objects: Any = boxes if kind == "boxes" else [boxes[i : i + 1] for i in range(rows)]
    if kind.endswith("masks"):
        objects = torch.ones(rows, height, width, dtype=torch.bool)
        objects = objects.unsqueeze(1) if kind == "maps of masks" else objects
    given: dict[str, Any] = {"maps": draw.floats(rows, 1, height, width), "objects": objects}
    options: dict[str, Any] = {"tolerance": draw.choice(15.0, 0.0, 1e6), "strict": draw.choice(False, True)}
    if name == "pointing_hits":
        return _function(draw, name, **given, **options)
    options |= {"average": draw.choice("macro", "micro", "none"), "num_classes": draw.choice(None, 3)}
    # Documented: NaN without a pair, and for classes without pairs.
    return _metric(
        draw, name, options, lambda arguments: len(arguments["labels"]) == 0 or arguments["average"] == "none",
        labels=draw.labels(rows, 3), **given,
    )  # fmt: skip


@_STRATEGIES.of("ClassSensitivity", "spearman")
def _ranks(draw: Drawer, name: str) -> Case:
    rows, height, width = draw.rows(), draw.choice(3, 1), draw.choice(4, 1)
    maps = draw.floats(rows, 1, height, width), draw.floats(rows, 1, height, width)
    # Documented: NaN where a row is constant, and where all maps are.
    if name == "spearman":
        case = _function(draw, name, first=maps[0], second=maps[1])
        case.undefined = lambda arguments: bool((_constant(arguments["first"]) | _constant(arguments["second"])).any())
        return case
    return _metric(
        draw, name, {},
        lambda arguments: bool((_constant(arguments["maps_most"]) | _constant(arguments["maps_least"])).all()),
        maps_most=maps[0], maps_least=maps[1],
    )  # fmt: skip


def _constant(maps: Tensor) -> Tensor:
    rows = maps.detach().flatten(1).double()
    return (rows.amax(1) - rows.amin(1)) <= 1e-4 * rows.abs().amax(1)


@_STRATEGIES.of("ZeroShotAccuracy")
def _zero_shot(draw: Drawer, name: str) -> Case:
    rows, width, classes = draw.rows(), draw.choice(4, 1), draw.choice(3, 1)
    options = {
        "class_embeddings": draw.floats(classes, width),
        "k": draw.choice(1, (1, 3)),
        "average": draw.choice("micro", "macro"),
    }
    return _metric(
        draw, name, options, lambda arguments: len(arguments["targets"]) == 0,  # documented: NaN without a sample
        embeddings=draw.floats(rows, width), targets=draw.labels(rows, classes),
    )  # fmt: skip


@_STRATEGIES.of("class_embeddings")
def _prompts(draw: Drawer, name: str) -> Case:
    counts = draw.choice((2, 1), (1,), (), (1, 0))
    width = draw.width()
    rows = draw.floats(max(sum(counts), 1), width)
    given = {
        "encode": lambda texts: rows[[len(text) % len(rows) for text in texts]],
        "prompts": [["x" * (sum(counts[:i]) + j) for j in range(count)] for i, count in enumerate(counts)],
        "batch_size": draw.choice(256, 1),
    }
    arguments, spoiled = draw.arguments(**{key: value for key, value in given.items() if key != "encode"})
    return Case(metrics.class_embeddings, {"encode": given["encode"], **arguments}, spoiled=spoiled)


@_STRATEGIES.of("class_prompts")
def _templates(draw: Drawer, name: str) -> Case:
    given = {
        "class_names": draw.choice(["cat", "{}"], [], [""]),
        "templates": draw.choice(["a {}."], ["no"], [], ["{} {0} {"]),
    }

    def count(**arguments: Any) -> Tensor:
        return torch.tensor([len(prompts) for prompts in metrics.class_prompts(**arguments)])

    arguments, spoiled = draw.arguments(**given)
    return Case(count, arguments, spoiled=spoiled)


def test_every_metric_is_here() -> None:
    assert sorted(_STRATEGIES) == sorted(metrics.__all__)


@pytest.mark.parametrize("name", sorted(metrics.__all__))
def test_metric(name: str) -> None:
    fuzz(_STRATEGIES[name], examples=30)


@pytest.mark.thorough
@pytest.mark.parametrize("name", sorted(metrics.__all__))
def test_metric_further(name: str) -> None:
    fuzz(_STRATEGIES[name], examples=1500)
