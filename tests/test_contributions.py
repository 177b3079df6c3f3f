"""Closed forms of contributions against outer products that are made, and against gradients of real convolutions."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from tests.saliency_networks import LAYERS, activation_and_gradient, expected, golden
from zoo.combined_maps import combine_maps, normalize_map
from zoo.contributions import contribution_map
from zoo.errors import InputError

AGGREGATES: list[Any] = ["norm", "selective", "sum", "max", "absmax", "positive"]
EXTRACTS: list[Any] = ["bias", "scaling", "conv1x1", "convNxN", "depthwise"]
# What the golden file calls them.
GOLDEN_EXTRACTS = {
    "bias": ("bias", 1),
    "scaling": ("scaling", 1),
    "conv1x1": ("conv1x1", 1),
    "conv3x3": ("convNxN", 3),
    "conv5x5": ("convNxN", 5),
    "dwconv3x3": ("depthwise", 3),
}
GOLDEN_AGGREGATES = {"norm": "norm", "posnorm": "selective", "sum": "sum", "max": "max", "absmax": "absmax"}
CONVOLUTIONS: list[dict[str, Any]] = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3, "padding": 1, "groups": 2},
    {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0), "groups": 2},
    {"kernel_size": 3, "stride": 2, "padding": 2, "dilation": 2, "groups": 4},
    {"kernel_size": 1, "stride": 2, "padding": 0},
]


def pair(height: int = 5, width: int = 4, channels: int = 4) -> tuple[Tensor, Tensor]:
    x, g = torch.randn(2, 2, channels, height, width, dtype=torch.float64)
    return x, g


def outer_products(x: Tensor, g: Tensor, *, groups: int = 1, **convolution: Any) -> Tensor:
    """Every entry of g_u X_u^T at each place, one group after the other: (B, entries, H, W), by plain loops."""
    patches = F.unfold(x, **convolution).unflatten(1, (groups, -1))  # (B, G, K/G N^2, places)
    flat = g.flatten(2).unflatten(1, (groups, -1))
    rows = []
    for group in range(groups):
        for k in range(flat.shape[2]):
            rows += [flat[:, group, k] * patches[:, group, entry] for entry in range(patches.shape[2])]
    return torch.stack(rows, 1).unflatten(2, g.shape[2:])


def reduced(entries: Tensor, aggregate: str) -> Tensor:
    if aggregate == "norm":
        return entries.square().sum(1, keepdim=True).sqrt()
    if aggregate == "selective":
        return entries.relu().square().sum(1, keepdim=True).sqrt()
    if aggregate == "sum":
        return entries.sum(1, keepdim=True)
    if aggregate == "positive":
        return entries.relu().sum(1, keepdim=True)
    return (entries if aggregate == "max" else entries.abs()).amax(1, keepdim=True)


def contributions(x: Tensor, g: Tensor, extract: str) -> Tensor:
    if extract == "bias":
        return g
    if extract == "scaling":
        return x * g
    if extract == "conv1x1":
        return outer_products(x, g, kernel_size=1)
    return outer_products(x, g, kernel_size=3, padding=1, groups=1 if extract == "convNxN" else x.shape[1])


# -- golden values ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", LAYERS)
def test_golden(layer: str) -> None:
    x, g = activation_and_gradient(layer)
    torch.testing.assert_close(x, expected("activations", layer).squeeze(1), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(g, expected("gradients", layer).squeeze(1), rtol=1e-9, atol=1e-10)
    seen = 0
    for name, maps in golden()["expected"]["maps"][layer].items():
        extract, size = GOLDEN_EXTRACTS[name]
        for golden_aggregate in maps.keys() & GOLDEN_AGGREGATES.keys():
            options: Any = {"extract": extract, "aggregate": GOLDEN_AGGREGATES[golden_aggregate]}
            ours = contribution_map(x, g, **options, kernel_size=size)
            theirs = expected("maps", layer, name, golden_aggregate)
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10, msg=lambda m, o=options: f"{o}: {m}")
            seen += 1
    infinite = contribution_map(x, g, aggregate="absmax")
    torch.testing.assert_close(infinite, expected("maps", layer, "conv1x1", "norm_inf"), rtol=1e-9, atol=1e-10)
    assert seen == 25


def test_golden_normalize_and_combine() -> None:
    first, second = (expected("maps", layer, "conv1x1", "norm") for layer in ("relu1", "relu2"))
    tolerance = {"rtol": 1e-8, "atol": 1e-9}  # of ten digits, subtracted
    torch.testing.assert_close(normalize_map(first), expected("combine", "relu1_minmax"), **tolerance)
    cases: list[tuple[str, Any, Any]] = [
        ("product", None, "product"),
        ("geomean_uniform", None, "geomean"),
        ("geomean_w_1_3", (1, 3), "geomean"),
        ("sum_w_1_3", (1, 3), "sum"),
    ]
    for name, weights, mode in cases:
        torch.testing.assert_close(combine_maps([first, second], weights, mode), expected("combine", name), **tolerance)
    resized = F.interpolate(second, size=(6, 6), mode="bilinear", align_corners=False)
    torch.testing.assert_close(normalize_map(resized), expected("combine", "relu2_resized_minmax"), **tolerance)


# -- identities ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extract", EXTRACTS)
@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_identity_outer_products(extract: Any, aggregate: Any) -> None:
    x, g = pair()
    ours = contribution_map(x, g, extract=extract, aggregate=aggregate)
    torch.testing.assert_close(ours, reduced(contributions(x, g, extract), aggregate), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("convolution", CONVOLUTIONS, ids=str)
def test_identity_outer_products_of_convolutions(convolution: dict[str, Any], aggregate: Any) -> None:
    x = torch.randn(2, 4, 6, 5, dtype=torch.float64)
    layer = nn.Conv2d(4, 8, bias=False, **convolution).double()
    g = torch.randn_like(layer(x))
    ours = contribution_map(x, g, extract="conv", aggregate=aggregate, **convolution)
    theirs = reduced(outer_products(x, g, **convolution), aggregate)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("convolution", CONVOLUTIONS, ids=str)
def test_identity_gradients_of_real_convolutions(convolution: dict[str, Any]) -> None:
    """The contribution of a place is the gradient of the weights if no other place gives any."""
    layer = nn.Conv2d(4, 8, bias=False, **convolution).double()
    x = torch.randn(1, 4, 6, 5, dtype=torch.float64)
    y = layer(x)
    g = torch.randn_like(y)
    norms = contribution_map(x, g, extract="conv", **convolution)
    sums = contribution_map(x, g, extract="conv", aggregate="sum", **convolution)
    for row, column in product(range(y.shape[2]), range(y.shape[3])):
        alone = torch.zeros_like(g)
        alone[:, :, row, column] = g[:, :, row, column]
        (gradient,) = torch.autograd.grad(y, layer.weight, alone, retain_graph=True)
        torch.testing.assert_close(norms[0, 0, row, column], gradient.norm(), rtol=1e-12, atol=1e-12)
    (whole,) = torch.autograd.grad(y, layer.weight, g)
    torch.testing.assert_close(sums.sum(), whole.sum(), rtol=1e-10, atol=1e-10)


def test_identity_the_identity_is_a_convolution() -> None:
    x, g = pair()
    for extract, convolution in (
        ("conv1x1", {"kernel_size": 1}),
        ("convNxN", {"kernel_size": 3}),
        ("depthwise", {"kernel_size": 3, "groups": 4}),
        ("scaling", {"kernel_size": 1, "groups": 4}),
    ):
        for aggregate in AGGREGATES:
            name: Any = extract
            ours = contribution_map(x, g, extract=name, aggregate=aggregate)
            same = contribution_map(x, g, extract="conv", aggregate=aggregate, **convolution)  # type: ignore[arg-type]
            torch.testing.assert_close(ours, same, rtol=1e-12, atol=1e-12)


def test_identity_behind_a_relu() -> None:
    x, g = pair()
    ours = contribution_map(x.relu(), g, aggregate="selective")
    torch.testing.assert_close(ours, x.relu().norm(dim=1, keepdim=True) * g.relu().norm(dim=1, keepdim=True))


def test_groups_matter() -> None:
    """The product of whole norms, as the release has it, is larger than the norm of a grouped convolution's gradient."""
    x, g = pair()
    ours = contribution_map(x, g, extract="conv", kernel_size=1, groups=2)
    assert (ours < contribution_map(x, g)).all()


