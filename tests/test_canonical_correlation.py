"""Canonical correlation: maps, degenerate directions, CSA's similarity, and heads that hold it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import linalg
from sklearn.cross_decomposition import CCA
from torch import Tensor

from zoo.canonical_correlation import (
    CanonicalHead,
    canonical_correlation,
    canonical_similarity,
    fit_heads,
    pair_moments,
    whiten_heads,
)
from zoo.errors import InputError


def pairs(samples: int = 200, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Three directions in common, of 6 and 5, mixed and shifted."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    shared = normal(samples, 3)
    first = torch.cat([shared, normal(samples, 3)], 1) @ normal(6, 6) + 5 * normal(1, 6)
    second = shared @ normal(3, 5) + 0.5 * normal(samples, 5) - 3
    return first, second


def by_eigenvalues(first: Tensor, second: Tensor, ridge: float) -> np.ndarray[Any, Any]:
    """Correlations from the generalised eigenvalue problem of both sides at once, as textbooks write it."""
    x, y = (side.numpy() - side.numpy().mean(0) for side in (first, second))
    n, d = x.shape
    s11, s22, s12 = x.T @ x / n, y.T @ y / n, x.T @ y / n
    s11, s22 = (s + ridge * np.trace(s) / len(s) * np.eye(len(s)) for s in (s11, s22))
    left = np.block([[np.zeros((d, d)), s12], [s12.T, np.zeros((len(s22), len(s22)))]])
    values: np.ndarray[Any, Any] = linalg.eigh(left, linalg.block_diag(s11, s22), eigvals_only=True)
    return values[::-1][: min(d, len(s22))]


@pytest.mark.parametrize("ridge", [0.0, 0.3])
def test_identity_eigenvalue_problem(ridge: float) -> None:
    first, second = pairs()
    found = canonical_correlation(first, second, ridge=ridge)
    np.testing.assert_allclose(found.correlations.numpy(), by_eigenvalues(first, second, ridge), atol=1e-10)


def test_agrees_with_scikit_learn() -> None:
    """Correlations, and the canonical variables up to sign and scale."""
    first, second = pairs()
    found = canonical_correlation(first, second, dim=3)
    theirs = (
        CCA(3, max_iter=5000, tol=1e-12).fit(first.numpy(), second.numpy()).transform(first.numpy(), second.numpy())
    )
    for side, part, mean, other in zip((first, second), found.maps, found.means, theirs, strict=True):
        ours = ((side - mean) @ part).numpy()
        for direction in range(3):
            assert abs(np.corrcoef(ours[:, direction], other[:, direction])[0, 1]) == pytest.approx(1, abs=1e-5)
    for direction in range(3):
        expected = np.corrcoef(theirs[0][:, direction], theirs[1][:, direction])[0, 1]
        assert found.correlations[direction].item() == pytest.approx(expected, abs=1e-6)


@settings(deadline=None, max_examples=12)
@given(seed=st.integers(0, 999), samples=st.integers(2, 40), size=st.integers(1, 40))
def test_properties(seed: int, samples: int, size: int) -> None:
    """White and aligned; batches, shifts and invertible maps of a side do not count. More columns than rows is fine."""
    first, second = pairs(samples, seed)
    found = canonical_correlation(first, second)
    whole = pair_moments([(first, second)])
    parts = pair_moments(zip(first.split(size), second.split(size), strict=True))
    for one, other in ((whole.cross, parts.cross), *zip(whole.covariances, parts.covariances, strict=True)):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    u, v = ((side - mean) @ part for side, mean, part in zip((first, second), found.means, found.maps, strict=True))
    rank = len(found.correlations)
    assert rank == min(5, samples - 1)
    torch.testing.assert_close(u.T @ u / samples, torch.eye(rank, dtype=torch.float64), rtol=0, atol=1e-5)
    torch.testing.assert_close(u.T @ v / samples, found.correlations.diag(), rtol=0, atol=1e-5)
    assert bool((found.correlations.diff() <= 1e-9).all())
    mixed = canonical_correlation(first @ torch.diag(torch.arange(1.0, 7).double()) + 100, second)
    torch.testing.assert_close(mixed.correlations, found.correlations, rtol=0, atol=1e-5)


def test_fewer_pairs_than_dimensions() -> None:
    """Without a ridge anything fits; with one, unrelated directions count less than related ones."""
    g = torch.Generator().manual_seed(0)
    first, second = (torch.randn(10, 40, generator=g) for _ in range(2))
    plain = canonical_correlation(first, second)
    torch.testing.assert_close(plain.correlations, torch.ones(9, dtype=torch.float64), rtol=0, atol=1e-9)
    ridged = canonical_correlation(first, second, ridge=1.0)
    assert float(ridged.correlations.max()) < 0.95
    second[:, 0] = 10 * first[:, 0]
    assert canonical_correlation(first, second, ridge=1.0).correlations[0] > ridged.correlations[0]


def test_directions_without_variance() -> None:
    """A constant column and a copy change nothing; constant features have no directions; what is asked beyond is zero."""
    first, second = pairs()
    expected = canonical_correlation(first, second)
    padded = canonical_correlation(torch.cat([first, first[:, :1], torch.ones(200, 1)], 1), second, dim=7)
    torch.testing.assert_close(padded.correlations[:5], expected.correlations, rtol=0, atol=1e-7)
    assert padded.correlations[5:].tolist() == [0, 0]
    assert not padded.maps[0][:, 5:].any()
    assert padded.maps[1].shape == (5, 7)
    flat = canonical_correlation(torch.ones(200, 2), second, dim=2, ridge=0.1)
    assert not flat.maps[0].any()
    assert not flat.maps[1].any()
    assert flat.correlations.tolist() == [0, 0]


def test_half_precision() -> None:
    first, second = pairs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = canonical_correlation(first.float(), second.half(), dim=3)
    assert found.maps[0].dtype == found.correlations.dtype == torch.float64
    torch.testing.assert_close(
        found.correlations, canonical_correlation(first, second).correlations[:3], atol=1e-3, rtol=0
    )


def heads(ridge: float, power: float, samples: int = 200) -> tuple[tuple[CanonicalHead, CanonicalHead], Any]:
    pair = (CanonicalHead(6, 8).double(), CanonicalHead(5, 8).double())
    moments = pair_moments([pairs(samples)])
    fit_heads(pair, moments, ridge=ridge, power=power)
    return pair, moments


@pytest.mark.parametrize("ridge", [0.0, 0.2])
def test_heads_are_white_and_stay_so(ridge: float) -> None:
    pair, moments = heads(ridge, 1.0)
    first, second = pairs()
    found = canonical_correlation(first, second, dim=8, ridge=ridge)
    expected = (first - first.mean(0)) @ found.maps[0] * found.correlations.sqrt()
    torch.testing.assert_close(pair[0](first), expected, rtol=1e-6, atol=1e-7)
    before = [head.weight.detach().clone() for head in pair]
    whiten_heads(pair, moments, ridge=ridge)
    for head, weight in zip(pair, before, strict=True):
        torch.testing.assert_close(head.weight.detach(), weight, rtol=1e-6, atol=1e-9)
    with torch.no_grad():
        for head in pair:
            head.weight.mul_(torch.linspace(0.5, 3, 8).double().unsqueeze(1)).add_(0.05)
    whiten_heads(pair, moments, ridge=ridge)
    shift = [ridge * covariance.diagonal().mean() for covariance in moments.covariances]
    for head, covariance, more in zip(pair, moments.covariances, shift, strict=True):
        weight = head.weight.detach()
        white = weight @ (covariance + more * torch.eye(len(covariance))) @ weight.T
        # 6 and 5 of the 8 directions have variance.
        torch.testing.assert_close(white @ white, white, rtol=0, atol=1e-6)
        assert round(float(white.trace())) == len(covariance)
    u, v = ((side - side.mean(0)) @ head.weight.detach().T for side, head in zip((first, second), pair, strict=True))
    torch.testing.assert_close(pair[0].weights ** 2, (u * v).mean(0).clamp(0, 1), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_identity_similarity(power: float) -> None:
    """The heads' inner products are CSA's sum, whose lengths have no weights; by hand as well."""
    pair, _ = heads(0.0, power)
    first, second = (side[:4] for side in pairs())
    found = canonical_correlation(*pairs(), dim=8)
    u, v = ((side - m) @ w for side, m, w in zip((first, second), found.means, found.maps, strict=True))
    similarity = canonical_similarity(u, v, found.correlations, power=power)
    lengths = torch.outer(u.norm(dim=1), v.norm(dim=1))
    torch.testing.assert_close(pair[0](first) @ pair[1](second).T / lengths, similarity, rtol=1e-6, atol=1e-7)
    by_hand = sum(float(found.correlations[i]) ** power * u[1, i] * v[2, i] for i in range(5)) / lengths[1, 2]
    torch.testing.assert_close(similarity[1, 2], by_hand, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: canonical_correlation(torch.ones(1, 2), torch.ones(1, 2)), "needs at least 2 pairs, got 1"),
        (lambda: canonical_correlation(torch.ones(3, 2), torch.ones(2, 2)), r"must be pairs .* got \(3, 2\) and \(2, 2\)"),
        (lambda: canonical_correlation(torch.ones(3), torch.ones(3, 2)), "first must have two dimensions"),
        (lambda: canonical_correlation(torch.eye(3) / 0, torch.eye(3)), "features must be finite"),
        (lambda: canonical_correlation(torch.eye(3), torch.eye(3), dim=0), "dim must be at least 1"),
        (lambda: canonical_correlation(torch.eye(3), torch.eye(3), ridge=-1), "ridge must be finite and not negative"),
        (lambda: pair_moments([(torch.eye(2), torch.eye(2)), (torch.eye(2), torch.ones(2, 3))]), "after widths 2 and 2"),
        (lambda: canonical_similarity(torch.eye(2), torch.eye(2), torch.ones(3)), "must have one width"),
    ],
)  # fmt: skip
def test_bad_arguments(call: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()