@pytest.mark.parametrize("extract", EXTRACTS)
@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_gradcheck(extract: Any, aggregate: Any) -> None:
    x, g = (value.requires_grad_() for value in pair(3, 3, 2))
    assert torch.autograd.gradcheck(
        lambda a, b: contribution_map(a, b, extract=extract, aggregate=aggregate), (x, g), fast_mode=True
    )


def test_gradient_at_zero_is_finite() -> None:
    for aggregate in AGGREGATES:
        x, g = torch.zeros(2, 1, 2, 3, 3, dtype=torch.float64, requires_grad=True).unbind()
        contribution_map(x, g, extract="convNxN", aggregate=aggregate).sum().backward()


@pytest.mark.parametrize("extract", [*EXTRACTS, "conv"])
@pytest.mark.parametrize("size", [1, 200])
def test_identity_pieces(monkeypatch: pytest.MonkeyPatch, extract: Any, size: int) -> None:
    """A CPU takes some images at a time; of 5 images of 80 numbers, one or two."""
    x, g = torch.randn(2, 5, 4, 5, 4)
    whole = contribution_map(x, g, extract=extract)
    monkeypatch.setattr("zoo.contributions._PIECE", size)
    assert torch.equal(contribution_map(x, g, extract=extract), whole)
    assert contribution_map(x[:0], g[:0], extract=extract).shape == (0, 1, 5, 4)


# -- properties ------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(
    extract=st.sampled_from([*EXTRACTS, "conv"]),
    aggregate=st.sampled_from(AGGREGATES),
    scales=st.tuples(st.sampled_from([1e-8, 1.0, 1e8]), st.sampled_from([1e-8, 1.0, 1e8])),
    seed=st.integers(0, 1000),
)
def test_properties(extract: Any, aggregate: Any, scales: tuple[float, float], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, g = torch.randn(2, 3, 4, 4, 5, generator=generator)
    options: Any = {"extract": extract, "aggregate": aggregate}
    found = contribution_map(x, g, **options)
    assert found.shape == (3, 1, 4, 5)
    # Linear in each argument's scale; bias does not look at the activation.
    factor = scales[1] if extract == "bias" else scales[0] * scales[1]
    scaled = contribution_map(scales[0] * x, scales[1] * g, **options)
    assert torch.isfinite(scaled).all()
    torch.testing.assert_close(scaled / factor, found, rtol=1e-4, atol=1e-4)
    # Each image by itself, and channels in any order.
    torch.testing.assert_close(contribution_map(x[1:2], g[1:2], **options), found[1:2])
    order = torch.randperm(4, generator=generator)
    torch.testing.assert_close(contribution_map(x[:, order], g[:, order], **options), found)
    if aggregate not in ("sum", "max"):
        assert (found >= 0).all()


@settings(deadline=None, max_examples=20)
@given(extract=st.sampled_from([*EXTRACTS, "conv"]), seed=st.integers(0, 1000))
def test_properties_of_aggregates(extract: Any, seed: int) -> None:
    x, g = torch.randn(2, 1, 4, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = {name: contribution_map(x, g, extract=extract, aggregate=name) for name in AGGREGATES}
    # The positive parts for g and for -g make up the whole.
    other = contribution_map(x, -g, extract=extract, aggregate="selective")
    torch.testing.assert_close(found["selective"].square() + other.square(), found["norm"].square())
    negative = contribution_map(x, -g, extract=extract, aggregate="positive")
    torch.testing.assert_close(found["positive"] - negative, found["sum"])
    assert (found["absmax"] <= found["norm"] * (1 + 1e-12)).all()
    assert (found["max"] <= found["absmax"]).all()


@settings(deadline=None, max_examples=30)
@given(
    scale=st.floats(1e-6, 1e6), shift=st.floats(-10, 10), mode=st.sampled_from(["geomean", "product", "sum"]),
    seed=st.integers(0, 1000),
)  # fmt: skip
def test_properties_of_combinations(scale: float, shift: float, mode: Any, seed: int) -> None:
    maps = list(torch.rand(3, 2, 1, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
    found = combine_maps(maps, mode=mode)
    assert ((found >= 0) & (found <= 1)).all()
    changed = [scale * maps[0] + shift * scale, *maps[1:]]
    torch.testing.assert_close(combine_maps(changed, mode=mode), found, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(combine_maps(maps[::-1], mode=mode), found)
    torch.testing.assert_close(combine_maps([maps[0]] * 2, (1, 4)), normalize_map(maps[0]))
    torch.testing.assert_close(combine_maps([one[:1] for one in maps], mode=mode), found[:1])


# -- degenerate ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extract", [*EXTRACTS, "conv"])
def test_nothing_and_nan(extract: Any) -> None:
    x, g = pair()
    assert not contribution_map(x, torch.zeros_like(g), extract=extract).any()
    g[0, 0, 2, 2] = torch.nan
    for aggregate in AGGREGATES:
        found = contribution_map(x, g, extract=extract, aggregate=aggregate)
        assert torch.isnan(found[0, 0, 2, 2])
        assert torch.isfinite(found[1]).all()


def test_padding_counts_as_zeros() -> None:
    x, g = -torch.ones(1, 1, 3, 3), torch.ones(1, 1, 3, 3)
    found = contribution_map(x, g, extract="convNxN", aggregate="max")
    assert found[0, 0].tolist() == [[0, 0, 0], [0, -1, 0], [0, 0, 0]]


def test_a_constant_map_becomes_zeros() -> None:
    constant = torch.full((1, 1, 3, 3), 0.1)
    assert not normalize_map(constant).any()
    assert not normalize_map(F.interpolate(constant, (224, 224), mode="bilinear")).any()
    assert not normalize_map(torch.zeros(2, 1, 1, 1)).any()
    assert torch.isnan(normalize_map(torch.tensor([[[[1.0, torch.nan]]]]))).all()
    assert torch.isnan(normalize_map(torch.tensor([[[[1.0, torch.inf]]]]))).any()
    assert torch.isnan(normalize_map(torch.full((1, 1, 2, 2), torch.inf))).all()
    assert normalize_map(torch.tensor([[[[1e-30, 3e-30]]]])).flatten().tolist() == [0, 1]


@pytest.mark.parametrize("mode", ["geomean", "product", "sum"])
def test_a_constant_map_is_left_out_for_its_image(mode: Any) -> None:
    useful, also = torch.rand(2, 2, 1, 4, 4)
    other = also.clone()
    other[0] = 0.7
    found = combine_maps([useful, other], mode=mode)
    torch.testing.assert_close(found[:1], normalize_map(useful[:1]))
    torch.testing.assert_close(found[1:], combine_maps([useful[1:], also[1:]], mode=mode))
    assert not combine_maps([torch.ones(1, 1, 2, 2)] * 2, mode=mode).any()
    torch.testing.assert_close(combine_maps([useful, also], (0, 2), "sum"), normalize_map(also))


def test_combination_takes_the_largest_size() -> None:
    maps = [torch.rand(1, 1, 2, 2), torch.rand(1, 1, 6, 4)]
    assert combine_maps(maps).shape == (1, 1, 6, 4)
    assert combine_maps(maps, size=(3, 9)).shape == (1, 1, 3, 9)


# -- types -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    """Twenties of 512 channels overflow the squares of half precision, gradients of 1e-4 vanish in them."""
    x, g = torch.full((1, 512, 2, 2), 20.0, dtype=dtype), torch.full((1, 512, 2, 2), 1e-4, dtype=dtype)
    for extract in EXTRACTS:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = contribution_map(x, g, extract=extract)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, contribution_map(x.float(), g.float(), extract=extract), rtol=1e-6, atol=0)
        assert (found > 0).all()
    assert normalize_map(torch.rand(1, 1, 2, 2).to(dtype)).dtype == torch.float32


def test_compile() -> None:
    x, g = torch.randn(2, 2, 4, 5, 5)

    def both(a: Tensor, b: Tensor) -> Tensor:
        first = contribution_map(a, b, extract="convNxN", aggregate="selective")
        return combine_maps([first, contribution_map(a, b)], (1, 2))

    compiled = torch.compile(both, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, g), both(x, g))
    torch.compiler.reset()


# -- bad input -------------------------------------------------------------------------------------------------------


def test_bad_contributions() -> None:
    x, g = torch.randn(2, 2, 4, 5, 5)
    bad: list[tuple[str, dict[str, Any]]] = [
        ("extract must be one of .*got 'conv3x3'. Did you mean conv", {"extract": "conv3x3"}),
        ("aggregate must be one of .*got 'l2'", {"aggregate": "l2"}),
        ("activation must be a map .*shape \\(4, 5, 5\\)", {"activation": x[0]}),
        ("gradient must be a map .*int64", {"gradient": g.long()}),
        ("gradient must have the shape of activation", {"gradient": g[:, :2]}),
        ("gradient must have the batch size", {"gradient": g[:1], "extract": "conv"}),
        ("belong to extract='conv'", {"groups": 2}),
        ("belong to extract='conv'", {"stride": (1, 2), "extract": "bias"}),
        ("belong to extract='conv'", {"padding": 1, "extract": "convNxN"}),
        ("kernel_size must be odd .*\\(4, 4\\)", {"kernel_size": 4, "extract": "depthwise"}),
        ("kernel_size must be at least 1", {"kernel_size": 0, "extract": "convNxN"}),
        ("stride must be at least 1", {"stride": 0, "extract": "conv"}),
        ("padding must not be negative", {"padding": -1, "extract": "conv"}),
        ("groups must divide the channels, 4 and 4, got 3", {"groups": 3, "extract": "conv"}),
        ("gradient must have the 3 x 3 places", {"padding": 0, "extract": "conv"}),
    ]
    for match, options in bad:
        with pytest.raises(InputError, match=match):
            contribution_map(**({"activation": x, "gradient": g} | options))


def test_bad_maps() -> None:
    good = torch.rand(2, 1, 3, 3)
    bad: list[tuple[str, tuple[Any, ...]]] = [
        ("maps must be a list", ([],)),
        ("maps must be a list", (good,)),
        ("maps\\[1\\] must be a map", ([good, good[0]],)),
        ("maps must be of the same images", ([good, good[:1]],)),
        ("weights must be one number a map, 2, got 1", ([good, good], [1])),
        ("weights\\[1\\] must be finite and not negative", ([good, good], [1, -1])),
        ("weights must not all be 0", ([good, good], [0, 0])),
        ("mode must be one of", ([good], None, "mean")),
    ]
    for match, arguments in bad:
        with pytest.raises(InputError, match=match):
            combine_maps(*arguments)
    with pytest.raises(InputError, match=r"saliency_map must be a map .*shape \(2, 3, 3\)"):
        normalize_map(good[:, 0])
